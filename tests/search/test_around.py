"""`genome.space: around`: weights of single tensors stay apart as a recipe has them, groups of them move together."""

import json
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from merge3.checkpoint.layout import layout
from merge3.client import run
from merge3.engine import LocalEngine
from merge3.errors import BadInput, ConfigError, Merge3Warning
from merge3.learn.fit import merged_with
from merge3.pool import Pool
from merge3.program import compile
from merge3.recipe import Recipe, load_yaml
from merge3.search.config_files import load_config
from merge3.search.identity import _placeless
from merge3.search.journal import Journal
from merge3.search.questions import load_questions
from merge3.search.run import run as whole_run
from merge3.space import Space, SpaceDefinition
from merge3.space.projection import by_tensor
from tests.asking import answers

EXPERTS = ("english", "italian", "translation")
NAMES = [f"model.layers.{i}.{n}.weight" for i in range(4) for n in ("self_attn.q_proj", "mlp.up_proj")]
# `norm.weight` is a part of `model.norm.weight`, as the names of some architectures are of one another.
LAYOUT = layout([*NAMES, "model.embed_tokens.weight", "model.norm.weight", "norm.weight", "lm_head.weight"])
TENSORS = [*NAMES, *LAYOUT.pre, *LAYOUT.post]


def fitted(models, tensors, seed=0, low=0.0, high=1.0, base="base"):
    """A recipe with a weight for every tensor of every model, as a fit ends in, and the weights."""
    rng = np.random.default_rng(seed)
    weights = {model: {name: float(rng.uniform(low, high)) for name in tensors} for model in models}
    listed = [{"model": model} for model in models]
    recipe = Recipe.parse({"merge_method": "supermerge", "base_model": base, "models": listed})
    return merged_with(recipe, {model: list(own.items()) for model, own in weights.items()}), weights


def space(recipe, method="task_arithmetic", **changes):
    values = dict(models=("a", "b"), method=method, base="base", kind="around") | changes
    return Space(SpaceDefinition(**values, around=json.dumps(recipe.to_dict())), LAYOUT)


VARIANTS = [
    dict(),
    dict(layer_granularity=3),
    dict(layer_granularity=0),
    dict(filters=("mlp", "q_proj")),
    dict(smooth=True, filters=("mlp",), layer_granularity=2),
    dict(method="ties", genes=("weight", "density", "lambda"), normalize=False, layer_granularity=2),
    dict(preset="sakana6"),
    dict(preset="evolve", layer_granularity=2, allow_negative_weights=True),
]


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.sampled_from(range(len(VARIANTS))), st.integers(0, 2**31))
def test_it_begins_at_the_recipe_and_genes_move_their_tensors_alike(variant, seed):
    recipe, weights = fitted(("a", "b"), TENSORS, seed)
    s = space(recipe, **VARIANTS[variant])
    started = s.recipe(s.initial())
    for (m, gene), found in by_tensor(s, started, "x").items():
        if gene == "weight":
            own = weights[("a", "b")[m]]
            np.testing.assert_allclose(found, [own[tensor.name] for tensor in s.tensors], rtol=0, atol=1e-12)
    low, high = (np.where(np.isfinite(b), b, d) for b, d in zip(s.bounds(), (-1.5, 1.5)))
    genome = np.random.default_rng(seed).uniform(low, high)
    moved = Recipe.parse(load_yaml(s.recipe(genome).to_yaml(), "x"))
    plain = Space(replace(s.definition, kind="parameters", around=""), LAYOUT)
    steps, before = by_tensor(plain, plain.recipe(genome), "x"), by_tensor(plain, plain.recipe(s.initial()), "x")
    for at, found in by_tensor(s, moved, "x").items():
        if at[1] == "weight":  # moved as far as the space of parameters moves them
            np.testing.assert_allclose(
                found - by_tensor(s, started, "x")[at], steps[at] - before[at], rtol=0, atol=1e-12
            )
    again = by_tensor(s, s.recipe(s.genome(moved)), "x")
    for at, found in by_tensor(s, moved, "x").items():  # genes that govern nothing in this layout are as usual
        np.testing.assert_allclose(again[at], found, rtol=0, atol=1e-12)


