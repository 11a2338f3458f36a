"""`fit:` in an evolve configuration: a search begins at what its own items teach, and keeps it unless it is beaten."""

import os
import signal
import sqlite3
import subprocess
import time

import numpy as np
import pytest
import yaml

from merge3.client import run
from merge3.engine import LocalEngine
from merge3.errors import BadInput, ConfigError, ResumeMismatch
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.search.config_files import load_config
from merge3.search.fit_first import answers_of, first_fit
from merge3.search.questions import load_questions
from merge3.search.race import Contender, race
from merge3.tasks import Item
from tests.asking import answers
from tests.commands import client
from tests.killing import evolving, killed

FIT = {"steps": 4, "per_task": 6, "batch": 4, "learning_rate": 0.05}
TAKEN = 3 * 4 * 4 * 2  # passes an item, steps, items of a task, tasks


def configuration(folder, fit=FIT, name="begun.yaml", genome=(), **changes):
    """The tiny world's, of three experts, that begins at a fit; loaded. None leaves a key out."""
    data = yaml.safe_load((folder / "evolve.yaml").read_text())
    data["optimizer"] = {"budget": 12, "population": 6, "seed": 3}
    data |= {"limit": 8, "extract": {"method": "random", "size": 3}, "fit": fit} | changes
    data["genome"] |= {"merge_method": "task_arithmetic"} | dict(genome)
    for section in (data, data["genome"]):
        for key in [key for key, value in section.items() if value is None]:
            del section[key]
    (folder / name).write_text(yaml.safe_dump(data))
    return load_config(folder / name)


def rows(directory):
    with sqlite3.connect(directory / "run.db") as db:
        return db.execute("SELECT generation, position, genome, responses FROM candidates ORDER BY 1, 2").fetchall()


