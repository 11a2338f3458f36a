"""Starting, stopping under load, and what a stopped or busy daemon says."""

import json
import logging
import subprocess
import sys
import threading
import time

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from merge3.rpc import convert
from merge3.rpc import merge3_pb2 as pb
from merge3.search.config_files import load_config
from merge3.space import Space
from tests.commands import server


def prepared(daemon, tiny_world, by_hand, count=6):
    """(stub, request, space) of a pool with items."""
    registering, some_items = by_hand
    config, stub = load_config(tiny_world / "evolve.yaml"), daemon.stub()
    pool = stub.OpenPool(pb.OpenPoolRequest(models=config.models))
    definition = config.genome.definition()
    space = Space(definition, convert.pool_from(pool, "").layout)
    items_id = stub.RegisterItems(registering(pool.pool_id, some_items(count), definition)).items_id
    return (
        stub,
        pb.EvaluateRequest(pool_id=pool.pool_id, items_id=items_id, genome=pb.Genome(values=space.initial())),
        space,
    )


class Load(threading.Thread):
    """A driver that evaluates until it is refused; `ended`: how its last call ended."""

    def __init__(self, daemon, request):
        super().__init__(daemon=True)
        self.stub, self.request, self.answered, self.ended = daemon.stub(), request, 0, None

    def run(self):
        while self.ended is None:
            try:
                self.stub.Evaluate(self.request, timeout=60)
                self.answered += 1
            except grpc.RpcError as error:
                self.ended = error.code().name


def test_sigterm_under_load_ends_with_0_and_every_call_with_a_status(tiny_world, start_process, by_hand):
    daemon = start_process("--root", tiny_world, "--listen", "127.0.0.1:0", "--grace", "20")
    _, request, _ = prepared(daemon, tiny_world, by_hand)
    stub = daemon.stub()
    streams = [stub.EvaluateStream(iter([request] * 200)), stub.Watch(pb.WatchRequest(interval_seconds=0.1))]
    drivers = [Load(daemon, request) for _ in range(16)]
    for driver in drivers:
        driver.start()
    while min(driver.answered for driver in drivers) == 0:
        assert not any(driver.ended for driver in drivers)
        time.sleep(0.01)
    began = time.monotonic()
    assert daemon.stop(25) == 0
    assert time.monotonic() - began < 20
    for driver in drivers:
        driver.join(30)
        assert driver.answered > 0 and driver.ended in ("UNAVAILABLE", "CANCELLED"), driver.ended
    for stream in streams:
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code().name in ("UNAVAILABLE", "CANCELLED")
    assert "stopped" in daemon.lines[-1], "".join(daemon.lines[-10:])


def test_accepted_calls_are_finished_and_health_says_it_stops(tiny_world, start, by_hand):
    daemon = start(tiny_world, grace=60)
    stub, request, _ = prepared(daemon, tiny_world, by_hand, 2000)
    health = health_pb2_grpc.HealthStub(grpc.insecure_channel(daemon.address)).Watch(health_pb2.HealthCheckRequest())
    assert next(health).status == health_pb2.HealthCheckResponse.SERVING
    calls = queued(stub, request, 5)
    daemon.ask()
    assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
    late = stub.Evaluate.future(request)
    assert all(len(call.result().responses) == 2000 for call in calls)
    assert late.exception().code().name == "UNAVAILABLE"
    daemon.wait(30)


def queued(stub, request, count):
    """So many calls that the daemon has accepted: one at a time is worked at, others wait for their turn."""
    calls = [stub.Evaluate.future(request) for _ in range(count)]
    while (status := stub.Status(pb.StatusRequest())).queued + status.evaluated < count - 1:
        time.sleep(0.01)
    return calls


def test_a_second_signal_stops_at_once(tiny_world, start, by_hand):
    daemon = start(tiny_world, grace=120)
    stub, request, _ = prepared(daemon, tiny_world, by_hand, 3000)
    calls = queued(stub, request, 200)
    daemon.ask()
    daemon.wait_for("stopping")
    assert daemon.running()
    began = time.monotonic()
    daemon.stop(30)
    assert time.monotonic() - began < 5
    assert {call.exception().code().name for call in calls if call.exception()} <= {"UNAVAILABLE", "CANCELLED"}


