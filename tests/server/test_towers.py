"""A daemon that holds a vision-language model and a language model: the same map, the same answers about pictures."""

import contextlib
import shutil

import numpy as np
import pytest

from merge3 import LocalEngine, Pool, Registration, SpaceDefinition, read_items
from merge3.client.remote import RemoteEngine
from merge3.errors import CheckpointError, ItemsError
from tests.vlms import make_sights
from tests.worlds import shared

GIVEN = {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}


@pytest.fixture(scope="module")
def sights():
    yield from shared(make_sights)


@pytest.mark.parametrize("tower", [{}, GIVEN])
def test_a_daemon_merges_and_asks_as_this_process_does(sights, start, tmp_path, tower):
    daemon = start(sights)
    names = [str(sights / name) for name in ("base", "seeing", "words")]
    items = tuple(read_items(sights / "items.jsonl"))
    space = SpaceDefinition(tuple(names[1:]), "task_arithmetic", names[0], layer_granularity=1, tower=tower)
    genomes = [np.full(8, 0.5), np.linspace(0, 1, 8)]
    local = LocalEngine(Pool.open(names[0], names[1:], tower=tower))
    with contextlib.closing(RemoteEngine(daemon.address, names, tower=tower)) as remote:
        here, there = local.info(), remote.info()
        assert there.notes == here.notes and len(here.notes) == 3
        assert (there.layout, there.kept) == (here.layout, here.kept)
        asked = Registration(items, space)
        subjects = [*genomes, names[2]]
        for one, other in zip(local.evaluate(asked, subjects), remote.evaluate(asked, subjects)):
            assert one.answers().tolist() == other.answers().tolist() and one.recipe_hash == other.recipe_hash
        recipe = local.space(space).recipe(genomes[1])
        assert dict(recipe.tower) == tower
        remote.export(recipe, tmp_path / "there")
        local.export(recipe, tmp_path / "here")
        files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("here", "there")]
        assert files[0] == files[1]


def test_what_a_daemon_cannot_find_is_refused_before_anything_is_asked(sights, start, tmp_path):
    world = shutil.copytree(sights, tmp_path / "world")
    daemon = start(world)
    names = [str(world / name) for name in ("base", "words")]
    with pytest.raises(CheckpointError, match="no tensor begins with 'x.'"):
        RemoteEngine(daemon.address, names, tower={"x.": "y."})
    items = tuple(read_items(world / "items.jsonl"))
    with contextlib.closing(RemoteEngine(daemon.address, names)) as remote:
        (world / "0.png").write_bytes(b"no picture")
        with pytest.raises(ItemsError, match=r"line 4: item 'c0png' of task 'items': unreadable image .*0\.png"):
            remote.prepare(Registration(items))
