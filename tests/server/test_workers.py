"""Several workers behind one daemon: Ray actors, restarted and asked again by Ray when they die."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from merge3.client import run
from merge3.client.channel import Target
from merge3.client.remote import RemoteEngine
from merge3.engine import LocalEngine
from merge3.pool import Pool
from merge3.registration import Registration
from merge3.rpc import merge3_pb2 as pb
from merge3.search.config_files import load_config
from merge3.search.journal import Journal
from merge3.search.questions import load_questions
from merge3.space import Space
from tests.commands import client
from tests.server.daemons import Process
from tests.server.test_remote import journal, variant

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def two(tiny_world):
    """A daemon with two workers on the CPU."""
    daemon = Process("--root", tiny_world, "--listen", "127.0.0.1:0", "--workers", "ray:2")
    yield daemon
    assert daemon.stop(60) == 0


def in_order(directory):
    """A journal's candidates as they came."""
    with closing(sqlite3.connect(directory / "run.db")) as db:
        return db.execute(
            "SELECT generation, position, genome, responses, value, stderr "
            "FROM candidates JOIN estimates USING (generation, position) ORDER BY arrived"
        ).fetchall()


@pytest.fixture
def asked(tiny_world):
    config = load_config(tiny_world / "evolve.yaml")
    local = LocalEngine(Pool.open(config.models[0], config.models[1:]))
    space, items = Space(config.genome.definition(), local.info().layout), load_questions(config).subset
    rng = np.random.default_rng(0)
    genomes = [np.clip(space.initial() + rng.normal(size=space.size) * 0.1, *space.bounds()) for _ in range(60)]
    asked = Registration(tuple(items), space.definition)
    return config, asked, genomes, {e.index: e.value for e in local.evaluate(asked, genomes)}


def test_both_work_and_the_answers_are_the_same(two, asked):
    config, registration, genomes, expected = asked
    engine = RemoteEngine(two.address, config.models)
    assert {e.index: e.value for e in engine.evaluate(registration, genomes)} == expected
    status = two.stub().Status(pb.StatusRequest())
    assert [w.name for w in status.workers] == ["ray-0", "ray-1"]
    assert len({w.pid for w in status.workers} | {two.process.pid}) == 3


@pytest.mark.heavy
def test_kill_9_of_a_worker_loses_no_candidate(two, asked):
    config, registration, genomes, expected = asked
    engine = RemoteEngine(two.address, config.models)
    pids, found = [w.pid for w in two.stub().Status(pb.StatusRequest()).workers], {}
    for evaluation in engine.evaluate(registration, genomes):
        found[evaluation.index] = evaluation.value
        if len(found) == 10:
            os.kill(pids[0], signal.SIGKILL)
        if len(found) == 30:
            os.kill(pids[1], signal.SIGKILL)
    assert found == expected
    again = [w.pid for w in two.stub().Status(pb.StatusRequest()).workers]
    assert set(again).isdisjoint(pids)


def test_a_search_by_generations_on_two_workers_has_the_embedded_journal(two, tiny_world, tmp_path):
    """Whichever of a generation, or of a calibration's models, is answered first."""
    few = {"extract": {"method": "irt", "size": 8}, "estimate": {"models": 8, "check_every": 1}}
    config = load_config(variant(tiny_world, "by-generations", optimizer={"asking": "generations"}, **few))
    run.evolve(config, tmp_path / "local", quiet=True)
    run.evolve(config, tmp_path / "two", quiet=True, target=Target(two.address))
    assert journal(tmp_path / "local") == journal(tmp_path / "two")


@pytest.mark.heavy
def test_a_steady_search_on_two_workers_is_what_it_was_when_it_is_killed(two, tiny_world, tmp_path):
    """`auto` is steady there. What had come stands, in its order; and whoever takes it up asks what it would have."""
    config = variant(tiny_world, "on-two", extract={"method": "random", "size": 8}, optimizer={"budget": 40})
    directory = tmp_path / "run"
    arguments = ["evolve", str(config), "--run-dir", str(directory), "--no-export"]
    command = [sys.executable, "-m", "merge3.client", *arguments, "--server", two.address]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:  # one for each generation
            if line.startswith("generation 1"):
                process.send_signal(signal.SIGKILL)
    before = in_order(directory)
    assert 6 <= len(before) < 40
    done = client(*arguments, "--resume", "--server", two.address)
    assert done.returncode == 0 and "so that no worker waits" in done.stderr, done.stderr
    after = in_order(directory)
    assert len(after) == 40 and after[: len(before)] == before
    with closing(Journal(directory)) as store:
        known = store.identity()
        assert (known["workers"], known["in flight"]) == ("2", "3")
    # This process has one worker. It goes on from what two had come to, and keeps as many under way.
    kept = "SELECT generation, position FROM candidates"
    with closing(sqlite3.connect(directory / "run.db")) as db, db:
        db.execute("DELETE FROM candidates WHERE arrived > 20")
        db.execute(f"DELETE FROM estimates WHERE (generation, position) NOT IN ({kept})")
        db.execute("DELETE FROM answers")
    embedded = run.evolve(load_config(config), directory, resume=True, quiet=True, export=False)
    assert embedded["candidates"] == 40 and in_order(directory)[:20] == after[:20]


@pytest.mark.heavy
def test_turns_of_a_fit_run_anywhere_and_make_the_same_steps(two, tiny_world):
    """Also in a process that was not there when it began."""
    from tests.server.test_fit import learning, local, told

    what = learning(tiny_world, "expert_kl", steps=60)
    expected = told(local(what))
    engine = RemoteEngine(two.address, what.models)
    killed, steps = [], []
    for step in engine.fit(what.asked, what.fit):
        steps.append(step)
        while step.number == 1 and not killed:
            busy = [w for w in two.stub().Status(pb.StatusRequest()).workers if w.busy_with.startswith("fit for")]
            killed = [w.pid for w in busy]
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
    assert told(steps) == expected
    assert killed[0] not in [w.pid for w in two.stub().Status(pb.StatusRequest()).workers]


def test_who_leaves_stops_a_worker_too(two, asked, by_hand):
    config, registration, genomes, _ = asked
    _, some_items = by_hand
    engine = RemoteEngine(two.address, config.models)
    long = replace(registration, items=tuple(some_items(3000, start=5000)))
    engine.prepare(long)
    began = time.monotonic()
    next(engine.evaluate(long, genomes[:1]))
    whole = time.monotonic() - began
    began = time.monotonic()
    for _ in engine.evaluate(long, genomes):
        break
    short = replace(registration, items=tuple(some_items(4)))
    assert len(list(engine.evaluate(short, genomes[:2]))) == 2
    assert time.monotonic() - began < 4 * whole + 2  # not the sixty that were asked for
