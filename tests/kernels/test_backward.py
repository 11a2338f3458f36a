"""Gradients of the merge: against autograd through the oracle, finite differences, and PyTorch's own checks."""

import itertools

import pytest
import torch

from merge3 import kernels
from merge3.differentiable import _merged, merged
from merge3.errors import BadInput
from merge3.kernels import RESCALE, WEIGHT, Modes
from merge3.reference import merged_backward_ref
from tests.kernels.test_merge import DTYPES, make_case, random_coefficients

SIZES = [0, 1, 13, (5, 65), kernels.CHUNK + 3]


def gradients_of(base, experts, c, lam, modes, ids, g):
    c, lam = c.clone().requires_grad_(), lam.clone().requires_grad_()
    tables = kernels.rank_tables(base, experts, len(base))[0] if modes.sparsify == "ranked" else ()
    out = merged(base, experts, c, lam, modes, ids, tables)
    torch.autograd.backward(out, g)
    return c.grad, lam.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsify,elect", itertools.product(kernels.SPARSIFY, kernels.ELECT))
def test_gradients_match_autograd_through_the_reference(sparsify, elect, dtype):
    for count, normalize in ((1, True), (2, False), (3, True), (8, False)):
        base, experts = make_case(SIZES, count, dtype, seed=count)
        c, lam = random_coefficients(len(SIZES), count, seed=count)
        c[..., WEIGHT] = c[..., WEIGHT].abs() + 0.1  # where weights cancel, a divisor can be anything
        g = [torch.randn(b.shape, generator=torch.Generator().manual_seed(1)).to(dtype) for b in base]
        modes, ids = Modes(sparsify, elect, normalize, 5), torch.arange(len(SIZES)) + 100
        found, expected = (
            gradients_of(base, experts, c, lam, modes, ids, g),
            merged_backward_ref(g, base, experts, c, lam, modes, ids),
        )
        for f, e in zip(found, expected):
            torch.testing.assert_close(f.double(), e, rtol=2e-4, atol=2e-6)


def test_a_gradient_does_not_depend_on_the_number_of_threads():
    base, experts = make_case([400_000, (30, 70)], 3, torch.bfloat16)
    c, lam = random_coefficients(2, 3)
    g = [torch.randn(b.shape).bfloat16() for b in base]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(gradients_of(base, experts, c, lam, Modes("magnitude", "sum", True), None, g))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("elect", kernels.ELECT)
@pytest.mark.filterwarnings("ignore:Input #.*double precision")
def test_gradcheck(elect, normalize):
    """Finite differences. Experts are far apart, so that no elected sign changes within a difference."""
    g = torch.Generator().manual_seed(0)
    base = [torch.randn(6, generator=g), torch.randn(2, 2, generator=g)]
    experts = [
        b + (torch.rand(b.shape, generator=g) + 0.5) * s * torch.ones_like(b).cumsum(-1).fmod(2).sub(0.5).sign()
        for b in base
        for s in (1.0, 0.7, -0.4)
    ]

    def merge(weight, rescale, lam):
        c = kernels.coefficients(2, 3)
        columns = list(c.unbind(-1))
        columns[WEIGHT], columns[RESCALE] = weight, rescale
        return tuple(merged(base, experts, torch.stack(columns, -1), lam, Modes("all", elect, normalize)))

    inputs = [(torch.rand(2, 3, generator=g) * 0.3 + 0.6).requires_grad_() for _ in range(2)] + [
        torch.rand(2, generator=g).requires_grad_()
    ]
    assert torch.autograd.gradcheck(merge, inputs, eps=1e-2, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("sparsify", kernels.SPARSIFY)
def test_opcheck(sparsify):
    base, experts = make_case([24], 2, torch.float32)
    c, lam = random_coefficients(1, 2)
    c[..., WEIGHT] = 0.5
    tables = kernels.rank_tables(base, experts, 1)[0] if sparsify == "ranked" else []
    arguments = (
        base,
        experts,
        c.requires_grad_(),
        lam.requires_grad_(),
        torch.arange(1),
        tables,
        kernels.SPARSIFY.index(sparsify),
        1,
        True,
        3,
    )
    torch.library.opcheck(_merged, arguments)


def test_coefficients_can_be_learned():
    """Descent finds the weights that made a merge."""
    base, experts = make_case([(40, 50), 300], 3, torch.float32)
    truth = kernels.coefficients(2, 3)
    truth[..., WEIGHT] = torch.tensor([0.3, 0.9, -0.2])
    target = merged(base, experts, truth, torch.ones(2))
    weight = torch.full((3,), 0.5, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=30, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        c = torch.cat([weight[None, :, None].expand(2, 3, 1), kernels.coefficients(2, 3)[..., 1:]], -1)
        value = sum(((a - b) ** 2).sum() for a, b in zip(merged(base, experts, c, torch.ones(2)), target)) * 1e4
        value.backward()
        return value

    optimizer.step(loss)
    assert torch.allclose(weight.detach(), torch.tensor([0.3, 0.9, -0.2]), atol=1e-3)


def test_a_gradient_of_the_weights_themselves_is_refused():
    base, experts = make_case([8], 2, torch.float32)
    with pytest.raises(BadInput, match=r"coefficients: shape \[2, 8\] for 1 tensors and 2 experts"):
        merged(base, experts, kernels.coefficients(1, 2)[0], torch.ones(1))
    with pytest.raises(BadInput, match=r"experts\[1\]: requires a gradient; expected only coefficients"):
        merged(base, [experts[0], experts[1].requires_grad_()], kernels.coefficients(1, 2), torch.ones(1))
