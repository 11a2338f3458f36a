"""`fit:` in an evolve configuration: a search begins at what its own items teach, and keeps it unless it is beaten."""

import json
import os
import signal
import sqlite3
import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from merge3.client import run
from merge3.engine import LocalEngine
from merge3.errors import BadInput, ConfigError, ItemsError, ResumeMismatch
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.search.config_files import load_config
from merge3.search.fit_first import answers_of, first_fit
from merge3.search.journal import Candidate
from merge3.search.questions import load_questions
from merge3.search.race import Contender, Ranked, race, settle
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
    assert fit.settings.seed == 3 and answers_of(fit, 4 * 4 * 2, items) == TAKEN
    other = load_config(world / "begun.yaml", seed=4)
    assert {item.id for item in first_fit(other, load_questions(other))[1]} != {item.id for item in items}


def test_each_tasks_expert_teaches_where_a_method_asks_experts(world):
    """In their order; and what they are asked is counted."""
    tasks = [{"items": f"./{name}.jsonl"} for name in ("english", "italian", "translation")]
    config = configuration(world, FIT | {"method": "expert_kl"}, "taught.yaml", tasks=tasks)
    fit, items = first_fit(config, load_questions(config))
    assert {task: os.path.basename(model) for task, model in fit.experts.items()} == {t: t for t in fit.experts}
    assert len(fit.experts) == 3 and answers_of(fit, 4 * 4 * 3, items) == 3 * 4 * 4 * 3 + 3 * 6
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
    assert plain.fit is None and plain.race.defend is False and plain.hash() != config.hash()
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
    "no name": (dict(fit={"method": ["supermerge"]}), "fit.method: found list, expected one of supermerge"),
    "rounds": (dict(optimizer={"rounds": 2, "budget": 20}), r"fit: beside optimizer.rounds \(2\): expected one of"),
    "a race of nothing": (dict(race=[]), "race: "),
    "a list": (dict(fit=[1]), "fit: found list, expected a learned method, or a mapping"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_the_configuration(own_world, case):
    changes = dict(REFUSED[case][0])
    (own_world / "hand.yaml").write_text("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n")
    with pytest.raises(BadInput, match=REFUSED[case][1]) as error:
        configuration(own_world, **changes)
    assert "\n" not in str(error.value)


def test_items_without_labels_are_refused_before_any_model_is_opened(own_world, tmp_path, monkeypatch):
    """As lm-eval's documents are; of a method that learns labels."""
    lines = [json.dumps({"id": f"{n}", "kind": "forced", "prompt": f"{n}", "answer": f" {n}"}) for n in range(40)]
    (own_world / "english.jsonl").write_text("\n".join(lines) + "\n")
    config = configuration(own_world)
    monkeypatch.setattr(run, "open_engine", lambda *_: pytest.fail("models were opened"))
    with pytest.raises(ItemsError, match="english.jsonl.*kind 'forced', which has no label to learn"):
        run.evolve(config, tmp_path / "run", quiet=True)


def test_what_the_search_would_refuse_is_refused_before_the_fit(world, whole, tmp_path):
    config = configuration(world, FIT, "ties.yaml", {"merge_method": "ties"})
    with pytest.raises(BadInput, match="fit: normalize: False for .*; expected True, which every candidate has"):
        run.evolve(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "fit").exists()
    with pytest.raises(ResumeMismatch, match="this run has begun"):
        run.evolve(configuration(world), world / "run", quiet=True)


def test_a_run_that_is_no_such_is_not_fitted(world, tmp_path):
    """Neither what another search began, nor with prompts that are put otherwise, nor for a member that cannot be."""
    plain = configuration(world, None, "before.yaml")
    run.evolve(plain, tmp_path / "run", quiet=True, export=False)
    with pytest.raises(ResumeMismatch, match="config is .*; expected .*, as when the run began"):
        run.evolve(configuration(world), tmp_path / "run", resume=True, quiet=True)
    with pytest.raises(BadInput, match="--pick"):
        run.evolve(configuration(world), tmp_path / "picked", quiet=True, pick="knee")
    assert not (tmp_path / "run" / "fit").exists() and not (tmp_path / "picked" / "fit").exists()
    config = configuration(world, FIT | {"steps": 5}, "put.yaml")
    stop = pytest.MonkeyPatch()
    with stop.context() as patch:
        patch.setattr("merge3.learn.fit.SAVED", 0.0)
        patch.setattr(run.StopOnInterrupt, "__call__", lambda self: True)
        assert run.evolve(config, tmp_path / "put", quiet=True) is None
    other = configuration(world, FIT | {"steps": 5}, "put.yaml", shuffle=True)
    with pytest.raises(ResumeMismatch, match="fit: (search|learned items): found .*as this run began with"):
        run.evolve(other, tmp_path / "put", resume=True, quiet=True)


def test_heads_say_whose_task_is_whose(world):
    config = configuration(world, FIT | {"method": "expert_kl"}, "headed.yaml")
    questions = load_questions(config)
    first, second = dict.fromkeys(item.task for item in questions.search)
    fit, _ = first_fit(config, replace(questions, heads={first: "b", second: "a"}))
    assert fit.experts == {first: "b", second: "a"}
    with pytest.raises(ConfigError, match="fit.method: expert_kl"):
        first_fit(config, replace(questions, heads={first: "a"}))


def test_a_fit_leaves_its_room_to_the_search(world, tmp_path, monkeypatch):
    """Else no candidates would be asked side by side."""
    seen = []
    whole_run = run.run
    monkeypatch.setattr(run, "run", lambda *args: seen.append(args[2]._learning.prepared) or whole_run(*args))
    run.evolve(configuration(world), tmp_path / "run", quiet=True, export=False)
    assert seen == [False]


def test_only_a_start_that_is_the_fit_is_defended(world):
    """Another method's candidates keep less of it, and one in the space of parameters has its means."""
    assert configuration(world).race.defend is True
    for genome in ({"merge_method": "ties", "normalize": False}, {"space": "parameters"}):
        assert configuration(world, FIT, "other.yaml", genome).race.defend is False


def test_a_calibration_has_no_fit(world, tmp_path):
    done = client("calibrate", world / "begun.yaml", "--out", tmp_path / "calibrated")
    assert done.returncode == 2 and "begun.yaml: fit: in a calibration; expected none" in done.stderr


def test_a_defender_wins_unless_it_is_beaten_in_the_race_alone():
    """Whatever the search said of them; and it does not leave on the way."""
    items = [Item(str(i), "a", "generate", "p", "a") for i in range(400)]
    draws = np.random.default_rng(0).random(400)
    lucky = [Contender("x", 0.90, 0.01), Contender("y", 0.88, 0.01), Contender("start", 0.60, 0.01)]

    def won(*chances, defender=2, count=400):
        table = [(draws < chance).astype(float) for chance in chances]
        return race(lucky, items[:count], lambda c, at: table[c][at], 20, 10**6, defender=defender).winner

    assert won(0.60, 0.60, 0.60) == 2 and won(0.60, 0.60, 0.60, defender=None) == 0
    assert won(0.605, 0.60, 0.60) == 2  # within two standard errors
    assert won(0.80, 0.60, 0.60) == 0 and won(0.60, 0.60, 0.80) == 2
    assert won(1.0, 1.0, 0.0, count=2) == 2  # two answers are no proof
    assert won(1.0, 1.0, 0.0, count=20) == 0


def candidate(generation, responses):
    none = np.zeros(1)
    return Candidate(generation, 0, np.full(2, float(generation)), "", responses, ("accuracy",), none, none, 0, 0, "")


@pytest.mark.parametrize("candidates", [0, 1, 2, 3, 8])
def test_start_and_favorite_race_whatever_is_thought_of_them(candidates):
    """Beside the best that the search has seen; where nothing races, the start stays."""
    known = [candidate(generation, np.ones(4)) for generation in range(6)]
    ranked = [Ranked(known[g], value, 0.1) for g, value in ((3, 0.9), (2, 0.8), (1, 0.7), (4, 0.6), (0, 0.2), (5, 0.1))]
    items = [Item(str(i), "a", "generate", "p", "a") for i in range(40)]
    raced = {}

    def remember(kind, name, places, answer):
        raced[name.split()[0]] = True
        return np.ones(len(places))

    settings = SimpleNamespace(candidates=candidates, share=1.0, defend=True)
    config = SimpleNamespace(race=settings, extract=SimpleNamespace(size=2))
    search = SimpleNamespace(
        config=config, start=known[0].genome, journal=SimpleNamespace(remember=remember), weights=None,
        questions=SimpleNamespace(search=items), seed=lambda stream: 0, stop=lambda: False,
    )  # fmt: skip
    asking = SimpleNamespace(search=search, unseen=lambda: list(range(4, 40)), subset=items[:4])
    winner, found = settle(asking, ranked, 60, favorite=True)
    assert winner is known[0]
    if candidates < 2:
        assert found is None and not raced
    else:
        assert {"0-0", "3-0", "5-0"} <= raced.keys() and len(raced) == max(3, min(candidates, 6))


@pytest.mark.parametrize("ahead,wins", [(1, False), (12, True)])
def test_where_all_have_answered_all_a_start_is_compared_by_that(ahead, wins):
    items = [Item(str(i), "a", "generate", "p", "a") for i in range(40)]
    responses = np.r_[np.ones(ahead), np.zeros(40 - ahead)]
    best, start = candidate(1, responses), candidate(0, np.zeros(40))
    read = lambda answers, count: SimpleNamespace(responses=answers)
    settings = SimpleNamespace(candidates=8, share=0.1, defend=True)
    search = SimpleNamespace(config=SimpleNamespace(race=settings), start=start.genome, weights=None, read=read)
    asking = SimpleNamespace(search=search, unseen=lambda: [], subset=items)
    winner, found = settle(asking, [Ranked(best, 0.5, 0.1), Ranked(start, 0.4, 0.1)], 60, favorite=False)
    assert found is None and winner is (best if wins else start)
