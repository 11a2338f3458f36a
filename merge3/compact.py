"""Tensors of experts held as what they differ from the base by: packed, expanded again, and merged as they are.

Two ways. `Kept`: a bit per element and the expert's own values where it is set, so that what is kept is exact, and what
is not is the base's. `Bytes`: the task vector in int8 with a scale per row. Neither knows models or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from merge3 import kernels
from merge3.kernels import CHUNK, Modes, call, numbers
from merge3.packed import bits_of

_BLOCK = 4 * CHUNK  # elements looked at at once, so that packing takes little memory beside the result
_NONE = torch.empty(0, dtype=torch.int32)


class Loss(NamedTuple):
    """Of tensors together: how many elements, how many of them kept, ‖τ‖², and ‖e' − e‖² of what stands for them."""

    elements: int = 0
    kept: int = 0
    squared: float = 0.0
    lost: float = 0.0

    def plus(self, other: Loss) -> Loss:
        """Of both."""
        return Loss(*(a + b for a, b in zip(self, other)))


@dataclass(frozen=True)
class Kept:
    """mask: int32 words, the lowest bit of a word first; values: those of the expert where a bit is set, in order;
    starts: int64 CPU, how many come before each CHUNK elements, and in all."""

    mask: torch.Tensor
    values: torch.Tensor
    starts: torch.Tensor

    @property
    def nbytes(self) -> int:
        """That it takes."""
        return sum(t.numel() * t.element_size() for t in (self.mask, self.values, self.starts))

    def to(self, device: torch.device) -> Kept:
        """On a device."""
        return Kept(self.mask.to(device), self.values.to(device), self.starts)

    def expand(self, base: torch.Tensor, begin: int) -> torch.Tensor:
        """Elements of the expert, from `begin` on. base: the same elements of the base, flat; it stays as it is."""
        first, end = begin // CHUNK * CHUNK, begin + base.numel()
        bits = bits_of(self.mask[first // 32 : -(-end // 32)], end - first)
        at = int(self.starts[first // CHUNK])
        if begin > first:
            at += int(bits[: begin - first].sum())
            bits = bits[begin - first :]
        return base.clone().masked_scatter_(bits, self.values[at:])

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """values, mask and side of the kernel."""
        return self.values, self.mask, self.starts


@dataclass(frozen=True)
class Bytes:
    """values: int8 [rows, columns], τ in units of its row's scale; scales: float32 [rows]."""

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def nbytes(self) -> int:
        """That it takes."""
        return self.values.numel() + 4 * self.scales.numel()

    def to(self, device: torch.device) -> Bytes:
        """On a device."""
        return Bytes(self.values.to(device), self.scales.to(device))

    def expand(self, base: torch.Tensor, begin: int) -> torch.Tensor:
        """See Kept: base + scale · byte, in float32, rounded once."""
        columns, flat, found = self.values.shape[1], self.values.view(-1), torch.empty_like(base)
        for at in range(0, base.numel(), _BLOCK):
            here = slice(begin + at, begin + min(at + _BLOCK, base.numel()))
            row = here.start // columns
            scales = self.scales[row : -(-here.stop // columns)].repeat_interleave(columns)
            scales = scales[here.start - row * columns :][: here.stop - here.start]
            part = slice(at, at + len(scales))
            found[part] = base[part].float() + scales * flat[here].float()
        return found

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """values, mask and side of the kernel."""
        return self.values, _NONE, self.scales


def kept_of(numel: int, density: float) -> int:
    """How many elements of a tensor are kept at most, at least one."""
    return min(numel, max(1, round(density * numel)))


def kept_bytes(shape: Sequence[int], dtype: torch.dtype, density: float) -> int:
    """What `pack_kept` takes at most."""
    numel = math.prod(shape)
    return 4 * -(-numel // 32) + dtype.itemsize * kept_of(numel, density) + 8 * (-(-numel // CHUNK) + 1)


def int8_bytes(shape: Sequence[int]) -> int:
    """What `pack_bytes` takes."""
    return math.prod(shape) + 4 * math.prod(shape[:-1])


def pack_kept(base: torch.Tensor, expert: torch.Tensor, density: float) -> tuple[Kept, Loss]:
    """The largest |τ| of a tensor, as many as `kept_of`; of equally large ones those that come first. Where no more
    elements than that differ, all that do are kept, and nothing is lost.

    base, expert: of one dtype, on the CPU. The loss is not finite where τ is not.
    """
    numel, cap = expert.numel(), kept_of(expert.numel(), density)
    found = kernels.order_statistics([base], [expert], torch.tensor([[cap]]))
    least, left, few = float(found.value), 0, False
    if int(found.nonzero) <= cap:
        differing = sum(int(_differ(b, e).sum()) for b, e in _blocks(base, expert))
        few = differing <= cap  # else zeros of another sign are too many, and the base's stand for them
        count, least = (differing if few else int(found.nonzero)), 0.0
    else:
        count, left = cap, cap - int(found.greater)
    mask, values = torch.zeros(4 * -(-numel // 32), dtype=torch.uint8), torch.empty(count, dtype=expert.dtype)
    starts, at, loss = [0], 0, Loss()
    for place, (b, e) in enumerate(_blocks(base, expert)):
        tau = (e.float() - b.float()).abs_()
        keep = _differ(b, e) if few else tau > least
        if left:
            equal = (tau == least).nonzero()[:left, 0]
            keep[equal] = True
            left -= len(equal)
        bits = torch.from_numpy(np.packbits(keep.numpy(), bitorder="little"))
        mask[place * _BLOCK // 8 :][: len(bits)] = bits
        starts += [starts[-1] + n for n in accumulate(int(part.sum()) for part in keep.split(CHUNK))]
        values[at : starts[-1]] = e[keep]
        wide = tau.double()
        squared = float(wide @ wide)
        wide.masked_fill_(keep, 0.0)
        loss = loss.plus(Loss(len(tau), starts[-1] - at, squared, float(wide @ wide)))
        at = starts[-1]
    return Kept(mask.view(torch.int32), values, torch.tensor(starts)), loss


def pack_bytes(base: torch.Tensor, expert: torch.Tensor) -> tuple[Bytes, Loss]:
    """Every row's τ in 255 steps from −max |τ| to max |τ|. base, expert: of one dtype, on the CPU, of two dimensions or
    more. The loss is not finite where τ is not."""
    columns = expert.shape[-1]
    rows = expert.numel() // columns if columns else 0
    bases, experts = base.reshape(rows, columns), expert.reshape(rows, columns)
    values, scales, loss = torch.empty((rows, columns), dtype=torch.int8), torch.empty(rows), Loss()
    for at in range(0, rows, step := max(1, _BLOCK // max(1, columns))):
        here = slice(at, at + step)
        b, e = bases[here], experts[here]
        tau = e.float() - b.float()
        scales[here] = scale = tau.abs().amax(1) / 127
        values[here] = (tau / scale.where(scale > 0, 1.0)[:, None]).nan_to_num_(0.0).round_().clamp_(-127, 127)
        expanded = Bytes(values[here], scale).expand(b.reshape(-1), 0)
        lost = (expanded.float() - e.reshape(-1).float()).double().square_()
        loss = loss.plus(Loss(b.numel(), b.numel(), float(tau.double().square_().sum()), float(lost.sum())))
    return Bytes(values, scales), loss


def merge_compact_(
    out: Sequence[torch.Tensor],
    base: Sequence[torch.Tensor],
    experts: Sequence[torch.Tensor],
    compact: Sequence[Kept | Bytes | None],
    coefficients: torch.Tensor,
    lambda_: torch.Tensor,
    modes: Modes = Modes(),
    ids: torch.Tensor | None = None,
    rank_tables: Sequence[torch.Tensor] = (),
) -> None:
    """`kernels.merge_` of the expanded experts, bit for bit, which are expanded in cache. On the CPU alone.

    compact: T·K, expert fastest; None: the expert is the tensor in `experts`, where else the base's stands that it
    differs from. The others are as of `kernels.merge_`. Moves 2 · itemsize bytes per element for base and out, and what
    the compacted experts take. Raises BadInput as `kernels.merge_`; Unavailable on other devices.
    """
    ids = torch.arange(len(out)) if ids is None else ids
    held = [(_NONE, _NONE, _NONE) if one is None else one.arguments() for one in compact]
    values, masks, sides = map(list, zip(*held)) if held else ([], [], [])
    sparsify, elect, seed = numbers(modes)
    tensors = list(out), list(base), list(experts), values, masks, sides
    how = list(rank_tables), sparsify, elect, modes.normalize, seed
    call(torch.ops.merge3.merge_compact_, *tensors, coefficients, lambda_, ids, *how)


def _differ(base: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """Where they have other bits: zeros of another sign too."""
    bits = torch.int32 if expert.element_size() == 4 else torch.int16
    return base.view(bits) != expert.view(bits)


def _blocks(base: torch.Tensor, expert: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(base.reshape(-1).split(_BLOCK), expert.reshape(-1).split(_BLOCK))


torch.library.register_fake("merge3::merge_compact_", lambda *arguments: None)
