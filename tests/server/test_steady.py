"""Questions that follow each other on one stream: taken as evaluations are, asked again where the daemon was away."""

import sqlite3
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from merge3.client import run
from merge3.client.channel import Target
from merge3.client.remote import RemoteEngine
from merge3.engine import LocalEngine
from merge3.errors import RecipeError
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.search.config_files import load_config
from merge3.search.questions import load_questions
from merge3.space import Space
from tests.server.test_remote import journal, variant


@pytest.fixture(scope="module")
def asked(tiny_world):
    """(models, an engine in this process, a registration, genomes of its space)"""
    config = load_config(tiny_world / "evolve.yaml")
    local = LocalEngine(Pool.open(config.models[0], config.models[1:]))
    space, items = Space(config.genome.definition(), local.info().layout), load_questions(config).subset[:10]
    rng = np.random.default_rng(0)
    genomes = [np.clip(space.initial() + rng.normal(size=space.size) * 0.1, *space.bounds()) for _ in range(12)]
    return config.models, local, Registration(tuple(items), space.definition), genomes


@pytest.mark.parametrize("in_flight", [1, 3, 50])
def test_questions_are_taken_as_evaluations_are(daemon, asked, in_flight):
    """By either engine; of several registrations, with subjects of every kind and one that fails."""
    models, local, registration, genomes = asked
    other = replace(registration, items=registration.items[3:])
    weights = {"model": models[1], "parameters": {"weight": 1.0, "density": 7}}
    bad = Recipe.parse({"merge_method": "ties", "base_model": models[0], "models": [weights]})
    subjects = [models[1], bad, *genomes]
    found = []
    for engine in (local, RemoteEngine(daemon.address, models)):
        taken, evaluations = 0, {}

        def questions():
            nonlocal taken
            for subject in subjects:
                taken += 1
                yield (registration, other)[taken % 2], subject

        for evaluation in engine.evaluate_each(questions(), in_flight):
            assert taken == min(len(subjects), in_flight + len(evaluations))
            evaluations[evaluation.index] = evaluation
        assert sorted(evaluations) == list(range(len(subjects)))
        found.append(evaluations)
    for index, one in found[0].items():
        another = found[1][index]
        assert np.array_equal(one.values, another.values, equal_nan=True) and one.recipe_hash == another.recipe_hash
        assert (type(one.error), str(one.error)) == (type(another.error), str(another.error))
        assert one.responses is None or len(one.responses) == (7, 10)[index % 2]
    assert isinstance(found[0][1].error, RecipeError)


def test_no_questions_no_evaluations(daemon, asked):
    models, local, _, _ = asked
    for engine in (local, RemoteEngine(daemon.address, models)):
        assert list(engine.evaluate_each(iter(()), 3)) == []


def test_who_leaves_in_the_middle_may_ask_again(daemon, asked):
    models, _, registration, genomes = asked
    engine = RemoteEngine(daemon.address, models)
    before = threading.active_count()
    for _ in range(3):
        evaluations = engine.evaluate_each(((registration, genome) for genome in genomes), 3)
        first = next(evaluations)
        evaluations.close()
    assert first.index in range(3)
    assert len(list(engine.evaluate_each(((registration, genome) for genome in genomes), 3))) == len(genomes)
    until = time.monotonic() + 10
    while threading.active_count() > before + 1 and time.monotonic() < until:
        time.sleep(0.05)
    assert threading.active_count() <= before + 1  # nobody waits for questions that will not come


def test_a_pool_says_how_many_workers_its_daemon_has(daemon, asked):
    models, local, _, _ = asked
    assert RemoteEngine(daemon.address, models).info().workers == local.info().workers == 1


@pytest.mark.heavy
@pytest.mark.parametrize("method", ["random", "irt"])
def test_kill_9_of_the_daemon_while_candidates_are_under_way(tiny_world, tmp_path, start_process, method):
    """What was under way is asked again in its order, so with one worker the run is the one in this process."""
    address = f"unix:{tmp_path}/merge3.sock"
    optimizer = {"budget": 18, "population": 6, "seed": 1, "asking": "steady"}
    few = {"extract": {"method": method, "size": 8}, "estimate": {"models": 8, "check_every": 1}}
    config = load_config(variant(tiny_world, "steady", optimizer=optimizer, **few))
    run.evolve(config, tmp_path / "local", quiet=True, export=False)
    options = ("--root", tiny_world, "--listen", address)
    daemons, killed = [start_process(*options)], []

    def count(store):
        try:
            with sqlite3.connect(store) as db:
                return db.execute("SELECT COUNT(*) FROM candidates").fetchone()[0]
        except sqlite3.OperationalError:
            return 0

    def kill_and_restart():
        store = tmp_path / "run" / "run.db"
        while not store.exists() or count(store) < 8:
            time.sleep(0.002)
        daemons[-1].kill()
        killed.append(count(store))
        daemons.append(start_process(*options))

    killer = threading.Thread(target=kill_and_restart, daemon=True)
    killer.start()
    run.evolve(config, tmp_path / "run", quiet=True, export=False, target=Target(address))
    killer.join(120)
    assert killed and 8 <= killed[0] < 18
    assert journal(tmp_path / "local") == journal(tmp_path / "run")
    with sqlite3.connect(tmp_path / "run" / "run.db") as db:
        assert db.execute("SELECT value FROM run WHERE key = 'in flight'").fetchone() == ("2",)
