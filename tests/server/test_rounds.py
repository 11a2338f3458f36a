"""A search in rounds on a daemon is the one in this process: merges of merges cross the wire as recipes."""

import sqlite3

import pytest
import yaml

from merge3.client import run
from merge3.client.channel import Target
from merge3.client.remote import RemoteEngine
from merge3.errors import BadInput
from merge3.recipe import Recipe
from merge3.search.config_files import load_config


def journal(directory):
    with sqlite3.connect(directory / "run.db") as db:
        rows = "SELECT generation, position, genome, responses, error FROM candidates ORDER BY 1, 2"
        estimates, answers = "SELECT * FROM estimates ORDER BY 1, 2, 3", "SELECT * FROM answers ORDER BY 1, 2"
        return [db.execute(query).fetchall() for query in (rows, estimates, answers)]


def test_remote_and_embedded_searches_are_the_same(daemon, tiny_world, tmp_path):
    models = [str(tiny_world / name) for name in ("base", "english", "translation")]
    data = {
        "genome": {"models": models[1:], "base_model": models[0], "merge_method": "ties"},
        "tasks": [{"items": str(tiny_world / f"{task}.jsonl")} for task in ("english", "translation")],
        "extract": {"method": "random", "size": 8},
        "optimizer": {"budget": 18, "population": 6, "seed": 3, "rounds": 3, "elites": 2},
    }
    (tmp_path / "rounds.yaml").write_text(yaml.safe_dump(data))
    results = []
    for where in (None, Target(daemon.address)):
        side = tmp_path / ("here" if where is None else "there") / "run"
        results.append(run.evolve(load_config(tmp_path / "rounds.yaml"), side, quiet=True, target=where))
    here, there = tmp_path / "here" / "run", tmp_path / "there" / "run"
    assert journal(here) == journal(there)
    for one in (elite for result in results for told in result["rounds"] for elite in told["elites"]):
        del one["recipe_hash"]  # of names that say where the run lies
    assert results[0]["rounds"] == results[1]["rounds"]
    assert results[0]["heldout"] == results[1]["heldout"] and results[0]["ledger"] == results[1]["ledger"]
    written = sorted(path.relative_to(here) for path in here.rglob("model.safetensors"))
    assert written == sorted(path.relative_to(there) for path in there.rglob("model.safetensors"))
    assert all((here / file).read_bytes() == (there / file).read_bytes() for file in written)


def test_what_is_wrong_with_a_merge_of_merges_is_told_before_anything_is_computed(daemon, tiny_world):
    models = [str(tiny_world / name) for name in ("base", "english", "translation")]
    engine = RemoteEngine(daemon.address, models)
    of = lambda *names: {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1.0}} for m in names],
    }
    good = Recipe.parse(of("two", models[1]) | {"merged": {"one": of(*models[1:]), "two": of("one", models[2])}})
    engine.check(good)
    wrong = {
        "one that is not said": {"two": of("one", models[2])},
        "one that is made of what is made of it": {"one": of("two"), "two": of("one", models[2])},
    }
    for merged in wrong.values():
        with pytest.raises(BadInput, match="is not in the pool"):
            engine.check(Recipe.parse(good.to_dict() | {"merged": merged}))
    assert engine.info().endpoints == tuple(models)