@pytest.fixture(scope="module")
def world(tiny_world, tmp_path_factory):
    """A folder of links to the tiny world."""
    folder = tmp_path_factory.mktemp("begun") / "world"
    folder.mkdir()
    for entry in tiny_world.iterdir():
        (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def whole(world):
    """(configuration, directory, result) of a run that nothing has disturbed."""
    config = configuration(world)
    return config, world / "run", run.evolve(config, world / "run", quiet=True)


def test_the_search_begins_at_what_was_fitted_and_counts_what_it_took(whole):
    config, directory, result = whole
    assert (config.genome.space, config.optimizer.sigma, config.race.defend) == ("around", 0.03, True)
    fitted = Recipe.from_yaml(directory / "fit" / "fitted.yaml")
    weights = {entry["value"] for source in fitted.slices[0].sources for entry in source.parameters["weight"]}
    assert len(weights) > 60  # one for every tensor
    questions, engine = load_questions(config), LocalEngine(Pool.open(config.models[0], config.models[1:]))
    assert np.array_equal(np.frombuffer(rows(directory)[0][3]), answers(engine, fitted, questions.subset))
    assert result["baselines"]["fit"] == pytest.approx(answers(engine, fitted, questions.heldout).mean())
    ledger = result["ledger"]
    assert ledger["fit"] == TAKEN
    assert ledger["total"] == sum(ledger[key] for key in ("fit", "calibration", "search", "checks", "race", "elites"))
    assert "fit</td>" in (directory / "report.html").read_text().replace(" ", "")
    assert (directory / "fit" / "report.html").exists()


def test_nothing_that_is_held_out_is_learned(whole, world):
    config = whole[0]
    questions = load_questions(config)
    fit, items = first_fit(config, questions)
    searched = {(item.task, item.id) for item in questions.search}
    assert {(item.task, item.id) for item in items} <= searched and len(items) == 2 * 6
    assert fit.settings.seed == 3 and answers_of(fit, items) == TAKEN
    other = load_config(world / "begun.yaml", seed=4)
    assert {item.id for item in first_fit(other, load_questions(other))[1]} != {item.id for item in items}


def test_each_tasks_expert_teaches_where_a_method_asks_experts(world):
    """In their order; and what they are asked is counted."""
    tasks = [{"items": f"./{name}.jsonl"} for name in ("english", "italian", "translation")]
    config = configuration(world, FIT | {"method": "expert_kl"}, "taught.yaml", tasks=tasks)
    fit, items = first_fit(config, load_questions(config))
    assert {task: os.path.basename(model) for task, model in fit.experts.items()} == {t: t for t in fit.experts}
    assert len(fit.experts) == 3 and answers_of(fit, items) == 3 * 4 * 4 * 3 + 3 * 6
    fewer = configuration(world, FIT | {"method": "expert_kl"}, "fewer.yaml")
    with pytest.raises(ConfigError, match="fit.method: expert_kl, which asks each task's own expert, and 2 tasks of 3"):
        first_fit(fewer, load_questions(fewer))


@pytest.mark.parametrize("in_the_fit", [True, pytest.param(False, marks=pytest.mark.heavy)])
def test_a_run_that_is_killed_goes_on_to_the_same_bits(whole, world, tmp_path, in_the_fit):
    _, undisturbed, result = whole
    config, cut = world / "begun.yaml", tmp_path / "run"
    if in_the_fit:
        process = subprocess.Popen(evolving(config, cut))
        state, deadline = cut / "fit" / "state.safetensors", time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline and not state.exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    else:
        killed(config, cut, (4,), 12)
    again = run.evolve(load_config(config), cut, resume=True, quiet=True)
    assert rows(cut) == rows(undisturbed)
    assert (again["heldout_detail"], again["ledger"]) == (result["heldout_detail"], result["ledger"])
    for file in ("best.yaml", "fit/fitted.yaml"):
        assert (cut / file).read_bytes() == (undisturbed / file).read_bytes()


def test_ctrl_c_in_the_fit_says_how_to_go_on(world, tmp_path, monkeypatch, capsys):
    config = configuration(world, FIT | {"steps": 6}, "stopped.yaml")
    monkeypatch.setattr("merge3.learn.fit.SAVED", 0.0)
    monkeypatch.setattr(run.StopOnInterrupt, "__call__", lambda self: True)
    assert run.evolve(config, tmp_path / "run", quiet=True) is None
    assert "continue with: merge3-client evolve CONFIG --run-dir" in capsys.readouterr().err
    assert not rows(tmp_path / "run") and (tmp_path / "run" / "fit" / "state.safetensors").exists()
    monkeypatch.undo()
    with pytest.raises(ResumeMismatch, match="fit: not empty; expected a new directory, or --resume"):
        run.evolve(config, tmp_path / "run", quiet=True)
    with pytest.raises(ResumeMismatch, match="fit: recipe: found"):
        run.evolve(configuration(world, FIT, "other.yaml"), tmp_path / "run", resume=True, quiet=True)
    assert run.evolve(config, tmp_path / "run", resume=True, quiet=True)["ledger"]["fit"] == TAKEN * 6 // 4


def test_other_searches_keep_their_names(world):
    """A configuration without `fit:` is what it was; one with it is named by its settings, wherever it has come to."""
    plain, config = configuration(world, None, "plain.yaml"), configuration(world)
    assert "fit" not in plain.model_fields_set or plain.fit is None
    assert plain.race.defend is False and plain.hash() != config.hash()
    begun = config.model_copy(update={"genome": config.genome.model_copy(update={"start": str(world / "begun.yaml")})})
    assert begun.hash() == config.hash() != configuration(world, FIT | {"steps": 5}, "longer.yaml").hash()
    assert yaml.safe_load(begun.to_yaml())["genome"]["start"] is None
    kept = configuration(world, FIT, "kept.yaml", {"space": "parameters"}, race={"defend": False})
    assert (kept.genome.space, kept.race.defend) == ("parameters", False)


REFUSED = {
    "beside a start": (dict(genome={"start": "./hand.yaml"}), "fit: beside genome.start: expected one of them"),
    "random": (dict(random_init=True), "fit: beside random_init: expected one of them"),
    "no base": (dict(genome={"base_model": None, "merge_method": "linear"}), "fit: without genome.base_model"),
    "a path": (dict(genome={"space": "path", "merge_method": None}), "fit: in a search for a path"),
    "no method": (dict(fit="supermrge"), "fit.method: 'supermrge' learns nothing.*; expected supermerge or"),
    "own experts": (dict(fit="adamerging++"), r"fit.method: adamerging\+\+ makes experts of its own: expected one of"),
    "items": (dict(fit=FIT | {"items": ["a"]}), "fit.items: given, and the search says it"),
    "a seed": (dict(fit=FIT | {"seed": 1}), "fit.seed: given, and the search says it"),
    "groups": (dict(fit=FIT | {"groups": {"size": 2}}), "fit.groups: in a search: expected none"),
    "misspelt": (dict(fit=FIT | {"step": 1}), "fit.step: unknown key.*steps"),
    "no steps": (dict(fit=FIT | {"steps": 0}), "fit.steps: found 0"),
    "a list": (dict(fit=[1]), "fit: found list, expected a learned method, or a mapping"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_the_configuration(own_world, case):
    changes = dict(REFUSED[case][0])
    (own_world / "hand.yaml").write_text("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n")
    with pytest.raises(BadInput, match=REFUSED[case][1]) as error:
        configuration(own_world, **changes)
    assert "\n" not in str(error.value)


def test_what_the_search_would_refuse_is_refused_before_the_fit(world, tmp_path):
    config = configuration(world, FIT, "ties.yaml", {"merge_method": "ties"})
    with pytest.raises(BadInput, match="fit: normalize: False for .*; expected True, which every candidate has"):
        run.evolve(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "fit").exists()
    with pytest.raises(ResumeMismatch, match="this run has begun"):
        run.evolve(configuration(world), world / "run", quiet=True)


def test_a_calibration_has_no_fit(world, tmp_path):
    done = client("calibrate", world / "begun.yaml", "--out", tmp_path / "calibrated")
    assert done.returncode == 2 and "begun.yaml: fit: in a calibration; expected none" in done.stderr


def test_a_defender_wins_unless_it_is_beaten_in_the_race_alone():
    """Whatever the search said of them; and it does not leave on the way."""
    items = [Item(str(i), "a", "generate", "p", "a") for i in range(400)]
    g = np.random.default_rng(0)
    draws = g.random(400)
    solved = lambda chance: (draws < chance).astype(float)
    lucky = [Contender("x", 0.90, 0.01), Contender("y", 0.88, 0.01), Contender("start", 0.60, 0.01)]

    def won(chances, defender=2, count=400):
        table = [solved(chance) for chance in chances]
        return race(lucky, items[:count], lambda c, at: table[c][at], 20, 10**6, defender=defender).winner

    assert won((0.60, 0.60, 0.60)) == 2 and won((0.60, 0.60, 0.60), defender=None) == 0
    assert won((0.61, 0.60, 0.60)) == 2  # within two standard errors
    assert won((0.60, 0.80, 0.60)) == 0 or won((0.60, 0.80, 0.60)) == 1
    assert won((0.80, 0.60, 0.60)) == 0
    assert won((0.60, 0.60, 0.80)) == 2
