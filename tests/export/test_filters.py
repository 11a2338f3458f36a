"""Filters of recipes that fit no tensor: a line for each, with the nearest part of a name; --strict refuses."""

import warnings

import pytest
import yaml

from merge3.engine import LocalEngine
from merge3.errors import Merge3Warning
from merge3.export import check_recipe, merge_to_disk
from merge3.learn.fit import merged_with
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.space import SpaceDefinition
from merge3.tasks import Item
from tests.commands import client


def slerp(base, expert, t):
    models = [{"model": str(base)}, {"model": str(expert)}]
    return Recipe.parse({"merge_method": "slerp", "base_model": str(base), "models": models, "parameters": {"t": t}})


def template(*filters):
    """As most recipes for slerp have it."""
    return [*({"filter": name, "value": [0, 0.5, 0.3, 0.7, 1]} for name in filters), {"value": 0.5}]


def lost(recipe, pool=None):
    """The lines that a recipe's merge says of its filters."""
    pool = pool or Pool.open(recipe.models()[0], recipe.models()[1:])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_recipe(recipe, pool, "r.yaml")
    return [str(w.message) for w in said if "fit" in str(w.message) and w.category is Merge3Warning]


def test_a_misspelt_filter_is_told_with_the_nearest_part_of_a_name(family):
    models = (family / "base", family / "e0")
    assert lost(slerp(*models, template("self_attn", "mlp"))) == []
    (line,) = lost(slerp(*models, template("self_atn", "mlp")))
    assert line == "r.yaml: parameters.t: filter 'self_atn' fits no tensor (did you mean 'self_attn'?)"
    (line,) = lost(slerp(*models, template("self_atn.q_proj")))
    assert line.endswith("(did you mean 'self_attn.q_proj'?)")
    (line,) = lost(slerp(*models, template("layers.9.")))  # no hint that is as good as this
    assert "'layers.9.' fits no tensor" in line


def test_a_filter_that_several_models_have_is_told_once(family):
    weight = [{"filter": "mpl", "value": 1.0}, {"filter": "zzz", "value": 1.0}, {"value": 0.5}]
    models = [{"model": str(family / f"e{i}"), "parameters": {"weight": weight}} for i in range(3)]
    lines = lost(Recipe.parse({"merge_method": "linear", "models": models}))
    assert lines == [
        "r.yaml: models[0].parameters.weight: filter 'mpl' fits no tensor (did you mean 'mlp'?)",
        "r.yaml: models[0].parameters.weight: filter 'zzz' fits no tensor",
    ]


def test_of_very_many_the_first_are_told(family):
    weights = [(f"transformer.h.{i}.attn.c_attn.weight", 0.5) for i in range(40)]
    data = {"merge_method": "task_arithmetic", "base_model": str(family / "base")}
    made = merged_with(Recipe.parse(data | {"models": [{"model": str(family / "e0")}]}), {str(family / "e0"): weights})
    lines = lost(made)
    assert len(lines) == 6 and lines[-1] == "r.yaml: 35 more filters fit no tensor"


@pytest.mark.parametrize(
    ("arch", "loader", "said"),
    [("gpt2", "AutoModelForCausalLM", ["self_attn"]), ("bert", "AutoModelForMaskedLM", ["self_attn", "mlp"])],
)
def test_the_usual_template_on_another_architecture(workshop, arch, loader, said):
    workshop.model("base", arch, loader=loader)
    workshop.expert("base", "one", loader=loader)
    lines = lost(slerp(workshop.root / "base", workshop.root / "one", template("self_attn", "mlp")))
    assert [line.split("'")[1] for line in lines] == said