def test_the_last_bits_of_genes_are_all_that_rounding_takes():
    recipe, _ = fitted(("a", "b"), TENSORS)
    s = space(recipe)
    again = s.recipe(s.genome(s.recipe(s.initial())))
    for at, found in by_tensor(s, again, "x").items():
        np.testing.assert_allclose(found, by_tensor(s, recipe, "x")[at], rtol=0, atol=1e-15)


def test_a_weight_may_lie_beyond_the_bounds_of_its_gene():
    """Bounds are of what is searched; what a fit has found stays."""
    recipe, weights = fitted(("a", "b"), TENSORS, low=-1, high=2)
    s = space(recipe, layer_granularity=0, bounds={"weight": (0.0, 1.0)}, allow_negative_weights=False)
    low, high = s.bounds()
    assert (low == 0).all() and (high == 1).all() and (s.initial() >= low).all() and (s.initial() <= high).all()
    found = by_tensor(s, s.recipe(s.initial()), "x")[0, "weight"]
    np.testing.assert_allclose(found, [weights["a"][tensor.name] for tensor in s.tensors], rtol=0, atol=1e-12)
    assert found.min() < 0 and found.max() > 1


def test_a_mean_that_bounds_have_moved_is_still_the_recipe():
    recipe, weights = fitted(("a", "b"), TENSORS, low=-1, high=-0.5)
    s = space(recipe, bounds={"weight": (-0.25, 1.0)})
    with pytest.warns(Merge3Warning, match="here: outside what the search may vary: weight of a .* to -0.25, and"):
        start = s.project(recipe, "here")
    assert np.array_equal(start, s.initial())
    found = by_tensor(s, s.recipe(start), "x")[1, "weight"]
    np.testing.assert_allclose(found, [weights["b"][tensor.name] for tensor in s.tensors], rtol=0, atol=1e-12)


def test_another_recipe_of_these_models_is_its_nearest_genome():
    """As in the space of parameters: means of its weights."""
    recipe, other = fitted(("a", "b"), TENSORS)[0], fitted(("a", "b"), TENSORS, seed=1)[0]
    s = space(recipe)
    plain = Space(replace(s.definition, kind="parameters", around=""), LAYOUT)
    assert np.array_equal(s.project(other), plain.project(other))


def test_tensors_without_a_weight_have_that_of_their_gene():
    """A `linear` recipe may leave out what is not merged; its genes are the means of the others."""
    data = {"merge_method": "linear", "models": []}
    for model, value in (("a", 0.25), ("b", 0.75)):
        weight = [{"filter": name, "value": value} for name in NAMES]
        data["models"].append({"model": model, "parameters": {"weight": weight}})
    s = space(Recipe.parse(data), "linear", base=None, layer_granularity=0)
    found = by_tensor(s, s.recipe(s.initial()), "x")
    assert np.array_equal(found[0, "weight"], [0.25] * len(s.tensors))
    assert np.array_equal(found[1, "weight"], [0.75] * len(s.tensors))


