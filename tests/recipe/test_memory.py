"""A pool within a memory budget: the plan, the same bits in every tier, and the resident memory it really takes."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge3 import Pool, Recipe, Slot, cgroups, planning
from merge3.checkpoint.layout import Ref
from merge3.errors import BadInput
from merge3.live.overlap import Overlap
from merge3.memory import DEVICE, FILE, HOST, parse_size, plan_memory
from merge3.methods import METHODS
from merge3.world.family import make_family
from tests.worlds import shared

MIB = 2**20


@pytest.mark.parametrize(
    "text,size", [(7, 7), ("20GiB", 20 * 2**30), ("1.5 gb", 1_500_000_000), ("512 MiB", 2**29), ("100", 100)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "20 GiBs", "-1", "0", "1e9"])
def test_bad_sizes(text):
    with pytest.raises(BadInput, match="memory_budget: found .*20GiB"):
        parse_size(text)


@settings(max_examples=100)
@given(
    st.lists(st.lists(st.integers(1, 64 * MIB), min_size=1, max_size=4), min_size=1, max_size=20),
    st.integers(0, 200 * MIB),
    st.integers(1, 2000 * MIB),
    st.integers(0, 500 * MIB),
)
def test_a_plan_keeps_to_its_budgets_and_places_every_tensor_once(sizes, slot, budget, host):
    groups = [{(g, i): size for i, size in enumerate(group)} for g, group in enumerate(sizes)]
    try:
        plan = plan_memory(groups, slot, "cuda", budget, host)
    except BadInput:
        assert slot + max(map(sum, sizes)) + budget // 8 + 2 * (4 * 65536 + 256) * 9 > budget
        return
    assert plan.total <= budget and plan.host <= host
    assert plan.resident + plan.host + plan.file == sum(map(sum, sizes))
    for tier, total in ((DEVICE, plan.resident), (HOST, plan.host), (FILE, plan.file)):
        assert total == sum(size for group in groups for key, size in group.items() if plan.tier(key) == tier)
    assert all(len({plan.tier(key) for key in group}) == 1 for group in groups)
    assert all(plan.streamed(group) <= plan.window for group in groups)


def test_a_gpu_without_room_for_all_gets_a_budget(wide_family, monkeypatch):
    """Without a GPU: plans read headers alone. Some of what is free is left for forwards."""
    base, *experts = (str(wide_family / name) for name in ("base", "e0", "e1"))
    pool = replace(Pool.open(base, experts), device=torch.device("cuda", 0))
    total = planning.plan_pool(pool, None, 0).total
    monkeypatch.setattr(planning, "FORWARDS", total // 4)
    free = lambda size: monkeypatch.setattr(planning, "available", lambda device: size)
    free(2 * total)
    assert planning.limits(pool, None) == (None, 0) and not pool.warnings
    free(total)
    budget, host = planning.limits(pool, None)
    assert budget == total - total // 4 and host > 0 and not pool.warnings  # nothing that --strict would refuse
    assert planning.plan_pool(pool, budget, host).total <= budget
    said = pool.notes[-1]
    assert "--memory-budget" in said and "cuda:0" in said
    free(total // 4)
    with pytest.raises(BadInput, match="cuda:0: .* free, .* for forwards; expected at least .*: the live model"):
        planning.limits(pool, None)
    free(total // 2)
    with pytest.raises(BadInput, match="memory_budget: found .*, and .* are free on cuda:0"):
        planning.limits(pool, 4 * total)
    assert planning.limits(replace(pool, device=torch.device("cpu")), None) == (None, 0)


def test_free_memory_is_that_of_the_container(tmp_path):
    (tmp_path / "groups").write_text("0::/job/step\n")
    job, step = tmp_path / "mount/job", tmp_path / "mount/job/step"
    step.mkdir(parents=True)
    (job / "memory.max").write_text("1000\n"), (job / "memory.current").write_text("700\n")
    (job / "memory.stat").write_text("anon 400\ninactive_file 250\n")
    (step / "memory.max").write_text("max\n"), (step / "memory.current").write_text("700\n")
    assert cgroups.memory_left(tmp_path / "groups", tmp_path / "mount") == [550]
    (tmp_path / "old").write_text("3:memory:/x\n")
    old = tmp_path / "mount/memory/x"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("90\n"), (old / "memory.usage_in_bytes").write_text("100\n")
    assert cgroups.memory_left(tmp_path / "old", tmp_path / "mount") == [0]
    assert cgroups.memory_left(tmp_path / "none") == []


@pytest.fixture(scope="module")
def wide_family():
    """Tensors of more than one chunk, 13 MB a model in float32; the embedding takes three chunks."""
    yield from shared(make_family, layers=6, hidden_size=256, intermediate_size=512, vocab_size=700)


RECIPES = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.1},
    "breadcrumbs_ties": {"density": 0.7, "gamma": 0.02},
    "sce": {},
    "karcher": {},
    "model_stock": {},
    "ramplus_tl": {},
}


@pytest.mark.parametrize("method", sorted(RECIPES))
def test_every_tier_gives_the_same_bits(wide_family, method):
    models = [str(wide_family / n) for n in ("base", "e0", "e1", "e2")]
    parameters = dict(RECIPES[method]) | ({"weight": 0.4} if "weight" in METHODS[method].parameters else {})
    sources = [{"model": m, "parameters": parameters} for m in models[1:]]
    base = {} if METHODS[method].base == "source" else {"base_model": models[0]}
    recipe = Recipe.parse({"merge_method": method, "models": sources, **base})
    found = []
    for budget in (None, "40MiB", "28MiB"):
        pool = Pool.open(models[0], models[1:], memory_budget=budget)
        slot = Slot(pool)
        slot.swap(recipe, seed=3)
        first = {n: p.clone() for n, p in slot.model.named_parameters()}
        staged = Slot(pool, overlap=True)
        staged.swap(recipe, seed=3)
        assert all(torch.equal(first[n], p) for n, p in staged.model.named_parameters())
        slot.load(models[2])
        assert torch.equal(slot.model.lm_head.weight, pool.get(Ref(models[2], "lm_head.weight")))
        slot.swap(recipe, seed=3)
        assert all(torch.equal(first[n], p) for n, p in slot.model.named_parameters())
        found.append((pool.memory, pool.content_hashes(), first))
    assert found[0][0].file == 0 < found[1][0].file < found[2][0].file
    assert all(hashes == found[0][1] for _, hashes, _ in found)
    for _, _, weights in found[1:]:
        assert all(torch.equal(found[0][2][n], w) for n, w in weights.items())


def test_an_overlapped_swap_is_waited_for_layer_by_layer(family):
    """The stages a forward pass waits for, in the order of the layers; without a GPU the waiting is recorded here."""
    waited = []

    class Waiting(Overlap):
        def run(self, stages):
            for stage, merge in stages:
                merge()
                self._pending[stage] = stage

        def _wait(self, stage, *_):
            if self._pending.pop(stage, "none") != "none":
                waited.append(stage)

    pool = Pool.open(str(family / "base"), [str(family / "e0")])
    slot = Slot(pool)
    slot._overlap = Waiting(slot.model, pool.layouts[pool.base], torch.device("cpu"))
    recipe = Recipe.parse(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(family / "base"),
            "models": [{"model": str(family / "e0"), "parameters": {"weight": 0.5}}],
        }
    )
    for _ in range(2):
        slot.swap(recipe)
        slot.model(torch.tensor([[1, 2, 3]]))
        slot.model(torch.tensor([[1, 2, 3]]))
        assert waited == [None, 0, 1, 2, 3]
        waited.clear()
    slot.swap(recipe)
    slot.load(str(family / "e0"))  # must not be overtaken by what is still under way
    assert waited == [None, 0, 1, 2, 3]


def test_endpoints_of_other_dtypes_are_converted_in_parts(wide_family, tmp_path):
    """A bfloat16 expert beside a float32 base: streamed, the same bits as resident."""
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(wide_family / "e0", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    models, found = [str(wide_family / "base"), str(tmp_path / "half"), str(wide_family / "e1")], []
    sources = [{"model": m, "parameters": {"weight": 0.4, "density": 0.5}} for m in models[1:]]
    for budget in (None, "24MiB"):
        pool = Pool.open(models[0], models[1:], memory_budget=budget)
        slot = Slot(pool)
        slot.swap(Recipe.parse({"merge_method": "ties", "base_model": models[0], "models": sources}))
        found.append([p.clone() for p in slot.model.parameters()])
    assert pool.memory.file > 0 and all(torch.equal(a, b) for a, b in zip(*found))


def test_a_budget_too_small_says_what_is_needed(wide_family):
    with pytest.raises(
        BadInput, match=r"memory_budget: found 14.0 MiB; expected at least \d+.\d MiB: the live model takes 1\d.\d MiB"
    ):
        Pool.open(str(wide_family / "base"), [str(wide_family / "e0")], memory_budget="14MiB")


CHILD = """
import json, sys
import torch, transformers
from transformers import LlamaForCausalLM  # what the models need, before the count begins
from merge3 import Pool, Recipe, Slot

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

