"""The fused merge as a function that autograd differentiates: what learned merge coefficients need.

`merged` allocates its results and gives gradients with respect to every expert's weight and rescale and every
tensor's lambda. What is kept and the elected signs count as constants: they change on a set of measure zero.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from merge3 import kernels
from merge3.errors import BadInput
from merge3.kernels import RESCALE, WEIGHT, Modes


def merged(
    base: Sequence[torch.Tensor],
    experts: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    lambda_: torch.Tensor,
    modes: Modes = Modes(),
    ids: torch.Tensor | None = None,
    rank_tables: Sequence[torch.Tensor] = (),
) -> list[torch.Tensor]:
    """The merged tensors, in the shape, dtype and device of the experts; arguments as for kernels.merge_.

    Gradients: dL/dw_k = λ Σ g m_k (rescale_k keep_k τ_k − S) / N, with S the merged task vector and N the sum of
    weights (without S and N where nothing is normalized); likewise rescale and λ. Summed in float64 (on a GPU: eight
    elements in float32, these sums in float64), in a fixed order.
    Raises BadInput where base or experts ask for a gradient: there is none for them.
    """
    for name, tensors in (("base", base), ("experts", experts)):
        for i, tensor in enumerate(tensors):
            if tensor.requires_grad:
                raise BadInput(f"{name}[{i}]", "requires a gradient", "only coefficients and lambda_ to be learned")
    if coefficients.dim() != 3 or len(experts) != lambda_.numel() * coefficients.shape[1]:
        raise BadInput(
            "coefficients",
            f"shape {list(coefficients.shape)} for {lambda_.numel()} tensors and {len(experts)} experts",
            "[tensors, experts of each, 8]",
        )
    ids = torch.arange(len(experts) // coefficients.shape[1]) if ids is None else ids
    sparsify, elect, seed = kernels.numbers(modes)
    how = list(rank_tables), sparsify, elect, modes.normalize, seed
    return kernels.call(_merged, list(base), list(experts), coefficients, lambda_, ids, *how)


def weight_gradient(gradient: torch.Tensor, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> torch.Tensor:
    """dL/dw_k = <dL/dθ, θ_k − θ₀> of a plain sum of weighted task vectors: float64 [experts], on the CPU.

    gradient: dL/dθ of one merged tensor; base, experts: that tensor's, all in one shape, dtype and device. Summed in
    float64, in a fixed order. Moves (K + 2) · numel · itemsize bytes.
    """
    found = torch.zeros(2 * len(experts) + 1, dtype=torch.float64)
    weight, rescale, lambda_gradient = found[: len(experts)], found[len(experts) : -1], found[-1:]
    how = _plain_sum(len(experts))
    outputs = weight, rescale, lambda_gradient, [gradient]
    kernels.call(torch.ops.merge3.merge_backward_, *outputs, [base], list(experts), *how)
    return weight


@functools.cache  # asked for every parameter in every step
def _plain_sum(experts: int) -> tuple:
    """What the kernel is told of one tensor whose weighted task vectors are added."""
    sparsify, elect, seed = kernels.numbers(Modes())
    coefficients, one = kernels.coefficients(1, experts), torch.zeros(1, dtype=torch.int64)
    return coefficients, torch.ones(1), one, [], sparsify, elect, False, seed


@torch.library.custom_op("merge3::merged", mutates_args=())
def _merged(
    base: Sequence[torch.Tensor],
    experts: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    lambda_: torch.Tensor,
    ids: torch.Tensor,
    rank_tables: Sequence[torch.Tensor],
    sparsify: int,
    elect: int,
    normalize: bool,
    seed: int,
) -> list[torch.Tensor]:
    out = [torch.empty_like(expert) for expert in experts[:: coefficients.shape[1]]]
    values = coefficients.detach(), lambda_.detach(), ids, kernels.NONE, kernels.NONE
    kernels.call(torch.ops.merge3.merge_, out, base, experts, *values, rank_tables, sparsify, elect, normalize, seed)
    return out


@_merged.register_fake
def _(base, experts, coefficients, lambda_, *_):
    return [torch.empty_like(expert) for expert in experts[:: coefficients.shape[1]]]


@torch.library.custom_op("merge3::merged_backward", mutates_args=())
def _backward(
    gradients: Sequence[torch.Tensor],
    base: Sequence[torch.Tensor],
    experts: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    lambda_: torch.Tensor,
    ids: torch.Tensor,
    rank_tables: Sequence[torch.Tensor],
    sparsify: int,
    elect: int,
    normalize: bool,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    tensors, count, _ = coefficients.shape
    weight, rescale = (torch.zeros(tensors, count, dtype=torch.float64) for _ in range(2))
    lambda_gradient = torch.zeros(tensors, dtype=torch.float64)
    kernels.call(
        torch.ops.merge3.merge_backward_,
        weight,
        rescale,
        lambda_gradient,
        [g.contiguous() for g in gradients],
        base,
        experts,
        coefficients.detach(),
        lambda_.detach(),
        ids,
        rank_tables,
        sparsify,
        elect,
        normalize,
        seed,
    )
    result = torch.zeros_like(coefficients)
    result[..., WEIGHT], result[..., RESCALE] = weight, rescale
    return result, lambda_gradient.to(lambda_.dtype)


@_backward.register_fake
def _(gradients, base, experts, coefficients, lambda_, *_):
    return torch.empty_like(coefficients), torch.empty_like(lambda_)


def _remember(ctx, inputs, output):
    ctx.arguments = inputs


def _differentiate(ctx, gradients):
    base, experts, coefficients, lambda_, ids, rank_tables, *modes = ctx.arguments
    found = _backward(gradients, base, experts, coefficients, lambda_, ids, rank_tables, *modes)
    return [None] * len(base), [None] * len(experts), *found, None, [None] * len(rank_tables), None, None, None, None


_merged.register_autograd(_differentiate, setup_context=_remember)
