"""A daemon that holds experts compacted: the answers of this process, the option its own or the driver's."""

import contextlib

import numpy as np
import pytest

from merge3 import LocalEngine, Pool, Registration, SpaceDefinition, read_items
from merge3.client import run
from merge3.client.channel import Target
from merge3.client.remote import RemoteEngine
from merge3.engine import Taken
from merge3.errors import BadInput, ResumeMismatch
from merge3.experts import Experts
from merge3.search.config_files import load_config
from tests.commands import server
from tests.server.daemons import Thread

HELD = "residual:0.1"


@pytest.fixture(scope="module")
def daemon(solving_world):
    """One whose pools are compacted where drivers do not say."""
    daemon = Thread(solving_world, experts=Experts.parse(HELD))
    yield daemon
    daemon.kill()


def names_of(world):
    return [str(world / name) for name in ("base", "english", "italian")]


def test_a_daemon_answers_as_this_process_does(daemon, solving_world, tmp_path):
    names = names_of(solving_world)
    items = tuple(read_items(solving_world / "english.jsonl")[:20])
    asked = Registration(items, SpaceDefinition(tuple(names[1:]), "ties", names[0], layer_granularity=2))
    local = LocalEngine(Pool.open(names[0], names[1:], experts_as=HELD))
    with contextlib.closing(RemoteEngine(daemon.address, names)) as remote:
        here, there = local.info(), remote.info()
        assert (there.experts, there.losses, there.notes) == (here.experts, here.losses, here.notes)
        assert there.experts == HELD and len(there.losses) == 2
        genome = np.full(local.space(asked.space).size, 0.5)
        recipe = local.space(asked.space).recipe(genome)
        subjects = [genome, recipe, Taken(recipe, True), names[1], Taken(names[1], False)]
        found = []
        for engine in (local, remote):
            evaluations = {one.index: one.answers().tolist() for one in engine.evaluate(asked, subjects)}
            found.append([evaluations[index] for index in range(len(subjects))])
        assert found[0] == found[1] and found[0][0] == found[0][1]
        assert found[0][3] != found[0][4]
        remote.export(recipe, tmp_path / "there")
    LocalEngine(Pool.open(names[0], names[1:])).export(recipe, tmp_path / "here")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("here", "there")]
    assert files[0] == files[1]  # of the full checkpoints


def test_a_driver_may_ask_for_another_option(daemon, solving_world):
    names, pools = names_of(solving_world), set()
    for experts, found in (("", HELD), (HELD, HELD), ("int8", "int8"), ("full", "full")):
        with contextlib.closing(RemoteEngine(daemon.address, names, experts=experts)) as remote:
            assert remote.info().experts == found and bool(remote.info().losses) == (found != "full")
            pools.add(remote._pool_id)
    assert len(pools) == 3
    with pytest.raises(BadInput, match="experts: found 'half'; expected full, int8, residual"):
        RemoteEngine(daemon.address, names, experts="half")
    done = server("serve", "--root", solving_world, "--experts", "residual:3")
    assert done.returncode == 2 and "--experts: found 'residual:3'" in done.stderr


def test_a_run_knows_what_the_daemon_held(daemon, solving_world, tmp_path):
    """No word of it in the configuration; the run's result and identity have it all the same."""
    config, target = load_config(solving_world / "evolve.yaml", budget=6), Target(daemon.address)
    result = run.evolve(config, tmp_path / "run", quiet=True, export=False, target=target)
    assert result["experts"]["option"] == HELD and len(result["experts"]["endpoints"]) == 3
    with pytest.raises(ResumeMismatch, match=f"experts is full, was {HELD} when the run began"):
        run.evolve(config, tmp_path / "run", resume=True, quiet=True)
    held = config.model_copy(update={"experts": HELD})
    assert run.evolve(held, tmp_path / "run", resume=True, quiet=True, export=False)["experts"] == result["experts"]
