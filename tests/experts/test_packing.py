"""Packing and expanding: what is kept is exact, what is not is the base's, and the kernel merges what was packed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge3 import kernels
from merge3.compact import Bytes, Kept, int8_bytes, kept_bytes, kept_of, merge_compact_, pack_bytes, pack_kept
from merge3.errors import BadInput
from merge3.experts import ExpertLoss, Experts
from tests.experts.compacting import bits, int8, residual

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 5), (7, 64), (2, 33000), (130, 1031), (2, 3, 41)]
MODES = [kernels.Modes(*row) for row in (("all",), ("magnitude", "sum", True), ("random", "count"), ("band", "sum"))]


def same(a, b):
    return torch.equal(bits(a), bits(b))


def pair(shape, dtype, share, seed, scale=0.01):
    """A base, and an expert that differs in about a share of its elements."""
    draw = torch.Generator().manual_seed(seed)
    base = (torch.randn(shape, generator=draw) * 0.1).to(dtype)
    change = torch.randn(shape, generator=draw) * scale * (torch.rand(shape, generator=draw) < share)
    return base, (base.float() + change).to(dtype)


cases = st.tuples(
    st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from([0.0, 0.05, 0.6, 1.0]), st.integers(0, 99)
)


@settings(max_examples=40, deadline=None)
@given(cases, st.floats(0.001, 1.0))
def test_what_is_kept_is_the_largest_and_exact(case, density):
    shape, dtype, *_ = case
    base, expert = pair(*case)
    held, loss = pack_kept(base, expert, density)
    found = held.expand(base.flatten(), 0).reshape(shape)
    assert same(found, residual(base, expert, density))
    assert held.nbytes <= kept_bytes(shape, dtype, density)
    assert len(held.values) == loss.kept <= kept_of(expert.numel(), density) and loss.elements == expert.numel()
    tau, lost = expert.double() - base.double(), found.double() - expert.double()
    assert loss.lost == pytest.approx(float(lost.square().sum()), rel=1e-4, abs=1e-12)
    assert loss.squared == pytest.approx(float(tau.square().sum()), rel=1e-4, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(cases)
def test_nothing_is_lost_where_density_covers_all_that_differs(case):
    base, expert = pair(*case)
    base.view(-1)[0], expert.view(-1)[0] = 0.0, -0.0  # the same number, in other bits
    share = float((bits(base) != bits(expert)).double().mean())
    for density in (share, 1.0):
        held, loss = pack_kept(base, expert, density)
        assert same(held.expand(base.flatten(), 0).reshape(expert.shape), expert) and loss.lost == 0.0


@settings(max_examples=20, deadline=None)
@given(cases)
def test_bytes_are_within_half_a_step_and_half_an_ulp(case):
    shape, dtype, *_ = case
    base, expert = pair(*case)
    held, loss = pack_bytes(base, expert)
    found = held.expand(base.flatten(), 0).reshape(shape)
    assert same(found, int8(base, expert)) and held.nbytes == int8_bytes(shape)
    step = (expert.float() - base.float()).reshape(-1, shape[-1]).abs().amax(1) / 127
    ulp = torch.finfo(dtype).eps * torch.maximum(expert.abs(), found.abs()).double() + torch.finfo(dtype).tiny
    error = (found.double() - expert.double()).abs()
    bound = 0.5 * step.double().reshape(*shape[:-1], 1) * (1 + 1e-5) + ulp
    assert (error <= bound).all()
    assert loss.lost == pytest.approx(float(error.square().sum()), rel=1e-4, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(cases, st.sampled_from([0.1, 0.7, "int8"]), st.data())
def test_a_part_is_a_part_of_the_whole(case, option, data):
    base, expert = pair(*case)
    held, _ = pack_bytes(base, expert) if option == "int8" else pack_kept(base, expert, option)
    whole, n = held.expand(base.flatten(), 0), expert.numel()
    begin = data.draw(st.integers(0, n))
    end = data.draw(st.integers(begin, n))
    assert same(held.expand(base.flatten()[begin:end], begin), whole[begin:end])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", [0.1, 1.0, "int8"])
def test_the_kernel_merges_what_they_expand_to(dtype, option):
    """Beside an expert that is held as it is, in every mode, over more than a chunk, bit for bit."""
    for shape in SHAPES:
        base = pair(shape, dtype, 0.0, 1)[0]
        experts = [(base.float() + 0.01 * torch.randn(shape)).to(dtype) for _ in range(3)]
        packed = [pack_bytes(base, e) if option == "int8" else pack_kept(base, e, option) for e in experts]
        held = [packed[0][0], None, packed[2][0]]
        expanded = [e if h is None else h.expand(base.flatten(), 0).reshape(shape) for e, h in zip(experts, held)]
        for modes in MODES:
            coefficients = kernels.coefficients(1, 3)
            coefficients[..., kernels.LO], coefficients[..., kernels.HI] = 0.004, 0.02
            coefficients[..., kernels.DENSITY] = 0.5
            outs = [torch.full_like(base, 7.0), torch.full_like(base, 9.0)]
            given_ = coefficients, torch.tensor([0.7]), modes, torch.tensor([5])
            kernels.merge_([outs[0]], [base], expanded, *given_)
            merge_compact_([outs[1]], [base], [base, experts[1], base], held, *given_)
            assert same(*outs), (shape, modes)


def test_the_kernel_refuses_what_does_not_fit():
    base, expert = pair((40, 50), torch.float32, 1.0, 0)
    held, _ = pack_kept(base, expert, 0.2)
    rows, _ = pack_bytes(base, expert)
    bad = {
        "its chunks have": Kept(held.mask, held.values[:-1], held.starts),
        "masks: found": Kept(held.mask[:-1], held.values, held.starts),
        "values of the expert's dtype": Kept(held.mask, held.values.half(), held.starts),
        "sides: found": Bytes(rows.values, rows.scales[:-1]),
        "as many bytes as elements": Bytes(rows.values[:-1], rows.scales),
    }
    for message, one in bad.items():
        with pytest.raises(BadInput, match=message):
            merge_compact_([base.clone()], [base], [base], [one], kernels.coefficients(1, 1), torch.ones(1))
    with pytest.raises(BadInput, match="1 values, 1 masks, 1 sides: expected 2 of each"):
        merge_compact_([base.clone()], [base], [base] * 2, [held], kernels.coefficients(1, 2), torch.ones(1))


def test_weights_that_are_not_finite_show_in_the_loss():
    for bad in (float("nan"), float("inf")):
        base, expert = pair((40, 50), torch.bfloat16, 1.0, 0)
        expert[3, 4] = bad
        for loss in (pack_kept(base, expert, 0.2)[1], pack_bytes(base, expert)[1]):
            assert not torch.tensor(loss.squared).isfinite()


@pytest.mark.parametrize("text", ["full", "int8", "residual:0.25", "residual:1", "residual:0.123456789"])
def test_an_option_is_what_it_is_written_as(text):
    assert str(Experts.parse(text)) == text and bool(Experts.parse(text)) == (text != "full")


@pytest.mark.parametrize(
    "text",
    ["", "half", "residual:", "residual:0", "residual:1.01", "residual:-1", "residual:nan", "residual:all", "int8:4"],
)
def test_an_option_that_is_none_is_one_line(text):
    with pytest.raises(BadInput, match=r"experts: found .*; expected full, int8, residual, or residual:DENSITY"):
        Experts.parse(text)


def test_residual_alone_keeps_a_tenth():
    assert Experts.parse("residual") == Experts.parse("residual:0.1")


def test_a_loss_is_a_line():
    assert ExpertLoss("math", 0.1, 0.44, 0.748).describe("residual:0.1") == (
        "math as residual:0.1: 10 % of parameters kept, 44 % of its task vector's squared norm, relative error 0.748; "
        "searched and measured so, exported from the full checkpoint"
    )
    line = "math as residual:0.5: nothing is lost, 12 % of its parameters differ"
    assert ExpertLoss("math", 0.12, 1.0, 0.0).describe("residual:0.5") == line
