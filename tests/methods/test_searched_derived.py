"""Merges by linear algebra on the way of every merge: slot, budget, export, and a search that derives once."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merge3 import METHODS, LocalEngine, Pool, Recipe, Registration, Slot, merge_to_disk, read_items
from merge3.client.run import evolve
from merge3.errors import CheckpointError, Merge3Warning, RecipeError
from merge3.export import check_recipe
from merge3.memory import FILE
from merge3.search.config_files import load_config
from merge3.world.family import make_family
from tests.methods.deriving import derived

WAYS = {
    "iso_c": {},
    "tsv_m": {},
    "wudi": {"steps": 20},
    "doge": {"steps": 20, "eta": 0.3},
}


def recipe_of(root, method, **parameters):
    models = [{"model": str(root / f"e{i}")} for i in range(3)]
    data = {"merge_method": method, "base_model": str(root / "base"), "models": models}
    return Recipe.parse(data | {"parameters": WAYS[method] | parameters})


def open_pool(root, **options):
    return Pool.open(str(root / "base"), [str(root / f"e{i}") for i in range(3)], **options)


def weights(slot):
    return {name: tensor.clone() for name, tensor in slot.model.state_dict().items()}


def equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture
def counted(monkeypatch):
    """Method -> names of the tensors that were derived."""
    found = {name: [] for name in WAYS}

    def counting(name, derive):
        def counted_derive(job, *given):
            found[name].append(job.name)
            return derive(job, *given)

        return counted_derive

    for name in WAYS:
        row = METHODS[name]
        monkeypatch.setitem(METHODS, name, replace(row, derive=counting(name, row.derive)))
    return found


@pytest.mark.parametrize("method", WAYS)
def test_slot_and_export_are_base_and_lambda_times_what_is_derived(family, tmp_path, method):
    base, *experts = (load_file(family / m / "model.safetensors") for m in ("base", "e0", "e1", "e2"))
    vectors = [{name: expert[name] - base[name] for name in base} for expert in experts]
    merged = derived(method, vectors, base, **WAYS[method])
    slot = Slot(open_pool(family))
    recipe = recipe_of(family, method, **{"lambda": 0.7})
    slot.swap(recipe)
    for name, weight in weights(slot).items():
        torch.testing.assert_close(weight, base[name] + 0.7 * merged[name], rtol=1e-5, atol=1e-6)
    merge_to_disk(recipe, tmp_path / "out")
    equal(load_file(tmp_path / "out" / "model.safetensors"), weights(slot))


@pytest.mark.parametrize("method", WAYS)
def test_bfloat16(bf16_family, tmp_path, method):
    slot = Slot(open_pool(bf16_family))
    slot.swap(recipe_of(bf16_family, method))
    merge_to_disk(recipe_of(bf16_family, method), tmp_path / "out")
    equal(load_file(tmp_path / "out" / "model.safetensors"), weights(slot))


def test_a_small_budget_gives_the_same_bits(tmp_path):
    """Tensors of several chunks; the derived models are streamed from their files, as endpoints from theirs."""
    make_family(tmp_path, layers=6, hidden_size=256, intermediate_size=512, vocab_size=700)
    found = []
    for budget in (None, "28MiB"):
        pool = open_pool(tmp_path, memory_budget=budget, derived_folder=tmp_path / "derived")
        slot = Slot(pool)
        for scale in (1.0, 0.3):  # the first makes the plan, the second follows it
            slot.swap(recipe_of(tmp_path, "doge", steps=3, **{"lambda": scale}))
        found.append(weights(slot))
        tiers = {pool.memory.tier(ref) for ref in pool.derived.refs()}
        assert (FILE in tiers) == (budget is not None)
        assert budget is None or pool.memory.total <= pool.memory.budget
    equal(*found)


@pytest.mark.parametrize("method", WAYS)
def test_every_layer_may_have_a_lambda_of_its_own(family, counted, method):
    """Without deriving anew."""
    slot = Slot(open_pool(family))
    slot.swap(recipe_of(family, method, **{"lambda": 1.0}))
    whole, count = weights(slot), len(counted[method])
    slot.swap(recipe_of(family, method, **{"lambda": [{"filter": "layers.1", "value": 0.0}, {"value": 1.0}]}))
    base = load_file(family / "base" / "model.safetensors")
    for name, weight in weights(slot).items():
        assert torch.equal(weight, base[name] if "layers.1." in name else whole[name]), name
    assert len(counted[method]) == count == len(base)


@pytest.mark.parametrize("method", WAYS)
def test_other_parameters_derive_another_expert(family, counted, method):
    slot = Slot(open_pool(family))
    changes = {name for name in METHODS[method].deriving if name != "weight"}
    others = {"closed": True, "mu": 0.5, "steps": 2, "learning_rate": 1e-3, "flatten": True}
    others |= {"eta": 0.1, "keep": 0.5, "subspace": 2, "others": False}
    slot.swap(recipe_of(family, method))
    once = len(counted[method])
    for number, name in enumerate(sorted(changes), 2):
        slot.swap(recipe_of(family, method, **{name: others[name]}))
        assert len(counted[method]) == number * once, name


def test_a_search_over_lambda_derives_once_and_another_run_finds_it(tiny_world, tmp_path, counted):
    config = yaml.safe_load((tiny_world / "evolve.yaml").read_text())
    config["genome"] |= {"merge_method": "iso_c", "layer_granularity": 2}
    config["optimizer"] |= {"budget": 12}
    config["genome"]["models"] = [str(tiny_world / model) for model in config["genome"]["models"]]
    config["genome"]["base_model"] = str(tiny_world / "base")
    config["tasks"] = [{"items": str(tiny_world / "english.jsonl")}]
    (tmp_path / "evolve.yaml").write_text(yaml.safe_dump(config))
    result = evolve(load_config(tmp_path / "evolve.yaml"), tmp_path / "run", quiet=True)
    tensors = len(load_file(tiny_world / "base" / "model.safetensors"))
    assert len(counted["iso_c"]) == tensors and result["candidates"] == 12
    assert len(list((tmp_path / "run" / "derived").iterdir())) == 1
    best = yaml.safe_load((tmp_path / "run" / "best.yaml").read_text())
    assert best["merge_method"] == "iso_c" and "lambda" in json.dumps(best)
    # Another engine, as of a run that is resumed.
    recipe = Recipe.from_yaml(tmp_path / "run" / "best.yaml")
    base, *experts = recipe.models()
    pool = Pool.open(base, experts, derived_folder=tmp_path / "run" / "derived")
    asked = Registration(tuple(read_items(tiny_world / "english.jsonl")[:8]))
    (evaluation,) = LocalEngine(pool).evaluate(asked, [recipe])
    assert evaluation.error is None and len(evaluation.responses) == 8 and len(counted["iso_c"]) == tensors
    slot = Slot(pool)
    slot.swap(recipe)
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, weight in weights(slot).items():
        assert name not in exported or torch.equal(weight, exported[name]), name


# -- what is refused, and what is said


@pytest.mark.parametrize("method, wrong", [
    ("wudi", {"steps": -1}), ("wudi", {"mu": 0.0}), ("wudi", {"mu": 1e-9}), ("wudi", {"mu": -1}),
    ("wudi", {"closed": 1}), ("wudi", {"learning_rate": float("inf")}), ("iso_c", {"lambda": "x"}),
    ("tsv_m", {"flatten": 0.5}),
])  # fmt: skip
def test_values_out_of_range(family, method, wrong):
    (name,) = wrong
    with pytest.raises(RecipeError, match=f"{name}: found"):
        check_recipe(recipe_of(family, method, **wrong), open_pool(family))


@pytest.mark.parametrize("method", WAYS)
def test_a_base_is_needed_and_an_expert(family, method):
    recipe = {"merge_method": method, "models": [{"model": str(family / "e0")}]}
    with pytest.raises(RecipeError, match="base_model: missing"):
        check_recipe(Recipe.parse(recipe), open_pool(family))
    recipe |= {"base_model": str(family / "base"), "models": [{"model": str(family / "base")}]}
    with pytest.raises(RecipeError, match="0 models beside the base; expected 1 to 8"):
        check_recipe(Recipe.parse(recipe), open_pool(family))


def test_a_weight_where_there_is_none_is_passed_over_aloud(family):
    recipe = recipe_of(family, "iso_c", weight=0.3)
    with pytest.warns(Merge3Warning, match="weight: ignored, iso_c has no such parameter"):
        check_recipe(recipe, open_pool(family))


@pytest.mark.parametrize("method", WAYS)
def test_infinite_weights_are_named(family, tmp_path, method):
    shutil.copytree(family, tmp_path / "family")
    tensors = load_file(tmp_path / "family" / "e1" / "model.safetensors")
    name = "model.layers.2.self_attn.q_proj.weight"
    tensors[name][3, 1] = float("nan")
    save_file(tensors, tmp_path / "family" / "e1" / "model.safetensors", metadata={"format": "pt"})
    pool = open_pool(tmp_path / "family", derived_folder=tmp_path / "derived")
    with pytest.raises(CheckpointError, match=f"e1: NaN or infinity in tensor '{name}'"):
        Slot(pool).swap(recipe_of(tmp_path / "family", method))
    assert not list((tmp_path / "derived").iterdir())