def test_the_grace_time_ends(tiny_world, start, by_hand):
    daemon = start(tiny_world, grace=2)
    stub, request, _ = prepared(daemon, tiny_world, by_hand, 3000)
    calls = queued(stub, request, 200)
    began = time.monotonic()
    daemon.stop(30)
    assert time.monotonic() - began < 6
    codes = {call.exception().code().name if call.exception() else "OK" for call in calls}
    assert codes <= {"OK", "UNAVAILABLE", "CANCELLED"} and "UNAVAILABLE" in codes


def test_a_pool_from_a_file_json_logs_and_a_unix_socket(tiny_world, tmp_path, start_process):
    told = {"models": ["base", "english"], "dtype": "bfloat16", "tokenizer": {"pad_to_multiple_of": 64}}
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump(told))
    socket = f"unix:{tmp_path}/d.sock"
    options = ("--listen", socket, "--listen", "127.0.0.1:0", "--pool", tmp_path / "pool.yaml", "--log-json")
    daemon = start_process("--root", tiny_world, *options)
    assert daemon.address == socket
    (pool,) = daemon.stub().ListPools(pb.ListPoolsRequest()).pools
    assert pool.dtype == "bfloat16" and pool.holders == 1
    assert pool.tokenizer.source == "union" and pool.tokenizer.pad_to_multiple_of == 64
    left = daemon.stub().ClosePool(pb.ClosePoolRequest(pool_id=pool.pool_id))
    assert left.holders == 1  # the operator's
    lines = [json.loads(line) for line in daemon.lines if line.startswith("{")]
    assert [line for line in lines if line["message"] == "pool" and line["models"] == 2 and line["level"] == "info"]
    assert daemon.stop() == 0


BAD_STARTS = {
    "root": (("--root", "/no/such/root"), "no such directory"),
    "address": (("--listen", "256.1.1.1:1", "--insecure"), "cannot listen"),
    "public": (("--listen", "0.0.0.0:0"), "--insecure"),
    "workers": (("--workers", "slurm"), "local, ray or ray:N"),
    "device": (("--device", "cuda"), "no CUDA device"),
    "pool": (("--pool", "no-such.yaml"), "no-such.yaml"),
    "metrics": (("--metrics", "9000"), "host:port"),
    "budget": (("--memory-budget", "100KiB"), "memory_budget: found 0.1 MiB"),
}


@pytest.fixture
def own_log():
    """A command sets the log up for a process of its own."""
    logger = logging.getLogger("merge3")
    handlers, propagates, level = list(logger.handlers), logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = handlers, propagates
    logger.setLevel(level)


@pytest.mark.parametrize("case", BAD_STARTS)
def test_bad_options_are_one_line_and_a_code(tiny_world, tmp_path, own_log, case):
    options, words = BAD_STARTS[case]
    if case in ("device", "budget"):
        (tmp_path / "pool.yaml").write_text("models: [base, english]\n")
        options = (*options, "--pool", tmp_path / "pool.yaml")
    done = server("serve", "--root", tiny_world, "--listen", "127.0.0.1:0", *options)
    assert done.returncode in (1, 2) and words in done.stderr, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] and "Traceback" not in done.stderr


def process(*arguments):
    command = [sys.executable, "-m", "merge3_server", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_process_ends_with_these_codes(daemon, tiny_world):
    """2: bad input; 1: not the caller's fault, here a port that is taken; 0: above, where one is stopped."""
    done = process("serve", "--root", "/no/such/root")
    assert done.returncode == 2 and done.stderr.startswith("error: /no/such/root: no such directory")
    assert done.stderr.count("\n") == 1
    done = process("serve", "--root", tiny_world, "--listen", daemon.address)
    assert done.returncode == 1 and f"error: --listen {daemon.address}: cannot listen there" in done.stderr


def test_help_has_an_example_and_imports_nothing_heavy():
    done = server("serve", "--help")
    assert done.returncode == 0 and "Example: merge3-server serve" in done.stdout
    heavy = ("torch", "transformers", "grpc", "ray")
    code = f"import sys; import merge3_server.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_memory_budget_is_in_the_log_and_too_small_a_one_is_refused(start, tiny_world):
    models = load_config(tiny_world / "evolve.yaml").models
    daemon = start(tiny_world, memory_budget=2 << 30)
    daemon.stub().OpenPool(pb.OpenPoolRequest(models=models))
    assert "budget 2.00 GiB" in daemon.wait_for("memory: ")
    daemon = start(tiny_world, memory_budget=100 << 10)
    with pytest.raises(grpc.RpcError) as refused:
        daemon.stub().OpenPool(pb.OpenPoolRequest(models=models))
    assert (
        refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        and "memory_budget: found 0.1 MiB" in refused.value.details()
    )