models, budget = json.loads(sys.argv[1]), sys.argv[2]
small = Pool.open(sys.argv[3], [])
Slot(small).model(torch.tensor([[1, 2, 3]]))
before = status("VmRSS")
pool = Pool.open(models[0], models[1:], memory_budget=budget or None)
pool.read_all()
slot = Slot(pool)
for density in (0.3, 0.6):
    sources = [{"model": m, "parameters": {"weight": 0.5, "density": density}} for m in models[1:]]
    slot.swap(Recipe.parse({"merge_method": "ties", "base_model": models[0], "models": sources}))
print(json.dumps({"taken": status("VmHWM") - before, "plan": pool.memory.total, "file": pool.memory.file}))
"""


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_budget_bounds_resident_memory(family, tmp_path):
    """A process of its own holds a base and three experts, 50 M parameters each in float32, within 480 MiB."""
    make_family(tmp_path, layers=4, hidden_size=768, intermediate_size=2560, vocab_size=8000)
    models = json.dumps([str(tmp_path / n) for n in ("base", "e0", "e1", "e2")])
    taken = {}
    for budget in ("", "480MiB"):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, models, budget, str(family / "base")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        taken[budget] = json.loads(done.stdout.splitlines()[-1])
    for found in taken.values():
        assert 0.9 * found["plan"] < found["taken"] < 1.1 * found["plan"], found
    assert taken["480MiB"]["file"] > 0 and taken["480MiB"]["plan"] <= 480 * MIB
