"""`genome.start`: a search begins at a recipe, is one run wherever its folder lies, and refuses what fits nothing."""

import json
import shutil
import sqlite3
import warnings
from contextlib import closing

import numpy as np
import pytest
import yaml

from merge3.client import run
from merge3.engine import LocalEngine
from merge3.errors import BadInput, ConfigError, Merge3Warning, RecipeError, ResumeMismatch
from merge3.learn.fit import merged_with
from merge3.pool import Pool
from merge3.program import compile
from merge3.recipe import Recipe
from merge3.search import optimizers
from merge3.search.config_files import load_config
from merge3.search.context import Search
from merge3.search.gathering import random_genomes
from merge3.search.journal import Journal
from merge3.search.questions import load_questions
from merge3.search.run import run as whole_run
from merge3.search.start import started
from merge3.space import Space
from tests.asking import answers

EXPERTS = ("english", "italian", "translation")
SMALL = {"budget": 6, "population": 6, "seed": 3}


def configuration(folder, genome, name="started.yaml", **changes):
    """The tiny world's, with these changes; loaded."""
    data = yaml.safe_load((folder / "evolve.yaml").read_text()) | {"optimizer": SMALL, "limit": 6} | changes
    data["genome"] |= genome
    (folder / name).write_text(yaml.safe_dump(data))
    return load_config(folder / name)


def hand(folder, name="hand.yaml", models=EXPERTS, place="./", weight=None, **changes):
    """A ties merge, every expert with this weight or one of its own; the path as a configuration beside it says it."""
    listed = [{"model": f"{place}{m}", "parameters": {"weight": weight or w}} for m, w in zip(models, (0.3, 0.5, 0.7))]
    data = {"merge_method": "ties", "base_model": f"{place}base", "models": listed, "parameters": {"density": 0.75}}
    data = {k: v for k, v in (data | changes).items() if v is not None and v != []}
    (folder / name).write_text(yaml.safe_dump(data))
    return f"./{name}"


def opened(config):
    """(the pool, the space)"""
    pool = Pool.open(config.models[0], config.models[1:])
    return pool, Space(config.genome.definition(), pool.layouts[pool.base])


def search(directory, config, stop=lambda: False, resume=False):
    """(the outcome, every candidate as bytes)"""
    engine = LocalEngine(run.open_pool(config.models, quiet=True))
    with closing(Journal(directory)) as journal:
        outcome = whole_run(config, load_questions(config), engine, journal, resume, stop=stop)
        return outcome, [(c.genome.tobytes(), c.responses.tobytes(), c.value) for c in journal.candidates()]


def first(directory):
    with closing(Journal(directory)) as journal:
        return journal.generation(0)[0]


# -- where it begins


