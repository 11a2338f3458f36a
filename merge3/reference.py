"""The oracle: what each kernel computes, in plain torch, one readable line per step.

Slow, memory hungry and exact: `dtype=torch.float64` for tests, torch.float32 for timing the eager
baseline. Nothing in the product imports it; a missing kernel is an error, not a slow path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from merge3 import compact, differentiable, kernels
from merge3.kernels import DENSITY, EPSILON, HI, HI_SHARE, LO, LO_SHARE, RANK_BINS, RESCALE, WEIGHT, Modes

_WORD = 0xFFFFFFFF


def merge_ref(
    base: Sequence[torch.Tensor],
    experts: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    lambda_: torch.Tensor,
    modes: Modes = Modes(),
    ids: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[torch.Tensor]:
    """The fused merge, unrounded; arguments as kernels.merge_."""
    tensors, k, _ = coefficients.shape
    results = []
    for t in range(tensors):
        theta = base[t].to(dtype) if base else torch.zeros_like(experts[t * k], dtype=dtype)
        name = int(ids[t]) if ids is not None else t
        contributions, weights = [], []
        for j in range(k):
            c = coefficients[t, j]
            # The kernels subtract in float32; a threshold must see that same task vector.
            tau = (experts[t * k + j].float() - (base[t].float() if base else 0.0)).to(dtype)
            keep = keep_mask(tau, c, modes, name, j)
            contributions.append(torch.where(keep, tau * (c[WEIGHT] * c[RESCALE]).to(dtype), 0.0))
            weights.append(c[WEIGHT].to(dtype))
        stacked, w = torch.stack(contributions), torch.stack(weights).reshape(-1, *[1] * theta.dim())
        if modes.elect == "none":
            total, divisor = stacked.sum(0), w.sum(0)
            if base:
                divisor = torch.where(divisor.abs() < 1e-8, 1.0, divisor)
        else:
            votes = stacked if modes.elect == "sum" else stacked.sign()
            elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0).to(dtype)
            agrees = stacked.sign() == elected
            total, divisor = (stacked * agrees).sum(0), (w * agrees).sum(0)
            divisor = torch.where(divisor == 0, 1.0, divisor)
        merged = total / divisor if modes.normalize else total
        results.append(theta + lambda_[t].to(dtype) * merged)
    return results


def merged_backward_ref(
    gradients: Sequence[torch.Tensor],
    base,
    experts,
    coefficients: torch.Tensor,
    lambda_: torch.Tensor,
    modes: Modes = Modes(),
    ids=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of Σ <gradient, merged> with respect to coefficients (weight and rescale) and λ, by autograd."""
    weight, rescale, lam = (
        x.detach().double().requires_grad_() for x in (coefficients[..., WEIGHT], coefficients[..., RESCALE], lambda_)
    )
    columns = list(coefficients.double().unbind(-1))
    columns[WEIGHT], columns[RESCALE] = weight, rescale
    out = merge_ref(base, experts, torch.stack(columns, -1), lam, modes, ids)
    sum((g.double() * o).sum() for g, o in zip(gradients, out)).backward()
    result = torch.zeros_like(coefficients, dtype=torch.float64)
    result[..., WEIGHT], result[..., RESCALE] = weight.grad, 0.0 if rescale.grad is None else rescale.grad
    return result, lam.grad


def keep_mask(tau: torch.Tensor, c: torch.Tensor, modes: Modes, tensor: int, expert: int) -> torch.Tensor:
    """Which elements of one task vector survive: bool, shape of tau. c: one coefficient row."""
    magnitude = tau.abs()
    if modes.sparsify == "all":
        return torch.ones_like(tau, dtype=torch.bool)
    if modes.sparsify in ("magnitude", "band"):
        position = tie_position(tau.numel(), tensor).reshape(tau.shape)
        keep = (magnitude > c[LO]) | ((magnitude == c[LO]) & (position < c[LO_SHARE].double()))
        if modes.sparsify == "band":
            keep &= (magnitude < c[HI]) | ((magnitude == c[HI]) & (position < c[HI_SHARE].double()))
        return keep
    bits = random_bits(tau.numel(), tensor, expert, modes.seed).reshape(tau.shape)
    if modes.sparsify == "random":
        return bits < int(c[DENSITY] * 65536 + 0.5)
    rows = magnitude.reshape(-1, tau.shape[-1] if tau.dim() >= 2 else max(1, tau.numel()))
    probability = c[DENSITY] - c[EPSILON] + 2 * c[EPSILON] * binned_ranks(rows).reshape(tau.shape)
    return bits < probability * 65536


