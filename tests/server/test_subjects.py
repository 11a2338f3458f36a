"""Genomes, recipes and endpoints by hand: evaluated, exported, continued; and what the daemon says of itself."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request

import grpc
import numpy as np
import pytest

from merge3.export import merge_to_disk
from merge3.pool import Pool
from merge3.rpc import merge3_pb2 as pb
from tests.commands import client
from tests.server.calling import recipe, refused

# -- candidates


def test_genomes_recipes_and_endpoints(world):
    genome = world.stub.Evaluate(world.request())
    same = pb.EvaluateRequest(
        pool_id=world.pool.pool_id,
        items_id=world.items_id,
        recipe=world.space.recipe(world.space.initial()).to_yaml(),
        index=7,
    )
    by_recipe = world.stub.Evaluate(same)
    assert list(by_recipe.responses) == list(genome.responses) and by_recipe.index == 7
    assert genome.recipe_hash == by_recipe.recipe_hash == world.space.recipe(world.space.initial()).hash()
    endpoint = world.stub.Evaluate(
        pb.EvaluateRequest(pool_id=world.pool.pool_id, items_id=world.items_id, endpoint=world.config.models[0])
    )
    assert len(endpoint.responses) == 6 and endpoint.recipe_hash == ""
    assert genome.seconds > 0 and genome.swap_seconds > 0 and genome.worker == "local"


def test_candidates_that_cannot_be(world):
    stub, size = world.stub, world.space.size
    bad = [
        (world.request(np.zeros(size - 1)), f"{size - 1} values; expected {size}"),
        (world.request(np.zeros(0)), "0 values"),
        (world.request(np.full(size, np.nan)), "genome[0]: found nan"),
        (world.request(np.full(size, -np.inf)), "found -inf"),
        (pb.EvaluateRequest(pool_id=world.pool.pool_id, items_id=world.items_id), "subject: none"),
        (world.request(idempotency_key="k" * 201), "idempotency_key"),
    ]
    for text, words in (
        ("", "recipe"),
        ("merge_method: [", "not YAML"),
        ("{}", "merge_method"),
        ("[" * 100_000, "recipe"),
        ("a: &a [x]\nb: [*a, *a]", "an alias"),
        ("merge_method: ties\nmerge_method: dare", "line 2: key 'merge_method' twice"),
        ('{"merge_method": "ties", "dtype": "float16", "dtype": "bfloat16"}', "line 1: key 'dtype' twice"),
        (recipe(world).to_yaml().replace(world.config.models[1], "/etc"), "'/etc' is not in the pool"),
        ("\x00", "recipe"),
        (json.dumps({"merge_method": "ties", "models": [{"model": "m"}] * 3}), "recipe"),
    ):
        bad.append((pb.EvaluateRequest(pool_id=world.pool.pool_id, items_id=world.items_id, recipe=text), words))
    bad.append(
        (
            pb.EvaluateRequest(pool_id=world.pool.pool_id, items_id=world.items_id, endpoint="/etc"),
            "endpoint: found '/etc'",
        )
    )
    for request, words in bad:
        refused(lambda r=request: stub.Evaluate(r), "INVALID_ARGUMENT", words)
        refused(lambda r=request: stub.EvaluateStream(iter([world.request(), r])), "INVALID_ARGUMENT", words)
    # What only merging shows is the subject's own failure: the others of its stream are evaluated.
    for text, words in (
        (recipe(world).to_yaml().replace("ties", "tise"), "did you mean 'ties'?"),
        (recipe(world, density=7).to_yaml(), "a value in [0, 1]"),
    ):
        failing = pb.EvaluateRequest(pool_id=world.pool.pool_id, items_id=world.items_id, recipe=text, index=1)
        found = {e.index: e for e in stub.EvaluateStream(iter([world.request(), failing]))}
        assert found[1].error.reason == "recipe" and words in found[1].error.expected + found[1].error.hint
        assert not found[1].responses and np.isnan(found[1].estimates[0].value)
        assert len(found[0].responses) == 6 and not found[0].HasField("error")
    refused(lambda: stub.Evaluate(world.request(pool_id="none")), "NOT_FOUND", "pool_id")
    refused(lambda: stub.Evaluate(world.request(items_id="none")), "NOT_FOUND", "items_id")
    large = pb.EvaluateRequest(pool_id=world.pool.pool_id, items_id=world.items_id, recipe="#" * 2_000_000)
    refused(lambda: stub.Evaluate(large), "RESOURCE_EXHAUSTED", "at most 1000000")


def test_a_stream_answers_every_request_and_keeps_the_indices(world):
    rng = np.random.default_rng(1)
    genomes = [
        np.clip(world.space.initial() + rng.normal(size=world.space.size) * 0.2, *world.space.bounds())
        for _ in range(150)
    ]
    requests = [world.request(g, index=1000 + i) for i, g in enumerate(genomes)]
    found = {e.index: e for e in world.stub.EvaluateStream(iter(requests))}  # more than may be under way at once
    assert sorted(found) == [1000 + i for i in range(150)]
    for i in (0, 77, 149):
        assert found[1000 + i].recipe_hash == world.space.recipe(genomes[i]).hash()
    assert list(world.stub.EvaluateStream(iter([]))) == []


def test_one_answer_per_idempotency_key(daemon, world):
    before = world.stub.Status(pb.StatusRequest()).evaluated
    calls = [world.stub.Evaluate.future(world.request(idempotency_key="same", index=i)) for i in range(20)]
    answers = [call.result() for call in calls]
    late = world.stub.Evaluate(world.request(idempotency_key="same"))
    assert world.stub.Status(pb.StatusRequest()).evaluated == before + 1
    assert [a.index for a in answers] == list(range(20)) and len({a.seconds for a in [*answers, late]}) == 1
    other = world.space.initial() * 0.9
    refused(
        lambda: world.stub.Evaluate(world.request(other, idempotency_key="same")),
        "INVALID_ARGUMENT",
        "used for another request",
    )
    refused(lambda: world.stub.Evaluate(world.request(np.zeros(1), idempotency_key="bad")), "INVALID_ARGUMENT")
    assert (
        world.stub.Evaluate(world.request(idempotency_key="bad")).estimates[0].value >= 0
    )  # a refusal is not remembered


def test_deadlines_and_cancelling_stop_work_between_batches(world, by_hand):
    registering, some_items = by_hand
    slow = some_items(3000, start=3000)
    items_id = world.stub.RegisterItems(
        registering(world.pool.pool_id, slow, world.config.genome.definition())
    ).items_id
    began = time.monotonic()
    world.stub.Evaluate(world.request(items_id=items_id))
    whole = time.monotonic() - began
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        world.stub.Evaluate(world.request(items_id=items_id), timeout=whole / 10)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    call = world.stub.Evaluate.future(world.request(items_id=items_id))
    threading.Timer(whole / 20, call.cancel).start()
    with pytest.raises(grpc.FutureCancelledError):
        call.result()
    stream = world.stub.EvaluateStream(iter([world.request(items_id=items_id, index=i) for i in range(30)]))
    time.sleep(whole / 20)
    stream.cancel()
    world.stub.Evaluate(world.request())  # the slot is free again, long before 30 evaluations would be done
    assert time.monotonic() - began < 3 * whole + 1
    assert world.stub.Status(pb.StatusRequest()).queued == 0


# -- checkpoints and text


def test_export_into_the_stream_and_under_the_root(daemon, world, tmp_path):
    merge = recipe(world, method="dare_ties", density=0.6)
    merge_to_disk(merge, tmp_path / "here", Pool.open(world.config.models[0], world.config.models[1:]), seed=5)
    request = dict(pool_id=world.pool.pool_id, recipe=merge.to_yaml(), seed=5)
    *parts, last = world.stub.Export(pb.ExportRequest(**request))
    files = {}
    for part in parts:
        if part.HasField("chunk"):
            assert part.chunk.offset == len(files.setdefault(part.chunk.file, b""))
            files[part.chunk.file] += part.chunk.data
    assert any(part.HasField("progress") for part in parts) and last.result.path == ""
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "here").iterdir()}
    assert {f: hashlib.sha256(data).digest() for f, data in files.items()} == dict(last.result.files)
    *_, written = world.stub.Export(pb.ExportRequest(**request, directory="first/model"))
    assert written.result.path == str(daemon.exports / "first/model") and written.result.tensors == last.result.tensors
    assert (daemon.exports / "first/model/model.safetensors").read_bytes() == files["model.safetensors"]
    refused(
        lambda: world.stub.Export(pb.ExportRequest(**request, directory="first/model")), "INVALID_ARGUMENT", "not empty"
    )
    for outside in ("../else", "/tmp/else", "first/../../else"):
        refused(
            lambda d=outside: world.stub.Export(pb.ExportRequest(**request, directory=d)),
            "PERMISSION_DENIED",
            "outside",
        )
    refused(lambda: world.stub.Export(pb.ExportRequest(**request, directory=".")), "INVALID_ARGUMENT", "new directory")
    assert not list(daemon.exports.glob("merge3-export-*"))


def test_generate_continues_a_prompt_like_the_scorer(world, by_hand):
    from merge3.tasks.items import Item

    prompt, endpoint = "english one plus two equals", world.config.models[1]
    pieces = [
        r.text
        for r in world.stub.Generate(
            pb.GenerateRequest(pool_id=world.pool.pool_id, endpoint=endpoint, prompt=prompt, max_tokens=3)
        )
    ]
    text = "".join(pieces)
    assert text and len(pieces) <= 3
    item = Item("g", "g", "generate", prompt, (text.strip(),), metric="exact", max_tokens=3)
    registering, _ = by_hand
    items_id = world.stub.RegisterItems(registering(world.pool.pool_id, [item])).items_id
    request = pb.EvaluateRequest(pool_id=world.pool.pool_id, items_id=items_id, endpoint=endpoint)
    assert list(world.stub.Evaluate(request).responses) == [1.0]
    refused(
        lambda: world.stub.Evaluate(world.request(items_id=items_id)), "INVALID_ARGUMENT", "registered without a space"
    )
    merged = world.stub.Generate(
        pb.GenerateRequest(pool_id=world.pool.pool_id, recipe=recipe(world).to_yaml(), prompt=prompt)
    )
    assert "".join(r.text for r in merged)
    for fields, words in (
        (dict(max_tokens=2000), "max_tokens"),
        (dict(max_tokens=900), "tokens"),
        (dict(endpoint=""), "endpoint"),
        (dict(chat=True), "chat template"),
    ):
        request = pb.GenerateRequest(**dict(pool_id=world.pool.pool_id, endpoint=endpoint, prompt=prompt) | fields)
        refused(lambda r=request: world.stub.Generate(r), "INVALID_ARGUMENT", words)


# -- status


def test_status_watch_metrics_and_the_log(daemon, world):
    world.stub.Evaluate(world.request(), metadata=(("x-request-id", "mine-1"), ("merge3-driver", "somebody")))
    status = world.stub.Status(pb.StatusRequest())
    assert (
        status.state == "serving"
        and status.evaluated >= 1
        and status.candidates_per_minute >= 1
        and status.resident_bytes > 1 << 26
    )
    assert [w.name for w in status.workers] == ["local"] and status.workers[0].pid == os.getpid()
    assert "somebody" in {d.name for d in status.drivers}
    watch = world.stub.Watch(pb.WatchRequest(interval_seconds=0.05))
    first, second = next(watch), next(watch)
    assert second.uptime_seconds > first.uptime_seconds
    watch.cancel()
    refused(lambda: world.stub.Watch(pb.WatchRequest(interval_seconds=-1)), "INVALID_ARGUMENT", "interval_seconds")
    line = next(line for line in daemon.lines if "[mine-1] candidate" in line)
    assert re.search(r"driver=somebody recipe=[0-9a-f]+ value=[\d.]+ .*answers=6 .*worker=local", line)
    metrics = re.search(r"\] metrics .*address=\S*:(\d+)", "".join(daemon.lines))
    assert metrics, "".join(daemon.lines[:30])
    page = urllib.request.urlopen(f"http://127.0.0.1:{metrics[1]}/metrics", timeout=10).read().decode()
    for name in (
        "merge3_candidates_total",
        "merge3_queued",
        "merge3_queue_seconds_bucket",
        "merge3_pools ",
        "merge3_resident_bytes",
    ):
        assert name in page
    assert re.search(r'merge3_calls_total\{code="INVALID_ARGUMENT",method="/merge3.v1.Merge3/Watch"\} 1.0', page)


def test_status_and_watch_in_the_terminal(daemon, world):
    shown = client("status", "--server", daemon.address)
    assert shown.returncode == 0 and "worker local" in shown.stdout and "pools" in shown.stdout
    assert json.loads(client("status", "--server", daemon.address, "--json").stdout)["state"] == "serving"
    command = [sys.executable, "-m", "merge3.client", "watch", "--server", daemon.address, "--interval", "0.1"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # it ends with its process
    lines = [watching.stdout.readline() for _ in range(3)]
    watching.terminate()
    watching.wait(30)
    assert all("candidates" in line and "local" in line for line in lines)
    gone = client("status", "--server", "127.0.0.1:1")
    assert (
        gone.returncode == 1
        and gone.stderr.startswith("error: daemon 127.0.0.1:1: does not answer")
        and gone.stderr.count("\n") == 1
    )
