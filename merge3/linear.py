"""A linear layer whose weight is a merge never written as a whole: for scoring a candidate once, without a slot.

On a GPU, for 16-bit weights, one kernel merges tiles in shared memory and feeds them to the tensor cores. Elsewhere a
tile of rows is merged into memory the size of a cache and multiplied by PyTorch, tile after tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch

from merge3 import kernels
from merge3.errors import BadInput
from merge3.kernels import CHUNK, PACKED, Modes

TILE = 1 << 21  # elements of a merged tile: a few MB


def merged_linear(
    x: torch.Tensor,
    base: torch.Tensor | None,
    experts: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    lambda_: float = 1.0,
    modes: Modes = Modes(),
    tensor_id: int = 0,
    rank_tables: Sequence[torch.Tensor] = (),
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x · merge(base, experts)ᵀ + bias. x: [.., in]; base, experts: [out, in]; coefficients: float32 CPU [K, FIELDS].

    The merged weight is rounded to the dtype of base and experts, as a swap would; what is added up is float32 on
    the GPU, PyTorch's own choice elsewhere. rank_tables: K, for `ranked`.
    """
    if not experts or experts[0].dim() != 2:
        raise BadInput(
            "experts",
            "none" if not experts else f"experts[0] of shape {list(experts[0].shape)}",
            "1 to 8 of shape [out, in]",
        )
    weight = experts[0]
    if x.shape[-1:] != weight.shape[1:] or x.dtype != weight.dtype or x.device != weight.device:
        raise BadInput(
            "x",
            f"[.., {x.shape[-1] if x.dim() else ''}] {x.dtype} on {x.device}",
            f"[.., {weight.shape[1]}] {weight.dtype} on {weight.device}, as the weights",
        )
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty(flat.shape[0], weight.shape[0], dtype=weight.dtype, device=weight.device)
    c, lam, ids = coefficients[None].contiguous(), torch.tensor([lambda_]), torch.tensor([tensor_id])
    bases = [] if base is None else [base]
    if weight.is_cuda and weight.dtype != torch.float32 and modes.sparsify not in PACKED:
        sparsify, elect, seed = kernels.numbers(modes)
        kernels.call(
            torch.ops.merge3.merged_linear_,
            y,
            flat,
            bases,
            list(experts),
            [] if bias is None else [bias],
            c,
            lam,
            ids,
            list(rank_tables),
            sparsify,
            elect,
            modes.normalize,
            seed,
        )
    else:
        rows, columns = weight.shape
        # Slices of a tensor start at whole chunks.
        step = CHUNK // gcd(columns, CHUNK)
        step *= max(1, TILE // (step * columns))
        tile = torch.empty(min(step, rows), columns, dtype=weight.dtype, device=weight.device)
        for first in range(0, rows, step):
            here = slice(first, min(first + step, rows))
            out = tile[: here.stop - first]
            kernels.merge_(
                [out],
                [b[here] for b in bases],
                [e[here] for e in experts],
                c,
                lam,
                modes,
                ids,
                rank_tables,
                torch.tensor([first * columns]),
                torch.tensor([columns]),
            )
            torch.mm(flat, out.T, out=y[:, here])
        if bias is not None:
            y += bias
    return y.reshape(*x.shape[:-1], -1)
