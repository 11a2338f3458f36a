"""Searches for paths on a daemon are those in this process."""

import sqlite3

import pytest
import yaml

from merge3.client import run
from merge3.client.channel import Target
from merge3.search.config_files import load_config

TASKS = [{"items": f"./{task}.jsonl", "limit": 12} for task in ("english", "translation")]
MODELS = {"models": ["./english", "./translation"]}
KINDS = {
    "path": {"genome": MODELS | {"space": "path", "repetitions": 2, "max_hops": 7, "pinned": [1, 1]}},
    "stages": {
        "genome": MODELS | {"base_model": "./base", "merge_method": "ties", "max_hops": 8},
        "stages": ["parameters", {"space": "path", "optimizer": {"name": "catcma"}}],
    },
}


def journal(directory):
    with sqlite3.connect(directory / "run.db") as db:
        rows = "SELECT generation, position, genome, responses, error FROM candidates ORDER BY 1, 2"
        return [db.execute(query).fetchall() for query in (rows, "SELECT * FROM estimates ORDER BY 1, 2, 3")]


@pytest.mark.parametrize("kind", KINDS)
def test_remote_and_embedded_searches_are_the_same(daemon, tiny_world, tmp_path, kind):
    name = {"path": "catcma", "stages": "cma"}[kind]
    optimizer = {"name": name, "budget": 12, "population": 6, "seed": 3}
    file = tiny_world / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(KINDS[kind] | {"tasks": TASKS, "optimizer": optimizer}))
    results = []
    for where in (None, Target(daemon.address)):
        side = tmp_path / ("here" if where is None else "there") / "run"
        results.append(run.evolve(load_config(file), side, quiet=True, target=where))
    here, there = tmp_path / "here" / "run", tmp_path / "there" / "run"
    assert journal(here) == journal(there)
    for part in ("model", "parameters") if kind == "stages" else ("model",):
        assert (here / part / "model.safetensors").read_bytes() == (there / part / "model.safetensors").read_bytes()
    assert results[0]["heldout"] == results[1]["heldout"] and results[0]["ledger"] == results[1]["ledger"]
