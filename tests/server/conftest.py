"""A real daemon in a process of its own, on loopback."""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import pytest

from merge3.rpc import convert, merge3_pb2_grpc
from merge3.rpc import merge3_pb2 as pb
from merge3.tasks import Item


class Daemon:
    """`merge3-server serve` with some options. `lines`: what it said so far."""

    def __init__(self, *options, env=None, wait=True):
        command = [sys.executable, "-m", "merge3_server", "serve", *map(str, options)]
        self.lines, self._heard = [], queue.Queue()
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | (env or {}),
        )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()
        self.address = self.wait_for("merge3-server listens on", 120).split(" on ")[1].split(", ")[0].strip() if wait else None

    def _listen(self):
        for line in self.process.stdout:
            self.lines.append(line)
            self._heard.put(line)
        self._heard.put(None)

    def wait_for(self, text, seconds=30):
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                line = self._heard.get(timeout=left)
            except queue.Empty:
                break
            if line is None:
                break
            if text in line:
                return line
        raise AssertionError(f"no {text!r} in:\n{''.join(self.lines[-30:])}")

    def stub(self, channel=None):
        return merge3_pb2_grpc.Merge3Stub(channel or grpc.insecure_channel(self.address))

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        return self.process.wait(30)

    def stop(self, seconds=60):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@pytest.fixture(scope="session")
def tiny_world(solving_world):
    return solving_world


@pytest.fixture
def start():
    """Starts daemons that end with the test."""
    running = []

    def begin(*options, **more):
        running.append(Daemon(*options, **more))
        return running[-1]

    yield begin
    for daemon in running:
        daemon.kill()


@pytest.fixture(scope="session")
def daemon(tiny_world, tmp_path_factory):
    """One for all tests that leave it as it was."""
    exports = tmp_path_factory.mktemp("exports")
    options = ("--export-root", exports, "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--max-pools", 100, "--verbose")
    daemon = Daemon("--root", tiny_world, *options)
    daemon.exports = exports
    yield daemon
    daemon.kill()


@pytest.fixture(scope="session")
def world(daemon, tiny_world):
    """The daemon with a pool open and a few items registered, for calls by hand."""
    from merge3.search.config import load_config
    from merge3.space import Space

    config = load_config(tiny_world / "evolve.yaml")
    stub = daemon.stub()
    pool = stub.OpenPool(pb.OpenPoolRequest(models=config.models))
    space = Space(config.genome.definition(), convert.pool_from(pool, "").layout)
    found = stub.RegisterItems(iter(registering(pool.pool_id, some_items(6), config.genome.definition())))

    class World:
        pass

    World.stub, World.pool, World.space, World.items_id, World.config = stub, pool, space, found.items_id, config
    World.request = staticmethod(
        lambda genome=None, **more: pb.EvaluateRequest(
            **dict(pool_id=pool.pool_id, items_id=found.items_id) | more, genome=pb.Genome(values=space.initial() if genome is None else genome)
        )
    )
    return World


def some_items(count, start=0):
    from merge3.client import tiny

    words = tiny.ENGLISH
    return [
        Item(f"q{i}", "words", "generate", f"{words[i % 10]} {words[(i // 10) % 10]}", (words[(i + 1) % 10],), metric="exact", max_tokens=2)
        for i in range(start, start + count)
    ]


def registering(pool_id, items, space=None, known=(), **header):
    """The messages of a RegisterItems call; items at positions in `known` go by digest alone."""
    yield pb.RegisterItemsRequest(
        header=pb.RegisterHeader(pool_id=pool_id, space=convert.space_to(space) if space else None, **header)
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