def test_strict_refuses_it_before_anything_is_written_or_asked(family, tmp_path):
    recipe = slerp(family / "base", family / "e0", template("self_atn"))
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    (tmp_path / "i.jsonl").write_text('{"id": "1", "kind": "generate", "prompt": "one", "answer": "two"}\n')
    for command, other in (("merge", "out"), ("evaluate", "i.jsonl")):
        done = client(command, tmp_path / "r.yaml", tmp_path / other, "--strict")
        line = f"{tmp_path / 'r.yaml'}: parameters.t: filter 'self_atn' fits no tensor (did you mean 'self_attn'?)"
        assert done.returncode == 2 and done.stdout == "" and done.stderr == f"error: {line} (--strict)\n"
    assert not (tmp_path / "out").exists()
    done = client("merge", tmp_path / "r.yaml", tmp_path / "out", "--quiet")
    assert done.returncode == 0 and done.stderr.count("fits no tensor") == 1 and (tmp_path / "out").exists()


def test_a_filter_need_fit_no_tensor_of_its_own_slice(family):
    """Nor one that is merged: what is said of a tied head is said of a tensor."""
    ranges = ([0, 3], [1, 4])
    scale = [{"filter": "layers.0.", "value": 0.5}, {"filter": "layers.3.", "value": 0.5}, {"value": 1.0}]
    source = {"model": str(family / "e0"), "parameters": {"scale": scale}}
    slices = [{"sources": [source | {"layer_range": r}]} for r in ranges]
    assert lost(Recipe.parse({"merge_method": "passthrough", "slices": slices})) == []
    of_outputs = [{"sources": [{"model": str(family / m), "layer_range": r} for m in ("e0", "e1")]} for r in ranges]
    data = {"merge_method": "karcher", "slices": of_outputs}
    for layer, count in ((5, 0), (6, 1)):  # shared parameters name the output's layers, of which there are 6
        tol = [{"filter": f"layers.{layer}.", "value": 1e-4}, {"value": 1e-5}]
        assert len(lost(Recipe.parse(data | {"parameters": {"tol": tol}}))) == count


def test_what_merge3_writes_itself_fits(family, tied_family):
    for root in (family, tied_family):
        models = [str(root / name) for name in ("base", "e0", "e1")]
        pool = Pool.open(models[0], models[1:])
        data = {"merge_method": "task_arithmetic", "base_model": models[0]}
        recipe = Recipe.parse(data | {"models": [{"model": m} for m in models[1:]]})
        fitted = merged_with(recipe, {m: [(name, 0.5) for name in pool.base_checkpoint.tensors] for m in models[1:]})
        assert lost(fitted, pool) == []
        engine = LocalEngine(pool)
        for granularity in (1, 2, 0):
            made = dict(models=tuple(models[1:]), method="ties", base=models[0], layer_granularity=granularity)
            for filters in ((), ("mlp", "layers.1.")):
                space = engine.space(SpaceDefinition(**made, filters=filters))
                assert lost(space.recipe(space.initial()), pool) == []


def test_a_searchs_filters_are_told_at_its_start_and_not_by_each_candidate(tiny_world):
    models = [str(tiny_world / name) for name in ("base", "english", "italian")]
    pool = Pool.open(models[0], models[1:])
    engine, items = LocalEngine(pool), (Item("1", "a", "generate", "one plus one is", ("two",), max_tokens=1),)
    definition = SpaceDefinition(tuple(models[1:]), "task_arithmetic", models[0], filters=("self_atn",))
    space = engine.space(definition)
    with pytest.warns(Merge3Warning, match="filter 'self_atn' fits no tensor"):
        engine.check(space.uniform_recipe())
    with warnings.catch_warnings():
        warnings.simplefilter("error", Merge3Warning)
        asked = Registration(items, space=definition)
        assert all(e.error is None for e in engine.evaluate(asked, [space.initial()] * 2))


def test_told_of_a_written_file_too(family, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(slerp(family / "base", family / "e0", template("mpl")).to_dict()))
    with pytest.warns(Merge3Warning, match="filter 'mpl' fits no tensor"):
        merge_to_disk(Recipe.from_yaml(tmp_path / "r.yaml"), tmp_path / "out")
