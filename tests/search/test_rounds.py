"""Searches in rounds: elites join the models, in memory and within its budget; killed and resumed; told; refused."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from merge3.client import run
from merge3.engine import LocalEngine
from merge3.errors import BadInput, ConfigError
from merge3.export import merge_to_disk
from merge3.joined import joined, rehearsed
from merge3.memory import shown_size
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.search.config import EvolveConfig
from merge3.search.config_files import load_config
from merge3.search.context import Progress
from merge3.search.journal import Journal
from merge3.search.questions import load_questions
from merge3.search.race import Ranked
from merge3.search.run import run as search_run
from merge3.search.succession import budget_of, next_models
from merge3.space import Space, SpaceDefinition

SUBSETS = {"extract": {"method": "random", "size": 8}, "race": {"share": 0.5}}
OPTIMIZER = {"budget": 25, "population": 4, "seed": 3, "rounds": 3, "elites": 2}


def written(folder, world, name="rounds", genome=(), optimizer=(), **changes):
    """A configuration over the tiny world, which stays where it is."""
    models = {"base_model": str(world / "base"), "models": [str(world / m) for m in ("english", "italian", "translation")]}
    tasks = [{"items": str(world / f"{task}.jsonl")} for task in ("english", "translation")]
    data = {"genome": models | {"merge_method": "task_arithmetic"} | dict(genome), "tasks": tasks}
    data |= {"optimizer": OPTIMIZER | dict(optimizer)} | SUBSETS | changes
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    return folder / f"{name}.yaml"


def journal(directory):
    """Everything a resumed run must repeat to the last bit."""
    with sqlite3.connect(directory / "run.db") as db:
        candidates = db.execute(
            "SELECT generation, position, genome, recipe_hash, responses, value, stderr "
            "FROM candidates JOIN estimates USING (generation, position) ORDER BY 1, 2"
        ).fetchall()
        return candidates, db.execute("SELECT * FROM answers ORDER BY 1, 2").fetchall()


def same_weights(one, other):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def undisturbed(solving_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    file = written(folder, solving_world)
    result = run.evolve(load_config(file), folder / "run", quiet=True)
    return folder / "run", file, result


def test_a_run_in_rounds_has_one_journal_one_ledger_one_report_and_one_winner(undisturbed):
    directory, _, result = undisturbed
    assert json.loads((directory / "result.json").read_text()) == json.loads(json.dumps(result))
    assert [one["candidates"] for one in result["rounds"]] == [9, 8, 8] and result["candidates"] == 25
    ledger = result["ledger"]
    assert ledger["elites"] == sum(one["contenders"] * one["items"] for one in result["rounds"][:2]) > 0
    assert ledger["total"] == sum(ledger[k] for k in ("calibration", "search", "checks", "elites", "race"))
    assert ledger["search"] == 25 * 16 and ledger["full"] == 25 * 56
    assert ledger["race"] <= 0.5 * ledger["search"]
    assert [one["won"] for one in result["rounds"]].count(True) == 1
    for one in result["rounds"][:2]:
        assert [elite["name"] for elite in one["elites"]] == [f"{one['round']}-1", f"{one['round']}-2"]
        first, second = one["elites"]
        assert first["recipe_hash"] != second["recipe_hash"] and first["together"] <= second["together"]
        assert set(first["tasks"]) == {"english", "translation"}
    page = (directory / "report.html").read_text()
    assert "The rounds" in page and page.count('class="round"') == 2 and ">round 3<" in page and ">2-2<" in page
    assert '"marks":[9,17]' in page
    with closing(Journal(directory)) as store:
        generations = [c.generation for c in store.candidates()]
    assert generations == sorted(generations) and len(set(generations)) == 3 + 2 + 2


def test_the_winner_is_a_recipe_that_merges_to_the_model(undisturbed, tmp_path):
    """And so are the elites, from the first on, in place of those that the run exported."""
    directory, _, result = undisturbed
    best = Recipe.from_yaml(directory / "best.yaml")
    named = {str(m).rpartition("/")[2] for m in best.models() if "/elites/" in str(m)}
    there = {p.name for p in (directory / "elites").iterdir() if p.is_dir()}
    won = next(one["round"] for one in result["rounds"] if one["won"])
    assert named == there == (set() if won == 1 else {f"{won - 1}-1", f"{won - 1}-2"})
    merge_to_disk(best, tmp_path / "again")
    assert same_weights(directory / "model", tmp_path / "again")
    copy = tmp_path / "run"
    shutil.copytree(directory / "elites", copy / "elites", ignore=lambda _, names: set(names) & there)
    for name in ("1-1", "1-2", "2-1", "2-2"):
        text = (copy / "elites" / f"{name}.yaml").read_text().replace(str(directory), str(copy))
        (copy / "elites" / f"{name}.yaml").write_text(text)
        merge_to_disk(Recipe.from_yaml(copy / "elites" / f"{name}.yaml"), copy / "elites" / name)
        assert name not in there or same_weights(copy / "elites" / name, directory / "elites" / name)


def killed(command, directory, counts, whole):
    """Run it, and kill -9 it whenever the journal has so many candidates."""
    for stop_after in counts:
        extra = ["--resume"] if directory.exists() else []
        process = subprocess.Popen([*command, *extra], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (directory / "run.db").exists():
                try:
                    if len(journal(directory)[0]) >= stop_after:
                        break
                except sqlite3.OperationalError:
                    pass  # not created yet
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert stop_after <= len(journal(directory)[0]) < whole, process.stderr.read().decode()


@pytest.mark.parametrize("counts", [(12,), pytest.param((4, 9, 12, 17, 20), marks=pytest.mark.heavy)])
def test_a_run_that_is_killed_in_any_round_goes_on_to_the_same_bits(undisturbed, tmp_path, counts):
    directory, file, result = undisturbed
    aside = tmp_path / "aside"
    shutil.move(directory, aside)  # the same name, which elites' are made of
    try:
        command = [sys.executable, "-m", "merge3.client", "evolve", str(file), "--run-dir", str(directory), "--quiet"]
        killed(command, directory, counts, 25)
        again = run.evolve(load_config(file), directory, resume=True, quiet=True)
        shutil.move(directory, tmp_path / "killed")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.move(aside, directory)
    assert journal(tmp_path / "killed") == journal(directory)
    for name in ("best.yaml", *(f"elites/{at}.yaml" for at in ("1-1", "1-2", "2-1", "2-2"))):
        assert (tmp_path / "killed" / name).read_bytes() == (directory / name).read_bytes()
    for key in ("heldout", "baselines", "ledger", "rounds", "race", "race_of_rounds"):
        assert again[key] == result[key]
    assert same_weights(tmp_path / "killed" / "model", directory / "model")


def searched(file, directory, resume=False, stop=lambda: False, told=lambda p: None, **how):
    config = load_config(file)
    with closing(Journal(directory)) as store, closing(run.open_engine(config, quiet=True, **how)) as engine:
        return search_run(config, load_questions(config), engine, store, resume, told, stop)


def test_stopped_among_contenders_and_told_of_rounds(undisturbed, tmp_path):
    directory, file, _ = undisturbed
    told = []

    def seen(progress):
        told.append(Progress(**vars(progress)))

    halted = lambda: bool(told) and told[-1].stage == "elites" and told[-1].round == 2 and told[-1].done == 1
    aside = tmp_path / "aside"
    shutil.move(directory, aside)
    try:
        assert searched(file, directory, stop=halted, told=seen) is None
        assert [(p.round, p.rounds, p.later) for p in told if p.stage == "search" and p.done == 1] == [(1, 3, 16), (2, 3, 8)]
        assert len(journal(directory)[0]) == 17
        told.clear()
        outcome = searched(file, directory, resume=True, told=seen)
        assert {p.round for p in told if p.stage == "search"} == {3} and outcome.candidates == 25
        found = journal(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.move(aside, directory)
    assert found == journal(directory)


def test_where_all_items_are_answered_nothing_more_is_asked_and_the_highest_value_wins(solving_world, tmp_path):
    file = written(tmp_path, solving_world, extract={"method": "all"}, optimizer={"rounds": 2, "budget": 12, "originals": True})
    result = run.evolve(load_config(file), tmp_path / "run", quiet=True, export=False)
    assert result["ledger"]["elites"] == result["ledger"]["race"] == 0 and result["race_of_rounds"] is None
    with closing(Journal(tmp_path / "run")) as store:
        candidates = store.candidates()
    assert result["search_value"] == max(c.value for c in candidates)
    (first, *_), second = result["rounds"][0]["elites"], candidates[6]
    assert first["value"] == max(c.value for c in candidates[:6])
    # five models: two elites and the three that there were; the uniform merge of all comes first
    assert len(second.genome) == len(candidates[0].genome) * 5 // 3 or len(second.genome) == 5 + 1
    assert not (tmp_path / "run" / "elites" / "1-1").exists()


def test_random_keeps_are_the_same_in_an_elite_in_memory_and_on_disk(solving_world, tmp_path):
    file = written(tmp_path, solving_world, genome={"merge_method": "dare_ties"}, optimizer={"rounds": 2, "budget": 8})
    run.evolve(load_config(file), tmp_path / "run", quiet=True)
    merge_to_disk(Recipe.from_yaml(tmp_path / "run" / "elites" / "1-2.yaml"), tmp_path / "elite", seed=3)
    if (tmp_path / "run" / "elites" / "1-2").exists():
        assert same_weights(tmp_path / "elite", tmp_path / "run" / "elites" / "1-2")
    merge_to_disk(Recipe.from_yaml(tmp_path / "run" / "best.yaml"), tmp_path / "again", seed=3)
    assert same_weights(tmp_path / "run" / "model", tmp_path / "again")
