"""What a recipe with a result per task may not be: one line, before anything is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge3 import Pool, Recipe, Slot, merge_to_disk
from merge3.errors import BadInput, CheckpointError, RecipeError
from merge3.export import check_recipe
from merge3.export_task import merge_task
from merge3.methods import METHODS
from merge3.methods.variants import common_of, tasks_of
from merge3.variants import Variants
from tests.variants.making import recipe_of, same, stored, with_adapter
from tests.worlds import shared


@pytest.fixture(scope="module")
def small():
    from merge3.world.family import make_family

    yield from shared(make_family, experts=2, layers=2)


def refused(recipe, tmp_path, pattern, kind=RecipeError, pool=None, at_once=True):
    """By a dry run too, where weights need not be read for it."""
    ways = [lambda: merge_to_disk(recipe, tmp_path / "out"), lambda: merge_task(recipe, "e0", tmp_path / "out")]
    if at_once:
        models = recipe.models()
        pool = pool or Pool.open(models[0], models[1:])
        ways += [lambda: check_recipe(recipe, pool), lambda: Slot(pool).swap(recipe, task="e0")]
    for way in ways:
        with pytest.raises(kind, match=pattern) as found:
            way()
        assert "\n" not in str(found.value) and len(str(found.value)) < 600
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


BAD = [
    ("emr", "rescale", "pap", r"parameters.rescale: found 'pap'; expected paper or code"),
    ("emr", "rescale", ["paper", "code"], r"parameters.rescale: found \['paper', 'code'\]; expected one value"),
    ("emr", "merger", "ties", r"parameters.merger: found 'ties'; expected emr_unified, as emr has it"),
    ("byom_fft", "share", 0, r"parameters.share: found 0; expected a value in \(0, 1\]"),
    ("byom_fft", "share", 1.01, r"parameters.share: found 1.01"),
    ("byom_fft", "share", float("nan"), r"parameters.share: found nan"),
    ("byom_fft", "share", True, r"parameters.share: found True"),
    ("byom_fft", "share", "much", r"parameters.share: found 'much'"),
    ("byom_fft", "share", [0.1, 0.2], r"parameters.share: found \[0.1, 0.2\]; expected one value for the whole model"),
    ("byom_fft", "share", [{"filter": "mlp", "value": 0.1}, {"value": 0.2}], r"parameters.share: found \[\{"),
    ("byom_fft", "merger", "nonsense", r"parameters.merger: found 'nonsense'; expected linear"),
    ("byom_fft", "merger", "emr", r"parameters.merger: found 'emr'"),
    ("byom_fft", "merger", ["ties"], r"parameters.merger: found \['ties'\]"),
    ("byom_fft", "merger", 3, r"parameters.merger: found 3"),
    ("byom_fft", "density", 7, r"parameters.density: found 7; expected a value in \[0, 1\]"),
    ("onebit", "binary", "yes", r"parameters.binary: found 'yes'; expected true or false"),
    ("onebit", "binary", [True, False], r"parameters.binary: found \[True, False\]; expected a value, or \{filter"),
    ("onebit", "binary", [{"filter": "mlp", "value": [True, False]}, {"value": True}], r"no list over layers"),
    ("onebit", "binary", False, r"no tensor that differs between tasks"),
    ("onebit", "binary", [{"filter": "nowhere", "value": True}, {"value": False}], r"no tensor that differs"),
]


@pytest.mark.parametrize("name, parameter, value, pattern", BAD, ids=[f"{m} {p} {v}"[:40] for m, p, v, _ in BAD])
def test_parameters(small, tmp_path, name, parameter, value, pattern):
    try:
        recipe = recipe_of(small / "base", [small / "e0", small / "e1"], name, {parameter: value})
    except RecipeError as error:  # a number that no recipe may hold
        assert f"parameters.{parameter}: found nan" in str(error)
        return
    refused(recipe, tmp_path, pattern)


def test_numbers_as_text_count_and_nothing_said_is_the_default(small, tmp_path):
    for number, value in enumerate((0.05, "0.05", None)):
        recipe = recipe_of(small / "base", [small / "e0", small / "e1"], "byom_fft", {"share": value})
        merge_to_disk(recipe, tmp_path / str(number))
    kept = [Variants.open(tmp_path / str(number)).tasks["e0"]["kept"] for number in range(3)]
    assert kept[0] == kept[1] and abs(kept[2] - 2 * kept[0]) <= 1


def test_tasks(small, tmp_path):
    base, e0, e1 = (str(small / name) for name in ("base", "e0", "e1"))
    one = lambda models=(e0, e1), **more: recipe_of(base, models, "emr", **more)
    refused(one(tasks={"e0": e0, "e1": "nowhere"}), tmp_path, r"tasks.e1: 'nowhere' is not merged; expected .*e0, .*e1")
    refused(one(tasks={"e0": base}), tmp_path, r"tasks.e0: '.*base' is not merged")
    refused(one((e0,)), tmp_path, r"models: 1 beside the base; expected 2 or more for emr")
    refused(one((e0, base)), tmp_path, r"models: 1 beside the base")
    shutil.copytree(small / "e1", tmp_path / "other" / "e0")
    twins = (e0, str(tmp_path / "other" / "e0"))
    refused(one(twins), tmp_path, r"tasks: .*e0 and .*other/e0 would both be 'e0'; expected `tasks:`, a name for each")
    merge_to_disk(one(twins, tasks={"a": twins[0], "b": twins[1]}), tmp_path / "named")
    assert list(Variants.open(tmp_path / "named").tasks) == ["a", "b"]
    for path in ("..", "/", "some/.hidden"):
        with pytest.raises(RecipeError, match=r"tasks: no name for .* in its path; expected `tasks:`"):
            tasks_of(one((e0, path)))
    for name in ("a/b", ".a", "", " "):
        with pytest.raises(RecipeError, match="names of tasks, without a slash"):
            one(tasks={name: e0})
    for tasks in ([e0], "e0", {"a": {"path": e0}}, {"a": ""}):
        with pytest.raises(RecipeError, match="tasks"):
            one(tasks=tasks)
    some = one(tasks={"e1": e1})  # of one expert nobody wants the variant
    assert list(merge_to_disk(some, tmp_path / "some")["variants"]["tasks"]) == ["e1"]


def test_ordinary_recipes_have_no_tasks(small, tmp_path):
    base, experts = str(small / "base"), [str(small / "e0"), str(small / "e1")]
    plain = recipe_of(base, experts, "ties", {"weight": 1.0, "density": 0.5})
    with pytest.raises(RecipeError, match="ties, which makes one model for all tasks; expected with a task one of emr"):
        merge_task(plain, "e0", tmp_path / "out")
    slot = Slot(Pool.open(base, experts))
    for call in (lambda: slot.swap(plain, task="e0"), lambda: slot.variants(plain)):
        with pytest.raises(
            RecipeError, match="ties makes one model for all tasks; expected a method with one for each"
        ):
            call()
    for key, value in (("tasks", {"e0": experts[0]}), ("router", {"items": ["x.jsonl"]})):
        found = recipe_of(base, experts, "ties", {"weight": 1.0, "density": 0.5}, **{key: value})
        with pytest.raises(RecipeError, match=f"{key}: `{key}:` in a recipe of ties, which makes one model for all"):
            merge_to_disk(found, tmp_path / "out")


def test_slices_fits_and_places(small, tmp_path):
    base, e0, e1 = (str(small / name) for name in ("base", "e0", "e1"))
    sources = [{"model": model, "layer_range": [0, 2]} for model in (e0, e1)]
    sliced = Recipe.parse({"merge_method": "emr", "base_model": base, "slices": [{"sources": sources}]})
    refused(sliced, tmp_path, r"slices: emr over slices; expected `models`")
    for section in ("fit", "surgery"):
        recipe = recipe_of(base, [e0, e1], "emr", **{section: {"items": ["x.jsonl"]}})
        refused(recipe, tmp_path, f"{section}: `{section}:` in a recipe of emr, which makes a model for each task")
    data = recipe_of(base, [e0, e1], "byom_fft").to_dict()
    data["models"][1]["parameters"] = {"share": 0.5}
    refused(Recipe.parse(data), tmp_path, r"models\[1\].parameters.share: stands under a model")
    with pytest.raises(RecipeError, match="`share` under `parameters`"):
        recipe_of(base, [e0, e1], "byom_fft", share=0.5)


def test_without_a_base(small, tmp_path):
    e0, e1 = str(small / "e0"), str(small / "e1")
    recipe = lambda name, **parameters: Recipe.parse(
        {"merge_method": name, "models": [{"model": e0}, {"model": e1}], "parameters": parameters}
    )
    for name in ("emr", "byom_fft", "onebit"):
        refused(recipe(name), tmp_path, r"base_model")
    refused(recipe("onebit", merger="linear", weight=1.0), tmp_path, r"base_model: none for tensor .*; expected a base")
    merge_task(recipe("byom_fft", merger="linear", weight=1.0, share=1.0), "e1", tmp_path / "e1")  # needs none
    assert same(stored(tmp_path / "e1"), stored(small / "e1")) == []


def test_an_average_without_the_base_is_a_merger_of_what_is_not_binary(small, tmp_path):
    binary = [{"filter": "mlp", "value": True}, {"value": False}]
    parameters = {"merger": "linear", "weight": 1.0, "binary": binary}
    merge_to_disk(recipe_of(small / "base", [small / "e0", small / "e1"], "onebit", parameters), tmp_path / "packed")
    variants = Variants.open(tmp_path / "packed")
    for name, base in stored(small / "base").items():
        tau = load_file(small / "e0" / "model.safetensors")[name] - base
        if "mlp" in name:
            assert torch.equal(variants.common.get(name), base)
            expected = base + tau.abs().mean() * torch.where(tau >= 0, 1.0, -1.0)
            torch.testing.assert_close(variants.tensor(name, "e0"), expected)
        else:
            assert torch.equal(variants.tensor(name, "e0"), variants.common.get(name))


# -- weights that are odd


@pytest.mark.parametrize("name", ["emr", "byom_fft", "onebit"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(small, tmp_path, name, value):
    shutil.copytree(small / "e0", tmp_path / "e0")
    tensors = load_file(small / "e0" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    save_file(tensors, tmp_path / "e0" / "model.safetensors", {"format": "pt"})
    recipe = recipe_of(small / "base", [tmp_path / "e0", small / "e1"], name)
    pattern = r"NaN or infinity in tensor 'model.layers.1.mlp.up_proj.weight'"
    refused(recipe, tmp_path, pattern, (RecipeError, CheckpointError), at_once=False)
    pool = Pool.open(str(small / "base"), [str(tmp_path / "e0"), str(small / "e1")])
    with pytest.raises(BadInput, match="NaN or infinity in tensor"):
        Slot(pool).swap(recipe, task="e0")


@pytest.mark.parametrize("name", ["emr", "byom_fft", "onebit"])
def test_an_expert_that_is_the_base(small, tmp_path, name):
    """Its own variant is the base; where nothing differs at all there is nothing to pack."""
    shutil.copytree(small / "base", tmp_path / "same")
    recipe = recipe_of(small / "base", [tmp_path / "same", small / "e1"], name, {"share": 1, "binary": True})
    merge_to_disk(recipe, tmp_path / "packed")
    merge_task(recipe, "same", tmp_path / "task")
    assert same(stored(tmp_path / "task"), stored(small / "base")) == []
    nothing = recipe_of(small / "base", [tmp_path / "same"], "byom_fft", tasks={"e0": str(tmp_path / "same")})
    refused(nothing, tmp_path, "no tensor that differs between tasks; expected at least one", at_once=False)


# -- adapters


@pytest.fixture
def adapters(small, tmp_path):
    with_adapter(tmp_path / "a", small / "base", rank=6)
    with_adapter(tmp_path / "b", small / "base", rank=2, seed=1)
    return [f"{small / 'base'}+{tmp_path / name}" for name in ("a", "b")]


def test_whole_models_are_no_adapters(small, tmp_path, adapters):
    one = lambda models: recipe_of(small / "base", models, "byom_lora", {"rank": 3}, tasks={"e0": str(models[0])})
    expected = r"models\[\d\]: .*; expected a LoRA adapter on the base: `base\+adapter`"
    refused(one([str(small / "e0"), str(small / "e1")]), tmp_path, expected)
    refused(one([adapters[0], str(small / "e1")]), tmp_path, expected)
    shutil.copytree(small / "e1", tmp_path / "otherbase")
    refused(one([f"{tmp_path / 'otherbase'}+{tmp_path / 'a'}"]), tmp_path, expected)
    with pytest.raises(RecipeError, match=r"parameters.rank: found 0; expected a value in \[1, inf\]"):
        merge_to_disk(recipe_of(small / "base", adapters, "byom_lora", {"rank": 0}), tmp_path / "out")


def test_ranks_larger_than_an_adapter_has(small, tmp_path, adapters):
    """All of it is kept: the expert, but for rounding."""
    merge_to_disk(recipe_of(small / "base", adapters, "byom_lora", {"rank": 500}), tmp_path / "packed")
    variants, pool = Variants.open(tmp_path / "packed"), Pool.open(str(small / "base"), adapters)
    for task, model in zip(("a", "b"), adapters):
        assert variants.tasks[task]["lost"] == pytest.approx(0, abs=1e-6)
        for name in pool.endpoints[model].tensors:
            torch.testing.assert_close(variants.tensor(name, task), pool.endpoints[model].get(name), atol=1e-5, rtol=0)
    assert variants.parts.tensors["b/left/model.layers.0.self_attn.q_proj.weight"].shape == (32, 2)


def test_scales_of_single_modules_are_found_as_peft_finds_them(small, tmp_path):
    """Patterns are regular expressions for the end of a module's name, and the first that fits counts."""
    patterns = {r"layers\.[0-1]\..*": 48.0, "down_proj": 3.0, "proj": 30.0}
    with_adapter(tmp_path / "a", small / "base", rank=2, alpha_pattern=patterns)
    model = f"{small / 'base'}+{tmp_path / 'a'}"
    merge_to_disk(recipe_of(small / "base", [model], "byom_lora", {"rank": 2}), tmp_path / "packed")
    variants, pool = Variants.open(tmp_path / "packed"), Pool.open(str(small / "base"), [model])
    for name in variants.tasks["a"]["varied"]:
        torch.testing.assert_close(variants.tensor(name, "a"), pool.endpoints[model].get(name), atol=1e-4, rtol=1e-4)


