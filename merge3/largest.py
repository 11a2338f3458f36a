"""The k-th largest of more numbers than fit in memory, exactly: a radix selection in two passes over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

_LOW, _BINS = 16, 2**16  # a magnitude's bits are found in two halves


def kth_largest(read: Callable[[], Iterable[torch.Tensor]], place_of: Callable[[int], int]) -> tuple[float, int]:
    """(the value of the place-th largest, how many equal to it are among the first `place`); (0.0, 0) where there are
    fewer. read: magnitudes (no negative one, no NaN), float32, each time it is called; it is twice. place_of: from how
    many there are to the place, 1-based."""
    upper, count = torch.zeros(_BINS, dtype=torch.int64), 0
    for tensor in read():
        upper += torch.bincount(_bits(tensor) >> _LOW, minlength=_BINS).cpu()
        count += tensor.numel()
    place = place_of(count)
    if place > count:
        return 0.0, 0
    high, place = _find(upper, place)
    lower = torch.zeros(_BINS, dtype=torch.int64)
    for tensor in read():
        bits = _bits(tensor)
        lower += torch.bincount(bits[bits >> _LOW == high] & (_BINS - 1), minlength=_BINS).cpu()
    low, place = _find(lower, place)
    return float(torch.tensor((high << _LOW) | low, dtype=torch.int32).view(torch.float32)), place


def _find(counts: torch.Tensor, place: int) -> tuple[int, int]:
    """(the bin of the place-th element from the top, its place within the bin)"""
    above = counts.flip(0).cumsum(0)
    at = int((above >= place).nonzero()[0])
    return len(counts) - 1 - at, place - (int(above[at - 1]) if at else 0)


def _bits(magnitudes: torch.Tensor) -> torch.Tensor:
    """Of floats that are not negative: integers in the same order, int64."""
    return magnitudes.flatten().contiguous().view(torch.int32).long()
