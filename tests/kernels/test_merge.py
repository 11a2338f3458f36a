"""The fused merge against its oracle: every mode, K = 1..8, three dtypes, awkward sizes."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge3 import kernels
from merge3.errors import BadInput, Unavailable
from merge3.kernels import DENSITY, EPSILON, FIELDS, HI, HI_SHARE, LO, LO_SHARE, RESCALE, WEIGHT, Modes
from merge3.reference import OPS, merge_ref, random_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half an ulp of the output dtype (relative), plus float32 rounding of the sums.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8 * 1.01, torch.float16: 2**-11 * 1.02}
SIZES = [0, 1, 7, 8, 64, 513, (3, 65), (7, 31), kernels.CHUNK + 3]


def make_case(sizes, experts, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    base, expert_list = [], []
    for size in sizes:
        theta = torch.randn(size, generator=g) * 0.02
        base.append(theta.to(dtype))
        for _ in range(experts):
            tau = torch.randn(size, generator=g) * 0.004 * (torch.rand(size, generator=g) > 0.2)
            expert_list.append((theta + tau).to(dtype))
    return base, expert_list


def random_coefficients(tensors, experts, seed=0):
    g = torch.Generator().manual_seed(seed)
    c = kernels.coefficients(tensors, experts)
    c[..., WEIGHT] = torch.rand(tensors, experts, generator=g) * 1.5 - 0.3
    c[..., RESCALE] = torch.rand(tensors, experts, generator=g) + 0.5
    c[..., LO] = torch.rand(tensors, experts, generator=g) * 0.003
    c[..., HI] = c[..., LO] + torch.rand(tensors, experts, generator=g) * 0.006
    c[..., DENSITY] = torch.rand(tensors, experts, generator=g) * 0.6 + 0.2
    c[..., EPSILON] = 0.1
    return c, torch.rand(tensors, generator=g) + 0.5


def assert_close(found, expected, dtype, scale):
    """Within one rounding of the output, where float32 sums of size `scale` were involved."""
    bound = TOLERANCE[dtype] * expected.abs() + 1e-6 * scale + (6e-8 if dtype == torch.float16 else 0)
    wrong = (found.double() - expected).abs() > bound
    if wrong.any():
        i = int(wrong.flatten().nonzero()[0])
        pytest.fail(f"element {i}: {found.flatten()[i]} != {expected.flatten()[i]} ({int(wrong.sum())} wrong)")


def run(base, experts, c, lam, modes, dtype, ids=None, out_dtype=None):
    out = [torch.full_like(b, float("nan"), dtype=out_dtype or dtype) for b in base]
    tables = kernels.rank_tables(base, experts, len(base))[0] if modes.sparsify == "ranked" else ()
    kernels.merge_(out, base, experts, c, lam, modes, ids, tables)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsify,elect", itertools.product(kernels.SPARSIFY, kernels.ELECT))
def test_every_mode_matches_the_reference(sparsify, elect, dtype):
    for experts, normalize in [(1, True), (2, False), (3, True), (5, False), (8, True)]:
        base, expert_list = make_case(SIZES, experts, dtype, seed=experts)
        c, lam = random_coefficients(len(base), experts, seed=experts)
        modes = Modes(sparsify, elect, normalize, seed=123456789 + experts)
        ids = torch.arange(len(base)) * 7919 + 2**31
        found = run(base, expert_list, c, lam, modes, dtype, ids)
        expected = merge_ref(base, expert_list, c, lam, modes, ids)
        for f, e in zip(found, expected):
            # A divisor of opposing weights may be tiny; skip nothing, widen by what float32 sums can lose.
            scale = 0.05 * (1 + e.abs().max().item() / 0.02 if e.numel() else 1)
            assert_close(f, e, dtype, scale)


@pytest.mark.parametrize("experts", range(1, 9))
def test_every_expert_count_without_a_base(experts):
    _, expert_list = make_case([1000, 17], experts, torch.bfloat16)
    c, lam = random_coefficients(2, experts)
    c[..., WEIGHT] = c[..., WEIGHT].abs() + 0.1
    out = [torch.empty(1000, dtype=torch.bfloat16), torch.empty(17, dtype=torch.bfloat16)]
    kernels.merge_(out, [], expert_list, c, lam, Modes(normalize=True))
    for f, e in zip(out, merge_ref([], expert_list, c, lam, Modes(normalize=True))):
        assert_close(f, e, torch.bfloat16, 0.05)


@pytest.mark.parametrize("source,target", itertools.permutations(DTYPES, 2))
def test_output_may_have_another_dtype(source, target):
    base, experts = make_case([1037], 3, source)
    c, lam = random_coefficients(1, 3)
    modes = Modes("magnitude", "sum", True)
    found = run(base, experts, c, lam, modes, source, out_dtype=target)
    assert_close(found[0], merge_ref(base, experts, c, lam, modes)[0], target, 0.05)


@settings(max_examples=60, deadline=None)
@given(
    numel=st.integers(1, 3000),
    density=st.floats(0.01, 1.0),
    dtype=st.sampled_from(DTYPES),
    levels=st.integers(1, 40),
)
def test_a_threshold_keeps_the_asked_share_even_when_magnitudes_tie(numel, density, dtype, levels):
    g = torch.Generator().manual_seed(numel)
    tau = torch.randint(1, levels + 1, (numel,), generator=g).float() / 64
    expert = [tau.to(dtype)]
    k = max(1, int(density * numel))
    stats = kernels.order_statistics([], expert, torch.tensor([[k]]))
    c = kernels.coefficients(1, 1)
    c[..., LO] = stats.value[..., 0]
    c[..., LO_SHARE] = (k - stats.greater[..., 0]) / stats.equal[..., 0]
    out = [torch.empty_like(expert[0])]
    kernels.merge_(out, [], expert, c, torch.ones(1), Modes("magnitude"))
    # The Weyl sequence's discrepancy on the tied elements bounds the miss.
    assert abs(int((out[0] != 0).sum()) - k) <= 3 + 2 * numel**0.5


def test_random_keeps_have_the_asked_density_and_do_not_depend_on_neighbours():
    tau = torch.ones(300_000)
    c = kernels.coefficients(1, 2)
    c[..., DENSITY] = torch.tensor([[0.3, 0.7]])
    out = [torch.empty(300_000)]
    c[0, 1, WEIGHT] = 10.0
    kernels.merge_(out, [], [tau, tau], c, torch.ones(1), Modes("random", seed=5))
    kept_first, kept_second = (out[0] % 10) == 1, out[0] >= 10
    for kept, density in ((kept_first, 0.3), (kept_second, 0.7)):
        assert abs(kept.float().mean() - density) < 5 * (density * (1 - density) / 300_000) ** 0.5
    joint = (kept_first & kept_second).float().mean()
    assert abs(joint - 0.21) < 0.005  # experts draw independently
    lagged = (kept_first[1:] & kept_first[:-1]).float().mean()
    assert abs(lagged - 0.09) < 0.005


def test_random_bits_are_philox_bits():
    expected = random_bits(1000, 77, 1, 2**40 + 9) < int(0.5 * 65536 + 0.5)
    c = kernels.coefficients(1, 2)
    c[..., DENSITY] = 0.5
    c[0, 0, WEIGHT] = 0.0
    out = [torch.empty(1000)]
    ids = torch.tensor([77])
    kernels.merge_(out, [], [torch.ones(1000)] * 2, c, torch.ones(1), Modes("random", seed=2**40 + 9), ids)
    assert torch.equal(out[0] == 1, expected)


def test_result_does_not_depend_on_threads_or_on_the_company_of_other_tensors():
    base, experts = make_case([200_003, 9, 70_000], 3, torch.bfloat16)
    c, lam = random_coefficients(3, 3)
    modes, ids = Modes("random", "sum", True, 3), torch.tensor([11, 12, 13])
    together = run(base, experts, c, lam, modes, torch.bfloat16, ids)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for t in range(3):
            alone = run(
                base[t : t + 1],
                experts[3 * t : 3 * t + 3],
                c[t : t + 1],
                lam[t : t + 1],
                modes,
                torch.bfloat16,
                ids[t : t + 1],
            )
            assert torch.equal(alone[0], together[t])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsify", kernels.SPARSIFY)
def test_output_may_be_the_base(sparsify, dtype):
    base, experts = make_case([kernels.CHUNK + 40, (5, 776)], 2, dtype)
    c, lam = random_coefficients(2, 2)
    modes = Modes(sparsify, "sum", True, 3)
    expected = run(base, experts, c, lam, modes, dtype)
    tables = kernels.rank_tables(base, experts, len(base))[0] if sparsify == "ranked" else ()
    inplace = [b.clone() for b in base]
    kernels.merge_(inplace, inplace, experts, c, lam, modes, None, tables)
    assert all(torch.equal(found, wanted) for found, wanted in zip(inplace, expected))


@pytest.mark.parametrize("density,kept", [(-0.5, 0), (float("nan"), 0), (1.5, 1), (2.0, 1), (3.0, 1)])
def test_densities_that_are_none_keep_nothing_or_all(density, kept):
    base, experts = make_case([64, (3, 512)], 2, torch.float32)
    c, lam = kernels.coefficients(2, 2), torch.ones(2)
    c[..., WEIGHT], c[..., DENSITY] = 0.5, 0.25
    c[:, 0, DENSITY] = density
    found = run(base, experts, c, lam, Modes("random"), torch.float32)
    c[:, 0, WEIGHT], c[:, 0, DENSITY] = 0.5 * kept, 1
    assert all(map(torch.equal, found, run(base, experts, c, lam, Modes("random"), torch.float32)))


@pytest.mark.parametrize("field", [DENSITY, EPSILON])
def test_ranks_by_what_is_no_number_keep_nothing(field):
    base, experts = make_case([64, (3, 512)], 2, torch.float32)
    c, lam = kernels.coefficients(2, 2), torch.ones(2)
    c[..., WEIGHT], c[..., DENSITY], c[..., EPSILON] = 0.5, 0.5, 0.1
    c[:, 0, field] = float("nan")
    found = run(base, experts, c, lam, Modes("ranked"), torch.float32)
    c[:, 0, WEIGHT], c[:, 0, field] = 0, 0.1
    assert all(map(torch.equal, found, run(base, experts, c, lam, Modes("ranked"), torch.float32)))


def test_output_may_be_the_base_but_not_an_expert():
    base, experts = make_case([1001], 2, torch.float32)
    c, lam = random_coefficients(1, 2)
    expected = run(base, experts, c, lam, Modes("magnitude", "sum"), torch.float32)
    inplace = [base[0].clone()]
    kernels.merge_(inplace, inplace, experts, c, lam, Modes("magnitude", "sum"))
    assert torch.equal(inplace[0], expected[0])
    with pytest.raises(
        BadInput, match=r"expert 1 of tensor 0 overlaps out of tensor 0|out of tensor 0 overlaps expert 1 of tensor 0"
    ):
        kernels.merge_([experts[1]], base, experts, c, lam)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 24), min_size=6, max_size=6))
def test_an_output_that_overlaps_anything_is_found(starts):
    """Two tensors, each with out, base and one expert: 8 elements somewhere in one buffer of 32."""
    buffer = torch.zeros(32)
    at = [buffer[s : s + 8] for s in starts]
    out, base, experts = at[:2], at[2:4], at[4:]
    touch = lambda a, b: abs(a - b) < 8
    (o0, o1, b0, b1, e0, e1) = starts
    bad = touch(o0, o1) or any(touch(o, e) for o in (o0, o1) for e in (e0, e1)) or touch(o0, b1) or touch(o1, b0)
    bad |= (touch(o0, b0) and o0 != b0) or (touch(o1, b1) and o1 != b1)
    call = lambda: kernels.merge_(out, base, experts, kernels.coefficients(2, 1), torch.ones(2))
    if bad:
        with pytest.raises(BadInput, match=r"(out|base|expert 0) of tensor [01] overlaps .*expected memory of its own"):
            call()
    else:
        call()


@pytest.mark.parametrize("sparsify", kernels.SPARSIFY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_give_the_bits_of_the_whole(sparsify, dtype):
    base, experts = make_case([(70, 3001), (3, 65)], 3, dtype)
    c, lam = random_coefficients(2, 3)
    modes, ids = Modes(sparsify, "sum", True, 5), torch.tensor([7, 8])
    whole = run(base, experts, c, lam, modes, dtype, ids)
    tables = kernels.rank_tables(base, experts, 2)[0] if sparsify == "ranked" else []
    out = torch.empty(70 * 3001, dtype=dtype)
    cuts = [0, kernels.CHUNK, 3 * kernels.CHUNK, out.numel()]
    pieces = list(itertools.pairwise(cuts))[::-1]
    kernels.merge_(
        [out[a:b] for a, b in pieces],
        [base[0].flatten()[a:b] for a, b in pieces],
        [e.flatten()[a:b] for a, b in pieces for e in experts[:3]],
        c[:1].repeat(3, 1, 1),
        lam[:1].repeat(3),
        modes,
        ids[:1].repeat(3),
        tables[:3] * 3,
        torch.tensor([a for a, _ in pieces]),
        torch.full((3,), 3001),
    )
    assert torch.equal(out, whole[0].flatten())
    with pytest.raises(BadInput, match="slice from element 100: expected a multiple of"):
        kernels.merge_(
            [out],
            base[:1],
            experts[:3],
            c[:1],
            lam[:1],
            Modes(),
            ids[:1],
            [],
            torch.tensor([100]),
            torch.tensor([3001]),
        )


@pytest.mark.parametrize("sparsify", kernels.SPARSIFY)
def test_a_prepared_merge_gives_the_same_bits_for_every_upload(sparsify):
    base, experts = make_case(SIZES, 3, torch.bfloat16)
    ids = torch.arange(len(base)) * 31
    tables = kernels.rank_tables(base, experts, len(base))[0] if sparsify == "ranked" else []
    out = [torch.empty_like(b) for b in base]
    prepared = kernels.Prepared(out, base, experts, ids, tables, sparsify)
    for seed, elect in enumerate(kernels.ELECT):
        c, lam = random_coefficients(len(base), 3, seed)
        modes = Modes(sparsify, elect, seed % 2 == 0, seed)
        prepared.upload(c, lam)
        prepared.launch(modes)
        for found, expected in zip(out, run(base, experts, c, lam, modes, torch.bfloat16, ids)):
            assert torch.equal(found, expected)
    with pytest.raises(BadInput, match="as prepared"):
        prepared.launch(Modes("band" if sparsify != "band" else "all"))
    with pytest.raises(BadInput, match="coefficients"):
        prepared.upload(c[:, :2], lam)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_where_they_are(dtype):
    base, experts = make_case([64], 2, dtype)
    base[0][3] = float("nan")
    experts[0][10] = float("inf")
    out = run(base, experts, kernels.coefficients(1, 2), torch.ones(1), Modes(), dtype)[0]
    assert out[3].isnan() and out[10].isinf()
    assert int((~out.isfinite()).sum()) == 2


def test_float16_results_round_to_nearest_even_and_overflow_to_infinity():
    values = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0, 2**-24, 2**-25, 2**-25 * 1.01, -(2**-26)])
    out = torch.empty(8, dtype=torch.float16)
    kernels.merge_([out], [], [values], kernels.coefficients(1, 1), torch.ones(1))
    assert torch.equal(out, values.half())


def misaligned(numel):
    """A float32 tensor one byte off, which only foreign memory can be."""
    raw = bytearray(4 * numel + 8)
    return torch.frombuffer(memoryview(raw)[1 : 1 + 4 * numel], dtype=torch.float32)


def test_bad_arguments_name_the_tensor():
    base, experts = make_case([8, 8], 2, torch.float32)
    c, lam, out = kernels.coefficients(2, 2), torch.ones(2), [torch.empty(8), torch.empty(8)]
    cases = [
        (dict(out=[out[0], torch.empty(16)[::2]]), r"out\[1\]: expected a contiguous"),
        (dict(base=[base[0], base[1].half()]), r"base\[1\]: its dtype differs"),
        (dict(experts=[*experts[:3], torch.empty(9)]), r"experts\[3\]: found 9 elements, expected 8"),
        (dict(experts=[*experts[:3], experts[3].double()]), r"experts\[3\]: expected float32"),
        (dict(experts=experts[:3]), r"3 expert tensors for 2 tensors"),
        (dict(base=base[:1]), r"1 base tensors: expected 2 or none"),
        (dict(coefficients=kernels.coefficients(2, 3)), rf"coefficients: found {2 * 3 * FIELDS} elements"),
        (dict(lambda_=lam.double()), r"lambda_: expected a contiguous CPU tensor"),
        (dict(experts=experts * 9), r"18 experts: expected 1 to 8"),
        (dict(experts=[]), r"0 expert tensors for 2 tensors"),
        (dict(base=[base[0], misaligned(8)]), r"base\[1\]: misaligned"),
    ]
    for change, message in cases:
        arguments = dict(out=out, base=base, experts=experts, coefficients=c, lambda_=lam) | change
        with pytest.raises(BadInput, match=message):
            kernels.merge_(**arguments)
    with pytest.raises(BadInput, match="unknown 'magnitud'"):
        kernels.merge_(out, base, experts, c, lam, Modes("magnitud"))
    with pytest.raises(BadInput, match=r"rank_tables"):
        kernels.merge_(out, base, experts, c, lam, Modes("ranked"))


def test_a_device_without_kernels_names_the_build_step():
    with pytest.raises(Unavailable, match=r"kernels: .*expected tensors on one of: .*\(build with MERGE3_CUDA=1"):
        kernels.merge_(
            [torch.empty(8).to_mkldnn()], [], [torch.empty(8).to_mkldnn()], kernels.coefficients(1, 1), torch.ones(1)
        )


@pytest.fixture(scope="module")
def merged_here():
    """[(what, merged)] of every mode and dtype, by this process's instruction set."""
    results = []
    for dtype, sparsify, elect in itertools.product(DTYPES, kernels.SPARSIFY, kernels.ELECT):
        for experts, normalize in [(3, True), (8, False)]:
            base, expert_list = make_case([(3, 65), kernels.CHUNK + 3], experts, dtype)
            c, lam = random_coefficients(2, experts)
            found = run(base, expert_list, c, lam, Modes(sparsify, elect, normalize, 7), dtype)
            results += [((sparsify, elect, dtype), tensor) for tensor in found]
    return results


