"""A pool that holds its experts compacted: the same merges as of experts that were compacted by other means."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge3 import LocalEngine, Pool, Recipe, Registration, Slot
from merge3.checkpoint.layout import Ref
from merge3.engine import Taken
from merge3.errors import BadInput, CheckpointError, ConfigError
from merge3.export import merge_to_disk
from merge3.live import held
from merge3.methods import METHODS
from merge3.space import SpaceDefinition
from merge3.tasks import read_items
from tests.experts.compacting import bits, residual, write

OPTIONS = ["residual:0.15", "int8"]
PARAMETERS = {
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.1},
    "breadcrumbs_ties": {"density": 0.7, "gamma": 0.02},
}
ALONE = {"t": 0.4, "k": 8}


def opened(names, option="full", **settings):
    return Pool.open(names[0], names[1:], experts_as=option, **settings)


def recipe_of(method, names, **common):
    row, (base, *experts) = METHODS[method], names
    takes = experts[: row.experts[1]]
    own = dict(PARAMETERS.get(method, {}))
    if "weight" in row.parameters:
        own["weight"] = 0.4
    shared = {name: ALONE[name] for name in row.parameters if name in ALONE}
    data = {"merge_method": method, "models": [{"model": m, "parameters": own} for m in takes]} | common
    if shared:
        data["parameters"] = shared
    return Recipe.parse(data | ({} if row.base == "source" else {"base_model": base}))


def swapped(pool, recipe, **how):
    slot = Slot(pool)
    slot.swap(recipe, seed=3, **how)
    return {name: weight.clone() for name, weight in slot.model.named_parameters()}


def same(a, b):
    return all(torch.equal(bits(a[name]), bits(b[name])) for name in a)


def names_of(folder, experts=3):
    return [str(folder / name) for name in ("base", *(f"e{i}" for i in range(experts)))]


@pytest.fixture(scope="module", params=OPTIONS)
def both(request, bf16_family, tmp_path_factory):
    """(a pool that compacts, one of experts that were compacted before, their names): bfloat16, where |τ| tie."""
    folder = tmp_path_factory.mktemp("compacted")
    experts = [Path(name) for name in names_of(bf16_family)[1:]]
    other = write(folder, bf16_family / "base", experts, request.param)
    return opened(names_of(bf16_family), request.param), opened(other), names_of(bf16_family), other


def test_every_method_merges_what_is_held(both):
    """Those the kernel reads as they are held, those that want whole tensors, those that derive an expert of all."""
    compact, full, names, other = both
    slots, known = [Slot(compact), Slot(full)], []
    for method, row in METHODS.items():
        recipes = []
        for own in (names, other):
            try:
                recipes.append(recipe_of(method, own))
            except BadInput:
                break
        if len(recipes) < 2 or (row.derive is not None and method != "iso_c"):  # one of those that take longest
            continue
        try:
            for slot, recipe in zip(slots, recipes):
                slot.swap(recipe, seed=3)
        except BadInput:
            continue  # wants other parameters than these; refused alike, which the count below bounds
        weights = [dict(slot.model.named_parameters()) for slot in slots]
        assert same(*weights), method
        known.append(method)
    assert len(known) >= 18, known


def test_statistics_are_of_what_is_held(both):
    compact, full, names, other = both
    for name in ("model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        for pool, (base, expert, *_) in ((compact, names), (full, other)):
            pool.statistics.prefetch_order([(Ref(base, name), Ref(expert, name), (5, 50))])
        found = [
            (
                p.statistics.gram(Ref(b, name), (Ref(e, name),)).tolist(),
                p.statistics.order(Ref(b, name), Ref(e, name), 50),
            )
            for p, (b, e, *_) in ((compact, names), (full, other))
        ]
        assert found[0] == found[1]
        assert torch.equal(compact.get(Ref(names[1], name)), full.get(Ref(other[1], name)))


def test_a_budget_changes_no_bits(both):
    """The base streamed: slices are expanded through the window."""
    compact, _, names, _ = both
    recipe = recipe_of("dare_ties", names)
    option, plan = str(compact.compacted.experts), compact.memory
    tight = opened(names, option, memory_budget=plan.slot + plan.compact + plan.window + 20_000)
    assert tight.memory.file > 0 and tight.memory.compact == plan.compact
    assert same(swapped(tight, recipe), swapped(compact, recipe))
    assert same({"x": tight.get(Ref(names[1], "lm_head.weight"))}, {"x": compact.get(Ref(names[1], "lm_head.weight"))})
    with pytest.raises(BadInput, match=r"memory_budget: found 0.1 MiB; .*compacted experts"):
        opened(names, option, memory_budget=100_000)


def test_the_kernel_reads_them_as_they_are_held(both, monkeypatch):
    """Of an ordinary merge no expert is expanded; without that kernel slices are, to the same bits."""
    compact, _, names, _ = both
    recipe, slot = recipe_of("ties", names), Slot(compact)
    slot.swap(recipe)
    direct = {name: weight.clone() for name, weight in slot.model.named_parameters()}
    expanded = []
    part = type(compact.compacted).part
    monkeypatch.setattr(type(compact.compacted), "part", lambda self, *a: expanded.append(a) or part(self, *a))
    slot.swap(recipe)
    assert not expanded
    monkeypatch.setattr(held, "readable", lambda step, pool: False)
    monkeypatch.setattr("merge3.live.writing.readable", lambda step, pool: False)
    slot.swap(recipe)
    assert expanded and same(direct, dict(slot.model.named_parameters()))


def test_density_that_covers_all_is_the_full_pool(family):
    names = names_of(family)
    full, compact = opened(names), opened(names, "residual:1")
    recipe = recipe_of("dare_ties", names)
    assert same(swapped(full, recipe), swapped(compact, recipe))
    assert all(
        loss.error == 0 and "nothing is lost" in loss.describe("residual:1") for loss in compact.compacted.losses
    )


def test_experts_that_differ_sparsely_lose_nothing(family, tmp_path):
    """A twentieth of the elements changed, as by a fine-tune of few weights: a tenth kept is exact, and small."""
    shutil.copytree(family / "base", tmp_path / "base")
    shutil.copytree(family / "base", tmp_path / "e0")
    weights, draw = load_file(family / "base" / "model.safetensors"), torch.Generator().manual_seed(0)
    for tensor in weights.values():
        tensor += torch.randn(tensor.shape, generator=draw) * (torch.rand(tensor.shape, generator=draw) < 0.04)
    save_file(weights, tmp_path / "e0" / "model.safetensors", {"format": "pt"})
    names = names_of(tmp_path, 1)
    compact = opened(names, "residual:0.1")
    (loss,) = compact.compacted.losses
    assert loss.error == 0 and loss.energy == 1 and 0.03 < loss.kept < 0.05
    assert same(swapped(opened(names), recipe_of("ties", names)), swapped(compact, recipe_of("ties", names)))


def test_endpoints_and_exports_are_of_the_files(both, tmp_path):
    compact, _, names, _ = both
    full, recipe = opened(names), recipe_of("dare_ties", names)
    slot, plain = Slot(compact), Slot(full)
    for pool_slot in (slot, plain):
        pool_slot.load(names[1])
    assert same(*(dict(s.model.named_parameters()) for s in (slot, plain)))
    slot.load(names[1], stored=False)
    assert not same(*(dict(s.model.named_parameters()) for s in (slot, plain)))
    assert same(swapped(compact, recipe, stored=True), swapped(full, recipe))
    assert not same(swapped(compact, recipe), swapped(full, recipe))
    LocalEngine(compact).export(recipe, tmp_path / "merged", 3)
    merge_to_disk(recipe, tmp_path / "expected", full, 3)
    merge_to_disk(recipe, tmp_path / "by-hand", compact, 3)
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("merged", "expected", "by-hand")]
    assert files[0] == files[1] == files[2]
    assert compact.content_hashes() == full.content_hashes()


def test_subjects_say_which_weights(tiny_world, tmp_path):
    """A recipe is of what is held, an endpoint of its files; each can be asked the other way."""
    names = [str(tiny_world / name) for name in ("base", "english", "italian")]
    other = write(tmp_path, tiny_world / "base", [Path(name) for name in names[1:]], "residual:0.1")
    asked = Registration(tuple(read_items(tiny_world / "english.jsonl")[:3]))
    engine, recipe, shown = LocalEngine(opened(names, "residual")), recipe_of("ties", names), []
    info = engine.info()
    assert info.experts == "residual:0.1" and [loss.model for loss in info.losses] == names[1:]
    assert [note for note in info.notes if "residual:0.1" in note] == [x.describe("residual:0.1") for x in info.losses]
    for subject in (recipe, Taken(recipe, True), names[1], Taken(names[1], False)):
        (evaluation,) = engine.evaluate(asked, [subject])
        assert evaluation.error is None
        shown.append({name: weight.clone() for name, weight in engine.slot.model.named_parameters()})
    for index, (own, what) in enumerate(((other, recipe_of("ties", other)), (names, recipe), (names, names[1]))):
        slot = Slot(opened(own))
        slot.load(what) if isinstance(what, str) else slot.swap(what)
        assert same(shown[index], dict(slot.model.named_parameters())), index
    assert not same(shown[2], shown[3])


def test_tied_outputs_are_held_once(tied_family, tmp_path):
    """Where one model stores an output that the others tie, theirs is the table they share; its own is compacted too,
    as what it differs from the base's by, which is that table."""
    shutil.copytree(tied_family / "e1", tmp_path / "own")
    weights = load_file(tied_family / "e1" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 1.1
    save_file(weights, tmp_path / "own" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "own" / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    names = [*names_of(tied_family, 1), str(tmp_path / "own")]
    compact = opened(names, "residual:0.2")
    head, table = (Ref(names[1], name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    assert not compact.resident((head,)) and torch.equal(compact.get(head), compact.get(table))
    assert set(compact.compacted.aliases) == {head}
    theta = compact.get(Ref(names[0], "model.embed_tokens.weight"))
    expected = residual(theta, weights["lm_head.weight"], 0.2)
    assert torch.equal(compact.get(Ref(names[2], "lm_head.weight")), expected)
    recipe = recipe_of("ties", names)
    direct, tight = swapped(compact, recipe), opened(names, "residual:0.2", memory_budget=compact.memory.total - 20_000)
    assert tight.memory.file > 0 and same(direct, swapped(tight, recipe))


def test_what_is_derived_is_kept_apart(both, tmp_path):
    """Of one folder for derived experts, each option has its own."""
    _, _, names, _ = both
    recipe = recipe_of("tsv_m", names)
    found = [swapped(opened(names, option, derived_folder=tmp_path), recipe) for option in ("full", "int8")]
    again = [swapped(opened(names, option, derived_folder=tmp_path), recipe) for option in ("full", "int8")]
    assert same(found[0], again[0]) and same(found[1], again[1]) and not same(*found)


def test_what_cannot_be_compacted_is_refused(family, tmp_path):
    names = names_of(family)
    with pytest.raises(BadInput, match=r"experts: residual:0.1 of .*base alone; expected models beside the base"):
        Pool.open(names[0], [], experts_as="residual")
    with pytest.raises(BadInput, match=r"experts: found 'residual:2'; expected full, int8"):
        opened(names, "residual:2")
    shutil.copytree(family / "e0", tmp_path / "bad")
    weights = load_file(family / "e0" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"bad: NaN or infinity in tensor 'model.layers.1.mlp.up_proj.weight'"):
        Pool.open(names[0], [str(tmp_path / "bad")], experts_as="int8")


def test_a_path_and_what_is_learned_want_whole_experts(family):
    names = names_of(family)
    engine = LocalEngine(opened(names, "int8"))
    definition = SpaceDefinition(tuple(names[1:]), "passthrough", kind="path", max_hops=6)
    with pytest.raises(ConfigError, match="a path, with experts held as int8; expected full"):
        engine.space(definition)
    with pytest.raises(BadInput, match="experts: experts held as int8; expected full: what is learned"):
        engine._learning.lessons(Registration(()), recipe_of("ties", names), {})
