"""The k-th largest of more numbers than fit in memory, exactly: a radix selection in two passes over them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch

Key = Hashable
# (key, magnitudes: float32, none negative, no NaN), of a key as many tensors as it has; called twice.
Read = Callable[[], Iterable[tuple[Key, torch.Tensor]]]
_LOW, _BINS = 16, 2**16  # a magnitude's bits are found in two halves


def kth_largest(read: Read, place_of: Callable[[int], int]) -> dict[Key, tuple[float, int]]:
    """Of each key, (the value of the place-th largest of all its elements, how many equal to it are among the first
    `place`); (0.0, 0) where there are fewer. place_of: from how many there are to the place, 1-based."""
    upper: dict[Key, torch.Tensor] = {}
    for key, tensor in read():
        counts = upper.setdefault(key, torch.zeros(_BINS, dtype=torch.int64))
        counts += torch.bincount(_bits(tensor) >> _LOW, minlength=_BINS).cpu()
    found: dict[Key, tuple[float, int]] = dict.fromkeys(upper, (0.0, 0))
    high, places = {}, {}
    for key, counts in upper.items():
        count = int(counts.sum())
        if (place := place_of(count)) <= count:
            high[key], places[key] = _find(counts, place)
    lower = {key: torch.zeros(_BINS, dtype=torch.int64) for key in high}
    for key, tensor in read() if high else ():
        if key in high:
            bits = _bits(tensor)
            bits = bits[bits >> _LOW == high[key]] & (_BINS - 1)
            lower[key] += torch.bincount(bits, minlength=_BINS).cpu()
    for key, counts in lower.items():
        low, among = _find(counts, places[key])
        value = torch.tensor((high[key] << _LOW) | low, dtype=torch.int32).view(torch.float32)
        found[key] = float(value), among
    return found


def kept_from(read: Read, share: float) -> dict[Key, float]:
    """Of each key, the magnitude from which on `share` of all its elements are kept, and one more, as
    kthvalue(n − int(n · share)) has it; 0.0 where all are."""
    return {key: value for key, (value, _) in kth_largest(read, lambda count: int(count * share) + 1).items()}


def _find(counts: torch.Tensor, place: int) -> tuple[int, int]:
    """(the bin of the place-th element from the top, its place within the bin)"""
    above = counts.flip(0).cumsum(0)
    at = int((above >= place).nonzero()[0])
    return len(counts) - 1 - at, place - (int(above[at - 1]) if at else 0)


def _bits(magnitudes: torch.Tensor) -> torch.Tensor:
    """Of floats that are not negative: integers in the same order, int64."""
    return magnitudes.flatten().contiguous().view(torch.int32).long()