@pytest.mark.parametrize("cpu", ["generic", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(cpu, tmp_path, merged_here):
    # The loop is chosen once per process, so another process has to run the other one.
    script = """
import os, sys
sys.path[:0] = [sys.argv[2], os.path.join(sys.argv[2], "..", "..")]
import torch
if "MERGE3_TEST_LIBRARY" in os.environ:
    import tests.kernels.emulation.library  # the sanitized loops, where the parent has them
from test_merge import DTYPES, Modes, itertools, kernels, make_case, random_coefficients, run
results = []
for dtype, sparsify, elect in itertools.product(DTYPES, kernels.SPARSIFY, kernels.ELECT):
    for experts, normalize in [(3, True), (8, False)]:
        base, expert_list = make_case([(3, 65), kernels.CHUNK + 3], experts, dtype)
        c, lam = random_coefficients(2, experts)
        results += run(base, expert_list, c, lam, Modes(sparsify, elect, normalize, 7), dtype)
torch.save(results, sys.argv[1])
"""
    environment = dict(os.environ, MERGE3_CPU=cpu)
    child = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "other.pt", Path(__file__).parent],
        env=environment,
        capture_output=True,
        text=True,
    )
    if child.returncode and "one this processor has" in child.stderr:
        pytest.skip(f"this processor has no {cpu}")
    assert child.returncode == 0, child.stderr
    other = torch.load(tmp_path / "other.pt")
    assert len(other) == len(merged_here)
    for (case, here), there in zip(merged_here, other):
        assert torch.equal(here, there), case


