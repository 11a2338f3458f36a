"""Task vectors of one bit per element, and models that differ from a unified one by a mask.

Sixteen or thirty-two times smaller than the experts they stand for, so that many fit beside one base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from merge3 import kernels
from merge3.kernels import RESCALE, WEIGHT, Modes


@dataclass(frozen=True)
class Signs:
    """BitDelta (Liu et al. 2024, eq. 1 to 4): τ_k ≈ scale_k · sign(τ_k), with scale the mean |τ_k| of the tensor, the
    best one in the L2 sense. masks: T·K int32 words; scales: float64 [T, K]."""

    masks: list[torch.Tensor]
    scales: torch.Tensor

    def merge_(
        self, out, base, weights: torch.Tensor, lambda_: torch.Tensor | None = None, modes: Modes = Modes("signs")
    ) -> None:
        """Write base + λ · elected sum of weight_k · τ_k into `out`; nothing but base and bits is read.

        weights: [T, K] or [K].
        """
        _merge(out, base, [], weights, self.scales, lambda_, modes, self.masks)


@dataclass(frozen=True)
class Unified:
    """EMR-Merging (Huang et al. 2024, Section 3): one unified model, and per expert a mask and a rescaler that
    turn it into something near that expert. unified: T tensors; masks: T·K int32 words; rescales: float64 [T, K]."""

    unified: list[torch.Tensor]
    masks: list[torch.Tensor]
    rescales: torch.Tensor

    def swap_(self, out, base, expert: int) -> None:
        """Write base + rescale_k · mask_k · τ_unified into `out`: the model for expert k's task."""
        masks = self.masks[expert :: self.rescales.shape[1]]
        _merge(
            out, base, self.unified, torch.ones(1), self.rescales[:, expert : expert + 1], None, Modes("mask"), masks
        )


def pack_signs(base: Sequence[torch.Tensor], experts: Sequence[torch.Tensor]) -> Signs:
    """base: T tensors; experts: T·K, expert fastest."""
    masks, sums = kernels.pack(base, experts, len(base))
    numel = torch.tensor([max(1, b.numel()) for b in base], dtype=torch.float64)
    return Signs(masks, sums[..., 0] / numel[:, None])


def unify(base: Sequence[torch.Tensor], experts: Sequence[torch.Tensor]) -> Unified:
    """Elect, mask and rescale: σ = sign(Σ τ_k), τ_unified = σ · max |τ_k| among those with that sign,
    mask_k = [τ_k · τ_unified > 0], rescale_k = Σ|τ_k| / Σ|mask_k · τ_unified|.

    The unified model has the base's dtype, which rounds it.
    """
    unified = [torch.empty_like(b) for b in base]
    kernels.elementwise_(unified, base, experts, "unify", torch.zeros(len(base)))
    masks, sums = kernels.pack(base, experts, len(base), unified)
    return Unified(unified, masks, sums[..., 0] / sums[..., 1].where(sums[..., 1] > 0, 1.0))


def words_of(bits: torch.Tensor) -> torch.Tensor:
    """Of bool [numel]: int32 [ceil(numel / 32)], the lowest bit of a word first."""
    padded = torch.nn.functional.pad(bits.flatten(), (0, -bits.numel() % 32)).view(-1, 32).long()
    words = (padded << torch.arange(32, device=bits.device)).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def bits_of(words: torch.Tensor, numel: int) -> torch.Tensor:
    """The inverse: bool [numel]."""
    bytes_ = words.contiguous().view(torch.uint8)  # little-endian, as every machine torch runs on
    if words.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bytes_.numpy(), count=numel, bitorder="little")).view(torch.bool)
    places = torch.arange(8, dtype=torch.uint8, device=words.device)
    return ((bytes_[:, None] >> places) & 1).bool().flatten()[:numel]


def _merge(out, base, experts, weights, rescales, lambda_, modes: Modes, masks) -> None:
    c = kernels.coefficients(len(out), rescales.shape[1])
    c[..., WEIGHT], c[..., RESCALE] = weights, rescales
    kernels.merge_(out, base, experts, c, torch.ones(len(out)) if lambda_ is None else lambda_, modes, None, masks)
