"""What only a GPU can show: the CPU's bits, streams, graphs, no synchronisation, streamed tiers, overlap."""

import itertools

import pytest
import torch

from merge3 import Pool, Recipe, Slot, kernels
from merge3.errors import BadInput
from merge3.kernels import Modes
from tests.kernels.test_merge import SIZES, make_case, random_coefficients, run

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or "cuda" not in kernels.build_info()["devices"],
    reason="needs a GPU and a CUDA build",
)


def on_gpu(tensors):
    return [t.cuda() for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsify,elect", itertools.product(kernels.SPARSIFY, kernels.ELECT))
def test_cpu_and_gpu_give_the_same_bits(sparsify, elect, dtype):
    # Rows that take half a warp of threads, one and a part of another, or many, to their end or past it.
    sizes = [*SIZES, (300, 256), (300, 776), (3, 4 * kernels.CHUNK + 512), (40, 4104)]
    for count, normalize in ((1, True), (3, False), (3, True), (8, True)):
        base, experts = make_case(sizes, count, dtype, seed=count)
        c, lam = random_coefficients(len(base), count, seed=count)
        modes = Modes(sparsify, elect, normalize, 99)
        here = run(base, experts, c, lam, modes, dtype)
        there = run(on_gpu(base), on_gpu(experts), c, lam, modes, dtype)
        for h, t in zip(here, there):
            assert torch.equal(h.view(torch.uint8), t.cpu().view(torch.uint8))


def prepared_case(seed=0):
    base, experts = make_case([300_000, (70, 300)], 3, torch.bfloat16, seed)
    base, experts = on_gpu(base), on_gpu(experts)
    out = [torch.empty_like(b) for b in base]
    return out, base, experts, kernels.Prepared(out, base, experts, None, (), "magnitude")


def test_a_run_does_not_synchronise_and_a_graph_replays_what_is_uploaded():
    out, base, experts, prepared = prepared_case()
    modes, stream = Modes("magnitude", "sum", True), torch.cuda.Stream()
    cases = [random_coefficients(2, 3, seed) for seed in range(3)]
    expected = [run(base, experts, *case, modes, torch.bfloat16) for case in cases]
    prepared.upload(*cases[0])
    prepared.launch(modes)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pinned = [[x.pin_memory() for x in case] for case in cases]
        for case in pinned:
            prepared.upload(*case)
            prepared.launch(modes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        prepared.launch(modes)
    for case, wanted in zip(cases, expected):
        for o in out:
            o.zero_()
        prepared.upload(*case)
        graph.replay()
        assert all(torch.equal(o, w) for o, w in zip(out, wanted))


def test_work_goes_to_the_current_stream():
    out, base, experts, prepared = prepared_case()
    case = random_coefficients(2, 3)
    expected = run(base, experts, *case, Modes("magnitude"), torch.bfloat16)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds
        experts[0].neg_()
        prepared.upload(*case)
        prepared.launch(Modes("magnitude"))  # must come after the change, and before it is taken back
        experts[0].neg_()
    stream.synchronize()
    assert not torch.equal(out[0], expected[0])
    prepared.launch(Modes("magnitude"))
    assert torch.equal(out[0], expected[0])


def test_a_mix_of_devices_is_refused():
    base, experts = make_case([64], 2, torch.float32)
    with pytest.raises(BadInput, match=r"base\[0\]: on cpu, expected cuda:0, where experts\[0\] is"):
        kernels.merge_([torch.empty(64).cuda()], base, on_gpu(experts), kernels.coefficients(1, 2), torch.ones(1))
    with pytest.raises(BadInput, match=r"coefficients: expected a contiguous CPU tensor .* found 6 on cuda:0"):
        kernels.merge_(
            on_gpu([torch.empty(64)]), on_gpu(base), on_gpu(experts), kernels.coefficients(1, 2).cuda(), torch.ones(1)
        )


def test_a_merge_that_a_graph_could_not_repeat_is_refused_while_it_is_captured():
    out, base, experts, prepared = prepared_case()
    case = random_coefficients(2, 3)
    prepared.upload(*case)
    prepared.launch(Modes("magnitude"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.launch(Modes("magnitude"))
        with pytest.raises(BadInput, match=r"capture Prepared\.launch"):
            kernels.merge_(out, base, experts, *case, Modes("magnitude"))
        with pytest.raises(BadInput, match=r"capture Prepared\.launch"):
            kernels.gram(base, experts, 2)
    for o in out:
        o.zero_()
    graph.replay()  # what was refused has not spoilt the graph
    expected = run(base, experts, *case, Modes("magnitude"), torch.bfloat16)
    assert all(torch.equal(o, e) for o, e in zip(out, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_from_the_first():
    """Every kernel on cuda:1 while cuda:0 is current, and a mix of the two."""
    base, experts = make_case(SIZES, 3, torch.bfloat16)
    case, modes = random_coefficients(len(base), 3), Modes("magnitude", "sum", True)
    expected = run(base, experts, *case, modes, torch.bfloat16)
    there = lambda tensors: [t.to("cuda:1") for t in tensors]
    far = there(base), there(experts)
    assert torch.cuda.current_device() == 0
    found = run(*far, *case, modes, torch.bfloat16)
    out = [torch.empty_like(b) for b in far[0]]
    prepared = kernels.Prepared(out, *far, None, (), "magnitude")
    prepared.upload(*case)
    prepared.launch(modes)
    for wanted, one, other in zip(expected, found, out):
        assert torch.equal(one.cpu(), wanted) and torch.equal(other.cpu(), wanted)
    assert kernels.gram(*far, len(base)).isfinite().all()
    ranks = torch.tensor([[1, 5]] * len(base))
    here = kernels.order_statistics(base, experts, ranks)
    assert torch.equal(kernels.order_statistics(*far, ranks).value, here.value)
    kernels.elementwise_(out, *far, "unify", torch.ones(len(base)))
    kernels.pack(*far, len(base))
    kernels.rank_tables(*far, len(base))
    assert torch.cuda.current_device() == 0
    with pytest.raises(BadInput, match=r"base\[0\]: on cuda:0, expected cuda:1, where experts\[0\] is"):
        kernels.merge_(out, on_gpu(base), far[1], *case, modes)


@pytest.fixture(scope="module")
def wide():
    from merge3.world.family import make_family
    from tests.worlds import shared

    sizes = dict(layers=6, hidden_size=512, intermediate_size=1024, vocab_size=4000)
    yield from shared(make_family, dtype=torch.bfloat16, **sizes)


def recipe_of(models, method):
    sources = [{"model": m, "parameters": {"weight": 0.5, "density": 0.5}} for m in models[1:]]
    return Recipe.parse({"merge_method": method, "base_model": models[0], "models": sources})


@pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs", "della", "ramplus_tl"])
def test_every_tier_and_the_overlap_give_the_bits_of_the_cpu(wide, method, monkeypatch):
    models = [str(wide / n) for n in ("base", "e0", "e1", "e2")]
    here = Slot(Pool.open(models[0], models[1:]))
    here.swap(recipe_of(models, method), seed=4)
    expected = {n: p.clone() for n, p in here.model.named_parameters()}
    for budget, pinned in ((None, 0), ("60MiB", 1 << 40), ("60MiB", 0)):
        monkeypatch.setattr("merge3.pool.pinnable", lambda pinned=pinned: pinned)
        pool = Pool.open(models[0], models[1:], "cuda", memory_budget=budget)
        assert budget is None or (pool.memory.host if pinned else pool.memory.file) > 0
        for overlap in (False, True):
            slot = Slot(pool, overlap=overlap)
            for _ in range(2):
                slot.swap(recipe_of(models, method), seed=4)
                logits = slot.model(torch.tensor([[1, 2, 3]], device="cuda")).logits
            slot.swap(recipe_of(models, method), seed=4)
            slot._settle()
            assert logits.isfinite().all()
            for name, weight in slot.model.named_parameters():
                assert torch.equal(weight.cpu(), expected[name]), (budget, overlap, name)


def test_likelihoods_are_the_same_bits_each_time(wide):
    from merge3.tasks.lm import LM
    from merge3.tasks.requests import Choices

    slot = Slot(Pool.open(str(wide / "base"), [str(wide / "e0")], "cuda"))
    choices = tuple(tuple(range(10 + 40 * at, 10 + 40 * at + 30)) for at in range(8))
    question = LM(slot.model).loglikelihoods([Choices((1, 2, 3, 4 + at), choices) for at in range(40)])
    sums = lambda: [found.sums.tolist() for _, found in sorted(question(slot.model), key=lambda told: told[0])]
    first = sums()
    assert all(sums() == first for _ in range(5))