def told(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def edited(folder, edit):
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors, next(name for name in tensors if "lora_A" in name))
    save_file(tensors, folder / "adapter_model.safetensors")


ODD = {
    "DoRA": (lambda f: told(f, use_dora=True), "a DoRA adapter; expected plain LoRA"),
    "not LoRA": (lambda f: told(f, peft_type="IA3"), "peft_type 'IA3'; expected plain LoRA"),
    "begun at the base's own directions": (
        lambda f: told(f, init_lora_weights="pissa_niter_16"),
        "init_lora_weights 'pissa_niter_16': .* expected factors of the base itself .*path_initial_model",
    ),
    "begun at a base of fewer bits": (lambda f: told(f, init_lora_weights="loftq"), "init_lora_weights 'loftq'"),
    "no pattern": (lambda f: told(f, alpha_pattern={"q_(": 3}), r"alpha_pattern: 'q_\(' \(.*expected a regular"),
    "no number of a pattern": (lambda f: told(f, alpha_pattern={"q_proj": "x"}), "alpha_pattern: q_proj: found 'x'"),
    "no alpha": (lambda f: told(f, lora_alpha=None), "lora_alpha: found None; expected a number"),
    "more than factors": (
        lambda f: edited(f, lambda t, a: t.update({"base_model.model.lm_head.weight": torch.ones(2)})),
        "tensor 'base_model.model.lm_head.weight'; expected lora_A and lora_B of matrices alone",
    ),
    "half a pair": (
        lambda f: edited(f, lambda t, a: t.pop(a.replace("lora_A", "lora_B"))),
        "tensor .*; expected lora_A",
    ),
    "other ranks": (lambda f: edited(f, lambda t, a: t.update({a: t[a][:2]})), r"of shape \[2, \d+\] beside lora_B of"),
    "no matrix": (lambda f: edited(f, lambda t, a: t.update({a: t[a][0]})), r"of shape \[\d+\] beside lora_B of"),
    "of another size": (
        lambda f: edited(f, lambda t, a: t.update({a: t[a][:, :5].contiguous()})),
        "factors of a matrix .* as '",
    ),
    "of nothing": (lambda f: save_file({}, f / "adapter_model.safetensors"), "no factor; expected"),
    "of another model": (
        lambda f: edited(f, lambda t, a: t.update({k.replace("q_proj", "w"): t.pop(k) for k in list(t)})),
        "0 tensors of the base for",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_adapters_that_are_more_or_less_than_factors(small, tmp_path, adapters, name):
    """Headers tell it: nothing is written, and a dry run says so. (What peft would refuse is refused as it opens.)"""
    pool = Pool.open(str(small / "base"), adapters)
    edit, pattern = ODD[name]
    edit(tmp_path / "a")
    recipe = recipe_of(small / "base", adapters, "byom_lora", {"rank": 3})
    for way in (
        lambda: check_recipe(recipe, pool),
        lambda: merge_to_disk(recipe, tmp_path / "out", pool),
        lambda: Slot(pool).swap(recipe, task="a"),
    ):
        with pytest.raises(CheckpointError, match=pattern) as found:
            way()
        assert "\n" not in str(found.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_factors_that_are_no_numbers(small, tmp_path, adapters):
    pool = Pool.open(str(small / "base"), adapters)
    edited(tmp_path / "a", lambda tensors, a: tensors[a].fill_(float("nan")))
    with pytest.raises(CheckpointError, match="NaN or infinity in the adapter's factors of"):
        merge_to_disk(recipe_of(small / "base", adapters, "byom_lora"), tmp_path / "out", pool)
    assert not (tmp_path / "out").exists()


def test_a_base_among_the_models_is_no_expert():
    """Nor does it take a share of what all weigh together."""
    told = {"merge_method": "byom_fft", "base_model": "b", "parameters": {"merger": "dare_ties"}}
    without, among = (
        common_of(Recipe.parse(told | {"models": [{"model": m} for m in models]}), METHODS)
        for models in (("x", "y"), ("b", "x", "y"))
    )
    assert without.parameters == among.parameters and without.parameters["weight"] == 0.5