def test_the_first_candidate_has_the_mean_weights_of_a_fitted_recipe(own_world, tmp_path):
    """One weight per tensor and expert, in a recipe in another folder; means by hand, merges by the pool."""
    config = configuration(own_world, {"merge_method": "task_arithmetic"})
    pool, space = opened(config)
    layout, rng = pool.layouts[pool.base], np.random.default_rng(0)
    tensors = [*layout.pre, *layout.post]
    tensors += [layout.layer_tensor(i, name) for i in range(layout.layers) for name in layout.layer_names]
    fitted = {expert: {name: float(rng.uniform(0, 1)) for name in tensors} for expert in EXPERTS}
    listed = [{"model": f"../{expert}"} for expert in EXPERTS]
    recipe = Recipe.parse({"merge_method": "supermerge", "base_model": "../base", "models": listed})
    weights = {f"../{expert}": list(own.items()) for expert, own in fitted.items()}
    (own_world / "fits").mkdir()
    (own_world / "fits" / "fitted.yaml").write_text(merged_with(recipe, weights).to_yaml())
    config = configuration(own_world, {"merge_method": "task_arithmetic", "start": "./fits/fitted.yaml"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", Merge3Warning)
        run.evolve(config, tmp_path / "run", quiet=True, export=False)

    def group(tensor):
        layer = layout.layer_of(tensor)
        return tensor in layout.pre if layer is None else layer // 2 + 2

    jobs = compile(space.recipe(first(tmp_path / "run").genome), pool).jobs
    assert len(jobs) > 30
    for job in jobs:
        for expert, own in zip(EXPERTS, job.per_source):
            alike = [value for name, value in fitted[expert].items() if group(name) == group(job.name)]
            assert own["weight"] == pytest.approx(np.mean(alike), abs=1e-15), (job.name, expert)
    assert len({own["weight"] for job in jobs for own in job.per_source}) == 4 * 3


@pytest.mark.parametrize("optimizer", ["cma", "random", "surrogate"])
def test_a_merge_that_is_a_genome_is_the_first_candidate(own_world, tmp_path, optimizer):
    """Its answers are those of the recipe itself, weights on the bound among them; no search ends below it."""
    settings = {"name": "random"} if optimizer == "random" else {"surrogate": optimizer == "surrogate"}
    start = hand(own_world)
    data = yaml.safe_load((own_world / "hand.yaml").read_text())
    data["models"][0]["parameters"]["weight"] = 0.0
    (own_world / "hand.yaml").write_text(yaml.safe_dump(data))
    genome = {"start": start, "allow_negative_weights": False}
    config = configuration(own_world, genome, optimizer=SMALL | settings)
    result = run.evolve(config, tmp_path / "run", quiet=True, export=False)
    found, (pool, space) = first(tmp_path / "run"), opened(config)
    decoded = space.decoded(found.genome)[0]
    assert decoded["weight"].tolist() == [[[0.0], [0.5], [0.7]]] * space.groups
    assert (decoded["density"] == 0.75).all()
    itself = answers(LocalEngine(pool), Recipe.from_yaml(own_world / "hand.yaml"), load_questions(config).subset)
    assert np.array_equal(found.responses, itself)
    assert result["search_value"] >= found.value


def test_cma_begins_at_a_given_start_on_a_bound_and_others_as_they_did():
    initial, low, high = np.array([0.0, 1.0, 0.5, 0.3]), np.zeros(4), np.ones(4)
    for assisted in (False, True):
        made = [optimizers.make("cma", initial, low, high, 0.2, 6, 0, assisted, given) for given in (True, False)]
        given, usual = (optimizer.ask() for optimizer in made)
        np.testing.assert_allclose(given[0], initial, rtol=0, atol=1e-12)
        assert abs(usual[0] - initial)[:2] == pytest.approx([0.0125, 0.0125])  # bent, as in journals that are kept
        assert np.array_equal(given[1:], usual[1:])


def test_random_merges_of_a_calibration_lie_around_the_start(own_world, tmp_path):
    """As around the uniform merge without one: the same steps from another place."""
    plain, config = configuration(own_world, {}), configuration(own_world, {"start": hand(own_world)})
    pool, space = opened(config)
    starts = []
    for each in (plain, config):
        with closing(Journal(tmp_path)) as journal:
            starts.append(started(Search(each, load_questions(each), LocalEngine(pool), space, journal)).initial)
    usual, given = starts
    assert np.array_equal(usual, space.initial()) and not np.array_equal(given, usual)
    moved = [a - b for a, b in zip(*(random_genomes(space, start, 4, 1, 0.01) for start in (given, usual)))]
    np.testing.assert_allclose(moved, [given - usual] * 4, rtol=0, atol=1e-12)


# -- the run that it names


class Stop:
    """True from the ninth candidate on."""

    def __init__(self):
        self.asked = 0

    def __call__(self):
        self.asked += 1
        return self.asked >= 9


@pytest.mark.parametrize("written", ["beside", "absolute"])
def test_a_stopped_run_whose_folder_was_moved_resumes_to_the_same_bits(own_world, tmp_path, written):
    """Also where the recipe names places that are no more: the run has kept what they came to."""
    genome = {"start": hand(own_world, place="" if written == "beside" else f"{own_world}/")}
    settings = {"optimizer": SMALL | {"budget": 12}, "extract": {"method": "random", "size": 4}}
    config = configuration(own_world, genome, **settings)
    undisturbed, expected = search(tmp_path / "undisturbed", config)
    assert search(own_world / "run", config, Stop())[0] is None
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    own_world.rename(moved)
    outcome, rows = search(moved / "run", load_config(moved / "started.yaml"), resume=True)
    assert rows == expected and len(rows) == 12 and outcome.heldout == undisturbed.heldout
    if written == "absolute":  # a new run has nothing to go by
        with pytest.raises(ConfigError, match=r"hand\.yaml: base_model: found .*; expected .*/moved/base, as in"):
            search(tmp_path / "new", load_config(moved / "started.yaml"))


def test_what_the_recipe_says_names_the_run_and_not_where_it_lies(own_world, tmp_path):
    plain, config = configuration(own_world, {}), configuration(own_world, {"start": hand(own_world)})
    copy = shutil.copytree(own_world, tmp_path / "copy")
    assert config.hash() == load_config(copy / "started.yaml").hash() != plain.hash()
    assert configuration(own_world, {"start": None}).hash() == plain.hash()
    search(tmp_path / "run", config)
    before = first(tmp_path / "run").genome
    hand(own_world, parameters={"density": 0.5})
    assert config.hash() != load_config(copy / "started.yaml").hash()
    with pytest.raises(ResumeMismatch, match="when the run began"):
        search(tmp_path / "run", config, resume=True)
    with pytest.raises(ResumeMismatch, match="config is .*when the run began"):
        search(tmp_path / "run", plain, resume=True)
    assert np.array_equal(first(tmp_path / "run").genome, before)


def test_a_run_that_ended_before_anything_was_asked_keeps_no_start(own_world, tmp_path):
    """Its folder is free for the mended recipe."""
    config = configuration(own_world, {"start": hand(own_world)})
    _, space = opened(config)
    with closing(Journal(tmp_path / "run")) as journal:
        journal.begin({"config": config.hash(), "start": "[0.0]"})
    hand(own_world, parameters={"density": 0.5})
    search(tmp_path / "run", config)
    assert (space.decoded(first(tmp_path / "run").genome)[0]["density"] == 0.5).all()


@pytest.mark.parametrize("kept", ["[0.25]", "of this length"])
def test_the_start_of_a_journal_that_never_began_is_not_used(own_world, tmp_path, kept):
    """Which may be another version's, or of other checkpoints, whatever the configuration says."""
    config = configuration(own_world, {"start": hand(own_world)})
    _, space = opened(config)
    stale = kept if kept != "of this length" else json.dumps([0.25] * space.size)
    with closing(Journal(tmp_path / "run")) as journal:
        journal.begin({"config": config.hash(), "merge3": "0.0", "start": stale})
    search(tmp_path / "run", config)
    decoded = space.decoded(first(tmp_path / "run").genome)[0]
    assert (decoded["density"] == 0.75).all() and decoded["weight"].tolist() == [[[0.3], [0.5], [0.7]]] * space.groups


def test_a_start_of_another_length_is_another_run(own_world, tmp_path):
    config = configuration(own_world, {"start": hand(own_world)})
    search(tmp_path / "run", config)
    with sqlite3.connect(tmp_path / "run" / "run.db") as db:
        db.execute("UPDATE run SET value = '[0.0]' WHERE key = 'start'")
    with pytest.raises(ResumeMismatch, match="start is 1 numbers, was written when the run began; expected"):
        search(tmp_path / "run", config, resume=True)


def test_models_are_found_beside_the_recipe_or_where_the_process_runs(own_world, tmp_path, monkeypatch):
    """Each file's paths lead from its own folder; mergekit's lead from where it is called."""
    (own_world / "recipes").mkdir()
    started_at = []
    for place, where in (("../", own_world), ("../", tmp_path), ("", own_world), (f"{own_world}/", tmp_path)):
        monkeypatch.chdir(where)
        hand(own_world / "recipes", place=place)
        config = configuration(own_world, {"start": "recipes/hand.yaml"})
        pool, space = opened(config)
        with closing(Journal(tmp_path / "none")) as journal:
            found = started(Search(config, load_questions(config), LocalEngine(pool), space, journal))
        started_at.append(found.start.tolist())
    assert started_at == started_at[:1] * 4
    monkeypatch.chdir(tmp_path)
    hand(own_world / "recipes", place="")
    with pytest.raises(ConfigError, match="base_model: found base; expected .*/world/base, as in the genome"):
        run.evolve(config, tmp_path / "run", quiet=True)


# -- what is refused


REFUSED = {
    "another model": (
        dict(models=("english", "italian", "sorting")),
        "models: found .*sorting; expected .*translation, as in the genome",
    ),
    "another base": (dict(base_model="./sorting"), "base_model: found .*sorting; expected .*base, as in the genome"),
    "another method": (dict(merge_method="della"), "merge_method: found della; expected ties or task_arithmetic"),
    "unlike normalized": (
        dict(merge_method="task_arithmetic", parameters=None),
        r"normalize: False for .*; expected True, which every candidate has \(or `normalize: false` in the genome\)",
    ),
    "a misspelt parameter": (dict(parameters={"densty": 0.5}), r"parameters\.densty: .*did you mean 'density'"),
    "a density above 1": (dict(parameters={"density": 1.5}), "density: found 1.5; expected a value in"),
    "a tensor without a weight": (
        dict(weight=[{"filter": "mlp", "value": 0.5}]),
        "missing for tensor .*; expected a value, ties needs one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_recipes_that_fit_no_genome_are_refused_before_the_search(own_world, tmp_path, case):
    changes, message = REFUSED[case]
    start = hand(own_world, **changes)
    with pytest.raises(BadInput, match=message) as error:
        run.evolve(configuration(own_world, {"start": start}), tmp_path / "run", quiet=True)
    assert str(error.value).startswith(f"{own_world / 'hand.yaml'}: ") and "\n" not in str(error.value)
    with closing(Journal(tmp_path / "run")) as journal:
        assert journal.count() == 0 and journal.identity() == {}


ONE_LAYER = [{"sources": [{"model": f"./{m}", "layer_range": [0, 1], "parameters": {"weight": 1}} for m in EXPERTS]}]
OTHERS = {name: REFUSED[name] for name in ("another model", "another base", "another method")} | {
    "other layers": (dict(slices=ONE_LAYER, models=()), "slices: the first 1 layers; expected all")
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_layouts_tell_is_refused_before_the_search_is_prepared(own_world, tmp_path, case):
    """Neither statistics nor tokens are made for it."""
    config = configuration(own_world, {"start": hand(own_world, **OTHERS[case][0])})
    engine = LocalEngine(opened(config)[0])
    with closing(Journal(tmp_path / "run")) as journal, pytest.raises(BadInput, match=OTHERS[case][1]):
        whole_run(config, load_questions(config), engine, journal)
    assert not engine._spaces and not engine._rounds._prepared and not engine._rounds._scorers


HUGE = {
    "nested": (dict(weight=[[1, 2], [3, 4]]), r"models\[0\]: parameters\.weight: a list with more in it than plain"),
    "long": (dict(weight=10**400), r"models\[0\]\.parameters\.weight: found a number of 333 hexadecimal digits"),
}


@pytest.mark.parametrize("case", HUGE)
def test_weights_that_are_none_are_refused_with_the_configuration(own_world, case):
    changes, message = HUGE[case]
    with pytest.raises(RecipeError, match=message):
        configuration(own_world, {"start": hand(own_world, **changes)})


def test_files_that_are_no_recipe_are_refused_with_the_configuration(own_world):
    with pytest.raises(RecipeError, match=r"none\.yaml: No such file"):
        configuration(own_world, {"start": "./none.yaml"})
    (own_world / "list.yaml").write_text("- english\n")
    with pytest.raises(RecipeError, match=r"list\.yaml: found list; expected a mapping"):
        configuration(own_world, {"start": "./list.yaml"})
    with pytest.raises(ConfigError, match=r"random_init: true beside genome\.start \(\./hand\.yaml\): expected one"):
        configuration(own_world, {"start": hand(own_world)}, random_init=True)


def test_another_tokenizer_and_dtype_do_not_matter(own_world, tmp_path):
    """A start says parameters; words and files are the genome's."""
    start = hand(own_world, dtype="bfloat16", tokenizer_source="./italian", chat_template="chatml", surgery={"rank": 4})
    config = configuration(own_world, {"start": start}, optimizer=SMALL | {"budget": 2})
    with pytest.warns(Merge3Warning, match=r"hand\.yaml: surgery: left out"):
        run.evolve(config, tmp_path / "run", quiet=True, export=False)
    best = Recipe.from_yaml(tmp_path / "run" / "best.yaml")
    assert (best.dtype, best.tokenizer, best.chat_template, best.surgery) == (None, None, None, {})