def tie_position(numel: int, tensor: int) -> torch.Tensor:
    """Where in [0, 1) each element's tie hash lies (a Weyl sequence over its index): float64 [numel]."""
    element = torch.arange(numel)
    hashes = (element % 128 * 0x9E3779B1 + element // 65536 * 0xC2B2AE35 + tensor * 0x85EBCA6B) & _WORD
    # The kernels compare the hash as a signed number, whose order starts at 2^31.
    return ((hashes + 2**31) & _WORD).double() / 2**32


def random_bits(numel: int, tensor: int, expert: int, seed: int) -> torch.Tensor:
    """Sixteen random bits per element, int64 [numel]: two bytes, from two Philox4x32-7 blocks per 16 elements.

    Of elements 16 i .. 16 i + 15 the even ones have the bytes of words 0 and 1 in turn, the odd ones of words 2 and 3.
    """
    blocks = torch.arange((numel + 15) // 16)
    upper, lower = (philox(blocks & _WORD, blocks >> 32 | which, tensor, expert, seed) for which in (0, 0x80000000))
    shifts = torch.tensor([0, 8, 16, 24])
    bytes_of = lambda words: (
        (words[..., None] >> shifts & 0xFF).reshape(-1, 2, 8).transpose(1, 2)
    )  # [blocks, 8, parity]
    return (bytes_of(upper) << 8 | bytes_of(lower)).reshape(-1)[:numel]


def philox(low: torch.Tensor, high: torch.Tensor, tensor: int, expert: int, seed: int) -> torch.Tensor:
    """Philox4x32-7 of counters (low, high, tensor, expert), int64 [n] each: four words, int64 [n, 4]."""
    c = [low, high, torch.full_like(low, tensor), torch.full_like(low, expert)]
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(7):
        hi0, lo0 = _multiply_wide(c[0], 0xD2511F53)
        hi1, lo1 = _multiply_wide(c[2], 0xCD9E8D57)
        c = [hi1 ^ c[1] ^ k0, lo1, hi0 ^ c[3] ^ k1, lo0]
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack(c, dim=1)


def _multiply_wide(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = (a & 0xFFFF) * b, (a >> 16) * b  # each below 2^48: no overflow in int64
    carry = (low >> 16) + high
    return carry >> 16, ((carry & 0xFFFF) << 16) | (low & 0xFFFF)


def binned_ranks(magnitude: torch.Tensor) -> torch.Tensor:
    """Rank of each element in its row (0..1), float64 [rows, columns]: the middle of one of RANK_BINS bins.

    A bin begins at position columns · bin // RANK_BINS of the sorted row; equal elements stand at their middle one.
    """
    rows, columns = magnitude.shape
    ordered = magnitude.sort(dim=1).values.contiguous()
    first = torch.searchsorted(ordered, magnitude.contiguous())
    equal = torch.searchsorted(ordered, magnitude.contiguous(), right=True) - first
    starts = torch.tensor([columns * bin // RANK_BINS for bin in range(1, RANK_BINS)])
    bins = torch.searchsorted(starts, first + (equal - 1) // 2, right=True)
    return (bins.double() + 0.5) / RANK_BINS


def elementwise_ref(
    base: Sequence[torch.Tensor],
    experts: Sequence[torch.Tensor],
    rule: str,
    scalars: torch.Tensor,
    per_expert: torch.Tensor,
    rows: Sequence[torch.Tensor] = (),
    dtype: torch.dtype = torch.float64,
) -> list[torch.Tensor]:
    """The rules of kernels.elementwise_, unrounded."""
    k = len(experts) // len(base)
    results = []
    for t, tensor in enumerate(base):
        theta = tensor.to(dtype)
        tau = torch.stack([experts[t * k + j].to(dtype) - theta for j in range(k)])
        s, w = scalars[t].to(dtype), per_expert[t].to(dtype).reshape(-1, *[1] * theta.dim())
        if rule == "nearswap":
            move = (s / tau[0].abs().clamp(min=1e-6)).clamp(0, 1)
            merged = move * experts[t].to(dtype) + (1 - move) * theta
        elif rule == "arcee_fusion":
            spread = rows[t].to(dtype).reshape(*theta.shape[:-1], 1) if theta.dim() >= 2 else rows[t].to(dtype)
            merged = torch.where(tau[0].abs() * spread >= s, theta + tau[0], theta)
        elif rule == "ram":
            active = tau.abs() > s
            count = active.sum(0)
            own = (tau * active * w).sum(0)
            shared = (tau * active).sum(0) / count.clamp(min=1)
            merged = theta + torch.where(count == 1, own, torch.where(count > 1, shared, 0.0))
        elif rule == "unify":
            sign = torch.where(tau.sum(0) > 0, 1.0, -1.0).to(dtype)  # a sum of 0 elects -, as the authors have it
            merged = theta + sign * (tau * sign).clamp(min=0).amax(0)
        else:
            selected = tau.var(0, unbiased=False) >= s
            elected = torch.where(tau.sum(0) >= 0, 1.0, -1.0).to(dtype)
            agrees = tau.sign() == elected
            sce = (tau * w * agrees).sum(0) / (w * agrees).sum(0).clamp(min=1e-6)
            merged = theta + torch.where(selected, sce, 0.0)
        results.append(merged)
    return results


def gram_ref(base: Sequence[torch.Tensor], experts: Sequence[torch.Tensor], tensors: int) -> torch.Tensor:
    """Inner products of [θ, τ_1, .., τ_K]: float64 [T, K+1, K+1]."""
    k = len(experts) // tensors
    grams = []
    for t in range(tensors):
        theta = base[t].double().flatten() if base else torch.zeros(experts[t * k].numel(), dtype=torch.float64)
        vectors = torch.stack([theta, *(experts[t * k + j].double().flatten() - theta for j in range(k))])
        grams.append(vectors @ vectors.T)
    return torch.stack(grams)


def order_statistics_ref(
    base: Sequence[torch.Tensor], experts: Sequence[torch.Tensor], ranks: torch.Tensor, statistic: str = "magnitude"
) -> list[list[dict]]:
    """Per tensor and expert: value, greater, equal, l1_greater per rank (lists), total and nonzero."""
    tensors, k = ranks.shape[0], len(experts) // ranks.shape[0]
    results = []
    for t in range(tensors):
        theta = base[t].float().flatten() if base else 0.0
        tau = torch.stack([experts[t * k + j].float().flatten() - theta for j in range(k)])
        series = tau.abs() if statistic == "magnitude" else tau.var(0, unbiased=False)[None]
        row = []
        for x in series:
            ordered = x.sort(descending=True).values
            values = [ordered[min(r, x.numel()) - 1] if r else torch.tensor(float("inf")) for r in ranks[t].tolist()]
            row.append(
                {
                    "value": [float(v) for v in values],
                    "greater": [int((x > v).sum()) for v in values],
                    "equal": [int((x == v).sum()) for v in values],
                    "l1_greater": [float(x.double()[x > v].sum()) for v in values],
                    "total": float(x.double().sum()),
                    "nonzero": int((x != 0).sum()),
                }
            )
        results.append(row)
    return results


def pack_ref(base, experts, tensors: int, unified=()) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Bits as bool tensors in the shape of the experts, and the sums of kernels.pack."""
    k = len(experts) // tensors
    bits, sums = [], torch.zeros(tensors, k, 2, dtype=torch.float64)
    for i, expert in enumerate(experts):
        tau = expert.float() - base[i // k].float()
        other = unified[i // k].float() - base[i // k].float() if unified else None
        bits.append(tau >= 0 if other is None else (tau.sign() * other.sign()) > 0)
        sums[i // k, i % k, 0] = tau.abs().double().sum()
        sums[i // k, i % k, 1] = bits[-1].sum() if other is None else other.abs().double()[bits[-1]].sum()
    return bits, sums


def rank_tables_ref(magnitude: torch.Tensor) -> torch.Tensor:
    """Ranks a rank table assigns to a row's elements; see binned_ranks. magnitude: [rows, columns]."""
    return binned_ranks(magnitude)


class Op(NamedTuple):
    """An operator's Python face and its oracle."""

    kernel: Callable
    reference: Callable


# Every operator that PyTorch lists under merge3:: has its oracle here (a test compares the names).
OPS = {
    "merge_": Op(kernels.merge_, merge_ref),
    "prepare_": Op(kernels.Prepared, merge_ref),
    "merge_prepared_": Op(kernels.Prepared.launch, merge_ref),
    "merged": Op(differentiable.merged, merge_ref),
    "merged_backward": Op(differentiable._backward, merged_backward_ref),
    "merge_backward_": Op(differentiable._backward, merged_backward_ref),
    "elementwise_": Op(kernels.elementwise_, elementwise_ref),
    "gram_": Op(kernels.gram, gram_ref),
    "order_statistics_": Op(kernels.order_statistics, order_statistics_ref),
    "pack_": Op(kernels.pack, pack_ref),
    "merge_compact_": Op(compact.merge_compact_, merge_ref),
    "rank_tables_": Op(kernels.rank_tables, rank_tables_ref),
}
