"""How a pool holds its experts: as they are, or compacted, so that more of them fit beside one base.

Compacted are floating-point tensors of two dimensions or more that the base has in the same shape. All others are held
as they are: vectors, which take next to nothing, buffers, heads that stay with their endpoint, tensors of other shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from merge3.checkpoint import Checkpoint
from merge3.checkpoint.layout import Ref
from merge3.compact import Bytes, Kept, Loss, int8_bytes, kept_bytes, pack_bytes, pack_kept
from merge3.errors import BadInput, CheckpointError

DENSITY = 0.1  # of `residual` without a number


@dataclass(frozen=True)
class Experts:
    """kind: full, residual or int8; density: of residual, the share of each tensor's elements that is kept."""

    kind: str = "full"
    density: float = 1.0

    @staticmethod
    def parse(text: str | Experts, where: str = "experts") -> Experts:
        """full, int8, residual, or residual:0.1. Raises BadInput. where: names the option in the message."""
        if isinstance(text, Experts):
            return text
        kind, colon, number = str(text).partition(":")
        if kind in ("full", "int8") and not colon:
            return Experts(kind)
        if kind == "residual":
            try:
                density = float(number) if colon else DENSITY
            except ValueError:
                density = math.nan
            if 0 < density <= 1:
                return Experts(kind, density)
        expected = "full, int8, residual, or residual:DENSITY with a density above 0 and at most 1"
        raise BadInput(where, f"found {str(text)[:60]!r}", expected)

    def __str__(self) -> str:
        if self.kind != "residual":
            return self.kind
        short = f"{self.density:g}"
        return f"{self.kind}:{short if float(short) == self.density else repr(self.density)}"

    def __bool__(self) -> bool:
        """Whether anything is compacted."""
        return self.kind != "full"

    def size(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes that a tensor takes at most."""
        return kept_bytes(shape, dtype, self.density) if self.kind == "residual" else int8_bytes(shape)

    def pack(self, base: torch.Tensor, expert: torch.Tensor) -> tuple[Kept | Bytes, Loss]:
        """A tensor, and what is lost of it."""
        return pack_kept(base, expert, self.density) if self.kind == "residual" else pack_bytes(base, expert)


class ExpertLoss(NamedTuple):
    """What is lost of an expert. kept: share of the parameters of its compacted tensors; energy: of their ‖τ‖², what is
    left; error: ‖e' − e‖ / ‖τ‖."""

    model: str
    kept: float
    energy: float
    error: float

    def describe(self, experts: str) -> str:
        """One line."""
        if self.error == 0:
            return f"{self.model} as {experts}: nothing is lost, {100 * self.kept:.3g} % of its parameters differ"
        what = f"{100 * self.kept:.3g} % of parameters kept, " if self.kept < 1 else ""
        return (
            f"{self.model} as {experts}: {what}{100 * self.energy:.4g} % of its task vector's squared norm, relative "
            f"error {self.error:.3g}; searched and measured so, exported from the full checkpoint"
        )


FULL = Experts()


class Source(Protocol):
    """Whose experts they are; see Pool."""

    device: torch.device
    endpoints: dict[str, Checkpoint]
    fixed: dict[str, str]
    heads: dict[str, list[str]]
    left_out: dict[Ref, str]

    def has(self, ref: Ref) -> bool:
        """See Pool."""

    def shape(self, ref: Ref) -> tuple[int, ...]:
        """See Pool."""

    def common_dtype(self, ref: Ref) -> torch.dtype:
        """See Pool."""

    def staged(self, ref: Ref) -> torch.Tensor:
        """See Pool."""

    def part(self, ref: Ref, begin: int, end: int) -> torch.Tensor:
        """See Pool."""


class Compacted:
    """The compacted experts of one source. sizes: of every tensor that is compacted, the most that it takes, known
    before anything is read; aliases: tied outputs -> the tensor of `sizes` that they share; losses: of every expert,
    once they are packed."""

    def __init__(self, source: Source, experts: Experts, stored_as: Callable[[Ref], str | None]):
        """stored_as: the name that a tensor is stored by, its own or that of the one it shares."""
        self.source, self.experts = source, experts
        self.sizes: dict[Ref, int] = dict(self._find()) if experts else {}
        self.aliases: dict[Ref, Ref] = dict(self._find_aliases(stored_as)) if experts else {}
        self.losses: list[ExpertLoss] = []
        self._held: dict[Ref, Kept | Bytes] = {}

    def __contains__(self, ref: Ref) -> bool:
        whole = ref.whole
        return whole in self.sizes or whole in self.aliases

    def of(self, ref: Ref) -> tuple[Kept | Bytes, Ref]:
        """(what stands for a tensor, the base's that it differs from)"""
        ref = self.aliases.get(ref.whole, ref.whole)
        return self._held[ref], self._base(ref)

    def get(self, ref: Ref) -> torch.Tensor:
        """A tensor, expanded, on the source's device."""
        held, base = self.of(ref)
        tensor = held.expand(self.source.staged(base).to(self.source.device).reshape(-1), 0)
        tensor = tensor.reshape(self.source.shape(ref.whole)).to(self.source.common_dtype(ref))
        return tensor if ref.rows is None else tensor[slice(*ref.rows)]

    def part(self, ref: Ref, begin: int, end: int) -> torch.Tensor:
        """Elements [begin, end) of it, flat."""
        if ref.rows is not None:
            return self.get(ref).reshape(-1)[begin:end]
        held, base = self.of(ref)
        near = self.source.part(base, begin, end).to(self.source.device, non_blocking=True)
        return held.expand(near, begin).to(self.source.common_dtype(ref))

    def pack(self) -> list[str]:
        """Read every expert once and keep what stands for it. Returns what is lost, a line for each expert. Raises
        CheckpointError where a tensor is not finite."""
        losses: dict[str, Loss] = {}
        for ref in self.sizes:
            checkpoint, base = self.source.endpoints[ref.model], self._base(ref)
            dtype = self.source.common_dtype(ref)
            near = self.source.staged(base).cpu().to(dtype)
            held, loss = self.experts.pack(near, checkpoint.get(ref.tensor).to(dtype))
            if not math.isfinite(loss.squared):
                model = ref.model if near.isfinite().all() else base.model
                raise CheckpointError(model, f"NaN or infinity in tensor {ref.tensor!r}", "finite weights")
            self._held[ref] = held.to(self.source.device)
            losses[ref.model] = losses.get(ref.model, Loss()).plus(loss)
            checkpoint.release(ref.tensor)
        for model, loss in losses.items():
            share = loss.lost / loss.squared if loss.squared else 0.0
            self.losses.append(ExpertLoss(model, loss.kept / max(1, loss.elements), 1 - share, share**0.5))
        return [loss.describe(str(self.experts)) for loss in self.losses]

    def _base(self, ref: Ref) -> Ref:
        return Ref(next(iter(self.source.endpoints)), ref.tensor)

    def _find(self) -> Iterator[tuple[Ref, int]]:
        source = self.source
        base, *models = source.endpoints
        if not models:
            expected = "models beside the base, which are held as what they differ from it by"
            raise BadInput("experts", f"{self.experts} of {base} alone", expected)
        for model in models:
            for name, info in source.endpoints[model].tensors.items():
                ref, own = Ref(model, name), Ref(base, name)
                if len(info.shape) < 2 or not math.prod(info.shape) or not info.dtype.is_floating_point:
                    continue
                if name in source.fixed or name in source.heads.get(model, ()) or ref in source.left_out:
                    continue
                if source.has(own) and source.shape(own) == info.shape:
                    yield ref, self.experts.size(info.shape, source.common_dtype(ref))

    def _find_aliases(self, stored_as: Callable[[Ref], str | None]) -> Iterator[tuple[Ref, Ref]]:
        names = {name for checkpoint in self.source.endpoints.values() for name in checkpoint.tensors}
        for model in dict.fromkeys(ref.model for ref in self.sizes):
            for name in sorted(names):
                stored = stored_as(Ref(model, name))
                if stored is not None and stored != name and Ref(model, stored) in self.sizes:
                    yield Ref(model, name), Ref(model, stored)
