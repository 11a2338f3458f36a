"""Merges launched at once are, to the last bit, the same merges launched one after the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge3 import kernels
from merge3.errors import BadInput
from merge3.kernels import DENSITY, HI, LO, RESCALE, WEIGHT, Modes

MODES = (
    Modes(),
    Modes(elect="sum", normalize=True),
    Modes("magnitude", "sum", normalize=True),
    Modes("band", "count"),
    Modes("random", "sum", seed=7),
)


def inputs(sizes, experts, dtype, seed=0):
    random = torch.Generator().manual_seed(seed)
    draw = lambda size, scale: (torch.randn(size, generator=random) * scale).to(dtype)
    base = [draw(size, 1.0) for size in sizes]
    tuned = lambda tensor: (tensor.float() + draw(tensor.shape, 0.05).float()).to(dtype)
    return base, [tuned(tensor) for tensor in base for _ in range(experts)]


def numbers(tensors, experts, seed):
    random = torch.Generator().manual_seed(seed)
    table = kernels.coefficients(tensors, experts)
    table[..., WEIGHT] = torch.rand(tensors, experts, generator=random)
    table[..., LO] = 0.02 * torch.rand(tensors, experts, generator=random)
    table[..., HI] = 0.1
    table[..., DENSITY] = torch.randint(1, 256, (tensors, experts), generator=random) / 256
    table[..., RESCALE] = 1.5
    return table, 0.5 + torch.rand(tensors, generator=random)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([1, 63, 4096, 65536, 65537, 200_001]), min_size=1, max_size=4),
    st.integers(1, 5),
    st.lists(st.sampled_from(MODES), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_same_bits(sizes, experts, modes, dtype):
    base, own = inputs(sizes, experts, dtype)
    merges, expected = [], []
    for number, how in enumerate(modes):
        coefficients, lambda_ = numbers(len(sizes), experts, number)
        out = [torch.empty_like(tensor) for tensor in base]
        kernels.merge_(out, base, own, coefficients, lambda_, how)
        expected.append(out)
        outs = [torch.full_like(tensor, torch.nan) for tensor in base]
        merges.append((outs, kernels.Prepared(outs, base, own, sparsify=how.sparsify)))
        merges[-1][1].upload(coefficients, lambda_)
    kernels.launch_together([merge for _, merge in merges], modes)
    for (outs, _), wanted in zip(merges, expected):
        assert all(torch.equal(out, want) for out, want in zip(outs, wanted))


def test_what_does_not_go_together_is_refused():
    base, own = inputs([64, 100], 2, torch.float32)
    prepared = lambda base, own: kernels.Prepared([torch.empty_like(tensor) for tensor in base], base, own)
    one, fewer, experts = prepared(base, own), prepared(base[:1], own[:2]), prepared(base, [*own[:2] * 2, *own[2:] * 2])
    for other, found in ((fewer, "1 tensors of 2 experts"), (experts, "2 tensors of 4 experts")):
        with pytest.raises(BadInput, match=f"merges: found {found}; expected 2 of 2|merges: {found}"):
            kernels.launch_together([one, other], [Modes(), Modes()])
    shorter = [tensor[:32].clone() for tensor in base]
    with pytest.raises(BadInput, match=r"merges\[1\].table\[0\]: found 32 elements, expected 64"):
        others = prepared(shorter, [tensor[:32].clone() for tensor in own])
        kernels.launch_together([one, others], [Modes(), Modes()])
    with pytest.raises(BadInput, match="sparsify"):
        kernels.launch_together([one, one], [Modes(), Modes("magnitude")])
