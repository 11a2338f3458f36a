"""A linear layer over a merge that is not written: against swap and multiply."""

from functools import partial

import pytest
import torch

from merge3 import kernels
from merge3.errors import BadInput
from merge3.kernels import Modes
from merge3.linear import merged_linear
from merge3.reference import merged_linear_ref
from tests.kernels.test_merge import make_case, random_coefficients

SHAPES = [(1, 1, 1), (5, 33, 70), (130, 70, 40), (3, 140, 97)]  # rows of x, out, in
CASES = [
    ("all", "none", False),
    ("magnitude", "sum", True),
    ("band", "count", False),
    ("random", "sum", True),
    ("ranked", "none", False),
]


def case(shape, count, dtype):
    rows, out, depth = shape
    base, experts = make_case([(out, depth)], count, dtype, seed=count)
    c, lam = random_coefficients(1, count, seed=count)
    x = torch.randn(rows, depth, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x, base, experts, c, lam


def swapped(base, experts, c, lam, modes, tables):
    out = [torch.empty_like(base[0])]
    kernels.merge_(out, base, experts, c, lam, modes, torch.tensor([9]), tables)
    return out[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsify,elect,normalize", CASES)
def test_it_is_swap_and_multiply(sparsify, elect, normalize, dtype):
    for shape in SHAPES:
        x, base, experts, c, lam = case(shape, 3, dtype)
        modes = Modes(sparsify, elect, normalize, 7)
        tables = kernels.rank_tables(base, experts, 1)[0] if sparsify == "ranked" else []
        bias = torch.randn(shape[1]).to(dtype)
        found = merged_linear(x[None], base[0], experts, c[0], float(lam), modes, 9, tables, bias)[0]
        expected = torch.nn.functional.linear(x, swapped(base, experts, c, lam, modes, tables), bias)
        # One rounding of the product and one of the sum with the bias.
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
        if sparsify == "all":
            close = 16 * torch.finfo(dtype).eps * (1 + depth_noise(shape))
            exact = merged_linear_ref(x, base[0], experts, c[0], float(lam), modes, 9) + bias.double()
            assert (found.double() - exact).abs().max() < close


def depth_noise(shape):
    return 0.02 * shape[2] ** 0.5


def test_tiles_make_no_difference(monkeypatch):
    x, base, experts, c, lam = case((4, 1500, 256), 2, torch.bfloat16)
    whole = merged_linear(x, base[0], experts, c[0], float(lam), Modes("random", "sum"), 9)
    monkeypatch.setattr("merge3.linear.TILE", 1)  # 256 rows at a time, the fewest that slices allow
    assert torch.equal(merged_linear(x, base[0], experts, c[0], float(lam), Modes("random", "sum"), 9), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_fused_kernel(count, dtype):
    """csrc/cuda/linear.cu, where it was built: on a GPU, or emulated."""
    for (sparsify, elect, normalize), shape in zip(CASES, [*SHAPES[1:], SHAPES[0], SHAPES[1]]):
        x, base, experts, c, lam = case(shape, count, dtype)
        modes = Modes(sparsify, elect, normalize, 7)
        tables = kernels.rank_tables(base, experts, 1)[0] if sparsify == "ranked" else []
        bias, y = torch.randn(shape[1]).to(dtype), torch.empty(shape[0], shape[1], dtype=dtype)
        run = partial(fused, base, experts, bias, c, lam, tables, modes)
        try:
            run(y, x)
        except BadInput as error:
            assert "merged_linear needs a GPU" in str(error)
            pytest.skip("these tensors are the CPU's")
        expected = torch.nn.functional.linear(
            x.float(), swapped(base, experts, c, lam, modes, tables).float(), bias.float()
        )
        torch.testing.assert_close(y.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
        with pytest.raises(BadInput, match="x: expected"):
            run(y, x.float())


def test_what_does_not_fit_is_named():
    x, base, experts, c, _ = case((3, 5, 7), 2, torch.float32)
    for arguments, message in (
        ((x[:, :6], base[0], experts, c[0]), r"x: \[.., 6\].*expected \[.., 7\]"),
        ((x.half(), base[0], experts, c[0]), "x: .*float16.*expected .*float32"),
        ((x, base[0], [], c[0]), "experts: none; expected 1 to 8 of shape"),
        ((x, None, [e.flatten() for e in experts], c[0]), r"experts: experts\[0\] of shape \[35\]"),
        ((x, base[0], experts, c[0, :1]), "coefficients: found 8 elements, expected 16"),
    ):
        with pytest.raises(BadInput, match=message):
            merged_linear(*arguments)


def fused(base, experts, bias, c, lam, tables, modes, y, x):
    sparsify, elect, seed = kernels.numbers(modes)
    kernels.call(
        torch.ops.merge3.merged_linear_,
        y,
        x,
        base,
        experts,
        [bias],
        c,
        lam,
        torch.tensor([9]),
        tables,
        sparsify,
        elect,
        modes.normalize,
        seed,
    )
