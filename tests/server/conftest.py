"""Daemons to call, with a world to serve."""

import shutil
import socket
from types import SimpleNamespace

import pytest

from merge3.rpc import convert, spaces
from merge3.rpc import merge3_pb2 as pb
from merge3.tasks import Item
from tests.server.daemons import Process, Thread


@pytest.fixture(scope="session")
def tiny_world(solving_world, tmp_path_factory):
    """A copy that tests may add files to, all below one daemon's root."""
    return shutil.copytree(solving_world, tmp_path_factory.mktemp("served") / "world")


@pytest.fixture
def start():
    """Starts daemons that end with the test; see Thread."""
    yield from _starting(Thread)


@pytest.fixture
def start_process():
    """Starts processes that end with the test; see Process."""
    yield from _starting(Process)


def _starting(kind):
    running = []

    def begin(*arguments, **options):
        running.append(kind(*arguments, **options))
        return running[-1]

    yield begin
    for daemon in running:
        daemon.kill()


@pytest.fixture(scope="session")
def daemon(tiny_world, tmp_path_factory):
    """One for all tests that leave it as it was."""
    exports = tmp_path_factory.mktemp("exports")
    daemon = Thread(tiny_world, export_root=exports, metrics="127.0.0.1:0", limits={"pools": 100, "steps": 1000})
    daemon.exports = exports
    yield daemon
    daemon.kill()


@pytest.fixture(scope="session")
def world(daemon, tiny_world):
    """The daemon with a pool open and a few items registered, for calls by hand."""
    from merge3.search.config_files import load_config
    from merge3.space import Space

    config = load_config(tiny_world / "evolve.yaml")
    stub = daemon.stub()
    pool = stub.OpenPool(pb.OpenPoolRequest(models=config.models))
    space = Space(config.genome.definition(), convert.pool_from(pool, "").layout)
    found = stub.RegisterItems(iter(registering(pool.pool_id, some_items(6), config.genome.definition())))

    def request(genome=None, **more):
        values = space.initial() if genome is None else genome
        fields = dict(pool_id=pool.pool_id, items_id=found.items_id) | more
        return pb.EvaluateRequest(**fields, genome=pb.Genome(values=values))

    return SimpleNamespace(stub=stub, pool=pool, space=space, items_id=found.items_id, config=config, request=request)


def some_items(count, start=0):
    from merge3.world.numbers import ENGLISH as words

    return [
        Item(
            f"q{i}",
            "words",
            "generate",
            f"{words[i % 10]} {words[(i // 10) % 10]}",
            (words[(i + 1) % 10],),
            metric="exact",
            max_tokens=2,
        )
        for i in range(start, start + count)
    ]


def registering(pool_id, items, space=None, known=(), **header):
    """The messages of a RegisterItems call; items at positions in `known` go by digest alone."""
    yield pb.RegisterItemsRequest(
        header=pb.RegisterHeader(pool_id=pool_id, space=spaces.space_to(space) if space else None, **header)
    )
    entries = pb.Entries()
    for i, item in enumerate(items):
        message = convert.item_to(item)
        entries.entries.add(digest=convert.digest(message), item=None if i in known else message)
    yield pb.RegisterItemsRequest(entries=entries)


@pytest.fixture(scope="session")
def by_hand():
    return registering, some_items


@pytest.fixture
def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
