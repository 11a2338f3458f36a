"""Searches for paths on a daemon are those in this process."""

import dataclasses
import sqlite3

import pytest
import yaml

from merge3.client import run
from merge3.client.channel import Target
from merge3.client.remote import RemoteEngine
from merge3.errors import BadInput
from merge3.hops import Hop, path_recipe
from merge3.registration import Registration
from merge3.search.config_files import load_config
from merge3.space import SpaceDefinition
from merge3.tasks import read_items

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


def test_what_is_wrong_with_a_merge_that_should_join_is_told_and_nothing_joins(daemon, tiny_world):
    models = [str(tiny_world / name) for name in ("base", "english", "translation")]
    engine = RemoteEngine(daemon.address, models)
    parts = [{"model": model, "parameters": {"weight": 1.0}} for model in models[1:]]
    linear = {"merge_method": "linear", "models": parts}
    good = path_recipe([Hop("it", 1), Hop(models[1], 0, 0.5)], "it", ("o_proj", "down_proj"), merged={"it": linear})
    engine.check(good)
    wrong = {
        "no mapping": ({"it": 3}, "it: found int; expected a mapping"),
        "a seed below 0": ({"it": linear | {"seed": -1}}, "seed: found -1"),
        "no models": ({"it": {"merge_method": "linear"}}, "neither `models` nor `slices`"),
        "a model from elsewhere": ({"it": linear | {"models": [{"model": "/etc"}]}}, "'/etc' is not in the pool"),
        "another's name": ({models[2]: linear, "it": linear}, "is an endpoint"),
        "itself": ({"it": linear | {"models": [{"model": "it", "parameters": {"weight": 1.0}}]}}, "is not in the pool"),
        "nothing": ({}, "model 'it' is not in the pool"),
    }
    for merged, message in wrong.values():
        other = RemoteEngine(daemon.address, models, dtype="bfloat16")  # a pool that nothing has joined
        with pytest.raises(BadInput, match=message):
            other.check(dataclasses.replace(good, merged=merged))
    assert engine.info().endpoints == tuple(models)
    definition = SpaceDefinition(("it", models[1]), "passthrough", kind="path", merged="[1")
    with pytest.raises(BadInput, match="merged: found"):
        engine.prepare(Registration(tuple(read_items(tiny_world / "english.jsonl"))[:2], definition))
