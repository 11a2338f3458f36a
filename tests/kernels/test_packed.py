"""One bit per element: made, and applied within the merge, against plain torch."""

import itertools

import pytest
import torch

from merge3 import kernels, packed
from merge3.errors import BadInput
from merge3.kernels import Modes
from merge3.reference import elementwise_ref, pack_ref
from tests.kernels.test_merge import DTYPES, assert_close, make_case

SIZES = [0, 1, 31, 32, 33, (5, 65), kernels.CHUNK + 3]


def bits_of(mask, numel):
    words = mask.to(torch.int64)[:, None] >> torch.arange(32)
    return (words & 1).bool().flatten()[:numel]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_bits_and_sums_are_the_references(dtype, count):
    base, experts = make_case(SIZES, count, dtype)
    unified = [torch.empty_like(b) for b in base]
    kernels.elementwise_(unified, base, experts, "unify", torch.zeros(len(base)))
    for f, e in zip(
        unified, elementwise_ref(base, experts, "unify", torch.zeros(len(base)), torch.ones(len(base), count))
    ):
        assert_close(f, e, dtype, 0.05)
    for extra in ((), unified):
        masks, sums = kernels.pack(base, experts, len(base), extra)
        bits, expected = pack_ref(base, experts, len(base), extra)
        for mask, bit in zip(masks, bits):
            assert torch.equal(bits_of(mask, bit.numel()), bit.flatten())
            assert mask.numel() == -(-bit.numel() // 32)
        torch.testing.assert_close(sums, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elect", kernels.ELECT)
def test_signs_merge_without_reading_experts(dtype, elect):
    for count, normalize in ((1, False), (3, True), (8, False)):
        base, experts = make_case(SIZES, count, dtype, seed=count)
        signs = packed.pack_signs(base, experts)
        weights = torch.rand(len(base), count, generator=torch.Generator().manual_seed(0)) + 0.1
        out = [torch.full_like(b, float("nan")) for b in base]
        signs.merge_(out, base, weights, torch.full((len(base),), 0.7), Modes("signs", elect, normalize))
        for t, b in enumerate(base):
            tau = torch.stack([(e.float() - b.float()).double() for e in experts[count * t : count * (t + 1)]])
            scale = tau.abs().flatten(1).mean(1) if b.numel() else torch.zeros(count, dtype=torch.float64)
            assert torch.allclose(signs.scales[t], scale, rtol=1e-9)
            shape = (-1, *[1] * b.dim())
            w = weights[t].double().reshape(shape)
            c = w * scale.reshape(shape) * torch.where(tau >= 0, 1.0, -1.0)
            votes = {"none": None, "sum": c.sum(0), "count": c.sign().sum(0)}[elect]
            agrees = torch.ones_like(c) if votes is None else (c.sign() == torch.where(votes >= 0, 1.0, -1.0)).double()
            divisor = (w * agrees).sum(0)
            expected = b.double() + 0.7 * (c * agrees).sum(0) / (divisor.where(divisor != 0, 1.0) if normalize else 1.0)
            assert_close(out[t], expected, dtype, 0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_emr_gives_each_expert_its_own_model(dtype):
    base, experts = make_case(SIZES, 3, dtype)
    model = packed.unify(base, experts)
    for k in range(3):
        out = [torch.empty_like(b) for b in base]
        model.swap_(out, base, k)
        for t, b in enumerate(base):
            tau = (experts[3 * t + k].float() - b.float()).double()
            common = (model.unified[t].float() - b.float()).double()
            mask = tau * common > 0
            rescale = tau.abs().sum() / (common * mask).abs().sum() if mask.any() else 1.0
            assert_close(out[t], b.double() + rescale * mask * common, dtype, 0.05)
    broken = [e.clone() for e in experts]
    broken[3 * len(SIZES) - 3][7] = float("nan")
    assert packed.unify(base, broken).unified[-1].isnan().nonzero().tolist() == [[7]]
    # With one expert the unified model is that expert.
    alone = packed.unify(base, experts[::3])
    for u, e, b in zip(alone.unified, experts[::3], base):
        assert_close(u, e.double(), dtype, 0.05)
        assert u.dtype == b.dtype


def test_the_packed_modes_slice_and_prepare_like_the_others():
    base, experts = make_case([(60, 3001)], 2, torch.bfloat16)
    signs = packed.pack_signs(base, experts)
    c = kernels.coefficients(1, 2)
    c[..., kernels.RESCALE] = signs.scales
    whole, sliced, prepared = (torch.empty_like(base[0]) for _ in range(3))
    kernels.merge_([whole], base, [], c, torch.ones(1), Modes("signs", "sum"), None, signs.masks)
    cuts = [0, kernels.CHUNK, base[0].numel()]
    for a, b in itertools.pairwise(cuts):
        kernels.merge_(
            [sliced.view(-1)[a:b]],
            [base[0].view(-1)[a:b]],
            [],
            c,
            torch.ones(1),
            Modes("signs", "sum"),
            None,
            signs.masks,
            torch.tensor([a]),
            torch.tensor([3001]),
        )
    ready = kernels.Prepared([prepared], base, [], None, signs.masks, "signs")
    ready.upload(c, torch.ones(1))
    ready.launch(Modes("signs", "sum"))
    assert torch.equal(whole, sliced) and torch.equal(whole, prepared)
    assert sum(m.nbytes for m in signs.masks) * 15 < sum(e.nbytes for e in experts)


def test_bad_masks_are_named():
    base, experts = make_case([40], 2, torch.float32)
    masks, _ = kernels.pack(base, experts, 1)
    merge = lambda mode, masks, experts=(): kernels.merge_(
        [torch.empty(40)], base, experts, kernels.coefficients(1, 2), torch.ones(1), Modes(mode), None, masks
    )
    with pytest.raises(BadInput, match=r"masks\[1\]: expected 2 contiguous int32"):
        merge("signs", [masks[0], masks[1][:1]])
    with pytest.raises(BadInput, match="1 masks: expected 2"):
        merge("mask", masks[:1], experts)
    with pytest.raises(BadInput, match="coefficients: found 16 elements, expected 8"):
        merge("signs", masks[:1])
    with pytest.raises(BadInput, match="0 expert tensors for 1 tensors"):
        merge("signs", [])