def test_every_operator_has_an_oracle():
    listed = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("merge3::")}
    assert listed == set(OPS)


def test_operators_pass_opcheck():
    base, experts = make_case([16], 2, torch.float32)
    c = kernels.coefficients(1, 2)
    out = [torch.empty(16)]
    torch.library.opcheck(
        torch.ops.merge3.merge_.default,
        (
            out,
            base,
            experts,
            c,
            torch.ones(1),
            torch.arange(1),
            *[torch.empty(0, dtype=torch.int64)] * 2,
            [],
            1,
            1,
            True,
            0,
        ),
    )
    torch.library.opcheck(torch.ops.merge3.gram_.default, (torch.empty(1, 3, 3, dtype=torch.float64), base, experts))


def test_ties_of_zero_never_agree():
    # Two experts, one without a change: its weight must not enter the divisor.
    base, tau = torch.zeros(4), torch.tensor([0.5, -0.5, 0.25, 0.0])
    c = kernels.coefficients(1, 2)
    out = torch.empty(4)
    kernels.merge_([out], [base], [tau, base.clone()], c, torch.ones(1), Modes("all", "sum", True))
    assert torch.equal(out, tau)


def test_band_drops_both_ends():
    tau = torch.arange(1.0, 11.0)
    c = kernels.coefficients(1, 1)
    c[..., LO], c[..., HI], c[..., HI_SHARE] = 3.0, 8.0, 0.0
    out = torch.empty(10)
    kernels.merge_([out], [], [tau], c, torch.ones(1), Modes("band"))
    assert out.tolist() == [0, 0, 3, 4, 5, 6, 7, 0, 0, 0]