REFUSED = {
    "no JSON": (dict(around="{"), "genome: start: found '{'; expected a recipe as JSON"),
    "no recipe": (dict(around="[]"), "genome: start: .*expected a mapping"),
    "nothing": (dict(around=""), "genome: start: found ''; expected a recipe"),
    "another model": (dict(models=("a", "c")), "genome: start: models: found a, b; expected a, c, as in the genome"),
    "no weights": (
        dict(method="ties", genes=("density",), normalize=False),
        "genome: space: around, and weights are no genes of ties here; expected `space: parameters`",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_recipe_of_these_models_is_refused_in_one_line(case):
    recipe, _ = fitted(("a", "b"), TENSORS)
    values = dict(models=("a", "b"), method="task_arithmetic", base="base", kind="around")
    values |= {"around": json.dumps(recipe.to_dict())} | REFUSED[case][0]
    with pytest.raises(BadInput, match=REFUSED[case][1]) as error:
        Space(SpaceDefinition(**values), LAYOUT)
    assert "\n" not in str(error.value)


# -- in a search


def configuration(folder, name="around.yaml", **changes):
    data = yaml.safe_load((folder / "evolve.yaml").read_text()) | {"limit": 6}
    data["optimizer"] = {"budget": 12, "population": 6, "seed": 3}
    data["genome"] |= {"merge_method": "task_arithmetic", "space": "around", "start": "./fits/fitted.yaml"} | changes
    (folder / name).write_text(yaml.safe_dump(data))
    return load_config(folder / name)


def write_fit(folder, beyond=()):
    """fits/fitted.yaml, whose models lie beside its folder. beyond: tensors that the base does not store."""
    pool = Pool.open(str(folder / "base"), [])
    own = pool.layouts[pool.base]
    tensors = [*own.pre, *own.post, *beyond]
    tensors += [own.layer_tensor(i, name) for i in range(own.layers) for name in own.layer_names]
    (folder / "fits").mkdir()
    recipe, _ = fitted([f"../{expert}" for expert in EXPERTS], tensors, base="../base")
    (folder / "fits" / "fitted.yaml").write_text(recipe.to_yaml())
    return folder / "fits" / "fitted.yaml"


def search(directory, config, stop=lambda: False, resume=False):
    engine = LocalEngine(run.open_pool(config.models, quiet=True))
    with closing(Journal(directory)) as journal:
        outcome = whole_run(config, load_questions(config), engine, journal, resume, stop=stop)
        return outcome, [(c.genome.tobytes(), c.responses.tobytes(), c.value) for c in journal.candidates()]


def test_the_first_candidate_is_the_recipe_and_the_winner_is_written_with_all_its_weights(own_world, tmp_path):
    file = write_fit(own_world)
    config = configuration(own_world)
    outcome, rows = search(tmp_path / "run", config)
    pool = Pool.open(config.models[0], config.models[1:])
    s = Space(config.genome.definition(), pool.layouts[pool.base])
    recipe = Recipe.from_yaml(file).renamed(lambda ref: ref.parse(str((file.parent / str(ref)).resolve())))
    jobs = zip(compile(s.recipe(s.initial()), pool).jobs, compile(recipe, pool).jobs)
    for ours, theirs in jobs:
        for one, other in zip(ours.per_source, theirs.per_source):
            assert one["weight"] == pytest.approx(other["weight"], abs=1e-15), ours.name
    assert np.frombuffer(rows[0][0]).tolist() == s.initial().tolist()
    itself = answers(LocalEngine(pool), recipe, load_questions(config).search)
    assert np.array_equal(np.frombuffer(rows[0][1]), itself)
    best = Recipe.from_yaml(tmp_path / "run" / "best.yaml")
    weights = {value for job in compile(best, pool).jobs for own in job.per_source for value in own.values()}
    assert best.to_dict() == outcome.recipe.to_dict() and len(weights) > 60  # tensors of a group stay apart


def test_a_head_that_the_base_does_not_store_has_the_recipes_weight(own_world):
    """It is merged, though the base's layout has no such tensor; other recipes give it what the layers' genes say."""
    tensors = load_file(own_world / "base" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, own_world / "base" / "model.safetensors", {"format": "pt"})
    said = json.loads((own_world / "base" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (own_world / "base" / "config.json").write_text(json.dumps(said))
    file = write_fit(own_world, ["lm_head.weight"])
    config = configuration(own_world)
    pool = Pool.open(config.models[0], config.models[1:])
    s = Space(config.genome.definition(), pool.layouts[pool.base])
    (job,) = [job for job in compile(s.recipe(s.initial()), pool).jobs if job.name == "lm_head.weight"]
    own = Recipe.from_yaml(file).slices[0].sources
    for found, source in zip(job.per_source, own):
        (weight,) = [c["value"] for c in source.parameters["weight"] if c["filter"] == "lm_head.weight"]
        assert found["weight"] == pytest.approx(weight, abs=1e-15)
    recipe = yaml.safe_load(file.read_text())
    for source in recipe["models"]:
        source["parameters"]["weight"] = [c for c in source["parameters"]["weight"] if c["filter"] != "lm_head.weight"]
    file.write_text(yaml.safe_dump(recipe))
    s = Space(configuration(own_world).genome.definition(), pool.layouts[pool.base])
    assert "lm_head.weight" in {job.name for job in compile(s.recipe(s.initial()), pool).jobs}


def test_what_is_never_merged_is_no_part_of_a_mean():
    """A fit gives 0 to all that it has no weight for."""
    recipe, _ = fitted(("a", "b"), [name for name in TENSORS if name != "lm_head.weight"], low=0.4, high=0.4)
    s = space(recipe, bounds={"weight": (0.3, 1.0)})
    assert np.allclose(s.initial(), 0.4, rtol=0, atol=1e-12)
    found = dict(zip([t.name for t in s.tensors], by_tensor(s, s.recipe(s.initial()), "x")[0, "weight"]))
    assert found["lm_head.weight"] == pytest.approx(0, abs=1e-12) and found[NAMES[0]] == pytest.approx(0.4)


@pytest.mark.parametrize("written", ["beside", "absolute"])
def test_a_stopped_run_goes_on_to_the_same_bits_where_its_folder_was_moved(own_world, tmp_path, written):
    """Also where the recipe names places that are no more, as a fit's does: the run has kept it."""
    file = write_fit(own_world)
    if written == "absolute":
        text = file.read_text().replace("model: ../", f"model: {own_world}/")
        file.write_text(text)
    config = configuration(own_world)
    undisturbed, expected = search(tmp_path / "undisturbed", config)
    asked = iter(range(100))
    assert search(own_world / "run", config, lambda: next(asked) >= 7)[0] is None
    moved = own_world.rename(tmp_path / "moved")
    outcome, rows = search(moved / "run", load_config(moved / "around.yaml"), resume=True)
    assert rows == expected and len(rows) == 12 and outcome.heldout == undisturbed.heldout
    if written == "absolute":  # a new run has nothing to go by
        with pytest.raises(ConfigError, match="genome: start: base_model: found .*; expected .*/moved/base, as in"):
            search(tmp_path / "new", load_config(moved / "around.yaml"))


def test_the_run_is_named_by_the_recipe_and_not_by_where_it_lies(own_world):
    file = write_fit(own_world)
    config = configuration(own_world)
    plain = configuration(own_world, "plain.yaml", space="parameters")
    assert config.hash() != plain.hash()
    pool = Pool.open(config.models[0], config.models[1:])
    layout_ = pool.layouts[pool.base]

    class Held:
        def __init__(self, config):
            self.config, self.space = config, Space(config.genome.definition(), layout_)

    named = _placeless(Held(config))
    assert "/" not in "".join((named.around, *named.models, named.base))
    assert named.hash() != _placeless(Held(plain)).hash()
    before = config.hash()
    file.write_text(file.read_text().replace("value: 0.", "value: 0.1", 1))
    assert configuration(own_world).hash() != before and _placeless(Held(config)).hash() != named.hash()


def test_a_space_around_nothing_is_refused_with_the_configuration(own_world):
    with pytest.raises(ConfigError, match="genome.space: around, and no start: expected a recipe, such as"):
        configuration(own_world, start=None)
    with pytest.raises(BadInput, match=r"none\.yaml: No such file"):
        configuration(own_world, start="./none.yaml")
