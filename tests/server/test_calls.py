"""Every call of the service, by hand: what it gives, and what it says to what it cannot use."""

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
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from merge3.export import merge_to_disk
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.rpc import convert
from merge3.rpc import merge3_pb2 as pb
from tests.commands import client


def refused(call, code, *words, reason=None):
    """The call fails with a status, one line that says why, and a machine-readable reason."""
    with pytest.raises(grpc.RpcError) as caught:
        found = call()
        if hasattr(found, "__next__"):
            list(found)
    error = caught.value
    assert error.code().name == code, (error.code(), error.details())
    for word in words:
        assert word in error.details(), error.details()
    assert "\n" not in error.details() and "Traceback" not in error.details()
    trailing = dict(error.trailing_metadata())
    detail = pb.Error.FromString(trailing["merge3-error-bin"])
    assert detail.reason and detail.request_id == trailing["x-request-id"]
    if reason:
        assert detail.reason == reason
    return detail


def recipe(world, method="ties", **parameters):
    models = world.config.models
    return Recipe.parse(
        {
            "merge_method": method,
            "base_model": models[0],
            "parameters": parameters,
            "models": [{"model": m, "parameters": {"weight": 0.5}} for m in models[1:]],
        }
    )


# -- a stock client


def test_a_stock_client_lists_checks_health_and_evaluates(daemon, world):
    """Nothing of ours: reflection tells the messages, generic calls do the rest."""
    channel = grpc.insecure_channel(daemon.address)
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {"merge3.v1.Merge3", "grpc.health.v1.Health"} <= set(database.get_services())
    types = descriptor_pool.DescriptorPool(database)
    service = types.FindServiceByName("merge3.v1.Merge3")
    assert {m.name for m in service.methods} == {
        "OpenPool",
        "ListPools",
        "ClosePool",
        "RegisterItems",
        "Evaluate",
        "EvaluateStream",
        "Export",
        "Generate",
        "Status",
        "Watch",
    }
    method = service.FindMethodByName("Evaluate")
    Request, Response = (message_factory.GetMessageClass(t) for t in (method.input_type, method.output_type))
    call = channel.unary_unary(
        "/merge3.v1.Merge3/Evaluate",
        request_serializer=Request.SerializeToString,
        response_deserializer=Response.FromString,
    )
    request = Request(pool_id=world.pool.pool_id, items_id=world.items_id)
    request.genome.values.extend(world.space.initial())
    found = call(request)
    assert len(found.responses) == 6 and found.estimates[0].value == np.mean(found.responses)
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "merge3.v1.Merge3"):
        assert (
            health.Check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING
        )
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


# -- pools


def test_a_pool_is_shared_counted_and_freed(daemon, tiny_world):
    stub = daemon.stub()
    models = [str(tiny_world / "base"), str(tiny_world / "sorting")]
    me, you = ((("merge3-driver", name),) for name in ("me", "you"))
    first = stub.OpenPool(pb.OpenPoolRequest(models=models), metadata=me)
    assert first.holders == 1 and first.parameters > 10_000 and first.resident_bytes > 8 * first.parameters
    assert stub.OpenPool(pb.OpenPoolRequest(models=models), metadata=me).holders == 1  # held once, however often opened
    again = stub.OpenPool(pb.OpenPoolRequest(models=models), metadata=you)
    assert again.pool_id == first.pool_id and again.holders == 2
    relative = stub.OpenPool(pb.OpenPoolRequest(models=["base", "sorting"]), metadata=you)
    assert relative.pool_id != first.pool_id and list(relative.models) == [
        "base",
        "sorting",
    ]  # other names, other recipes
    assert relative.content_hashes["sorting"] == first.content_hashes[models[1]]
    assert {first.pool_id, relative.pool_id} <= {p.pool_id for p in stub.ListPools(pb.ListPoolsRequest()).pools}
    assert stub.ClosePool(pb.ClosePoolRequest(pool_id=relative.pool_id), metadata=you).holders == 0
    stranger = (("merge3-driver", "stranger"),)
    assert (
        stub.ClosePool(pb.ClosePoolRequest(pool_id=first.pool_id), metadata=stranger).holders == 2
    )  # closes nobody else's
    for who, left in ((me, 1), (you, 0)):
        assert stub.ClosePool(pb.ClosePoolRequest(pool_id=first.pool_id), metadata=who).holders == left
    refused(lambda: stub.ClosePool(pb.ClosePoolRequest(pool_id=first.pool_id), metadata=me), "NOT_FOUND", "is not open")


def test_a_pool_closed_under_those_who_wait_is_not_opened_again(daemon, tiny_world, world, by_hand):
    registering, some_items = by_hand
    stub, me = daemon.stub(), (("merge3-driver", "closing"),)
    pool = stub.OpenPool(pb.OpenPoolRequest(models=["base", "translation"]), metadata=me)
    items_id = stub.RegisterItems(registering(pool.pool_id, some_items(3000, start=7000)), metadata=me).items_id
    request = pb.EvaluateRequest(pool_id=pool.pool_id, items_id=items_id, endpoint="base")
    calls = [stub.Evaluate.future(request, metadata=me) for _ in range(4)]
    while stub.Status(pb.StatusRequest()).queued < 3:
        assert not calls[0].done()
    assert stub.ClosePool(pb.ClosePoolRequest(pool_id=pool.pool_id), metadata=me).holders == 0
    assert len(calls[0].result().responses) == 3000
    assert {call.exception().code().name for call in calls[1:]} == {"NOT_FOUND"}
    assert pool.pool_id not in {p.pool_id for p in stub.ListPools(pb.ListPoolsRequest()).pools}
    again = stub.OpenPool(pb.OpenPoolRequest(models=["base", "translation"]), metadata=me)
    assert again.pool_id == pool.pool_id
    refused(lambda: stub.Evaluate(request, metadata=me), "NOT_FOUND", "items_id")  # went with the pool
    stub.ClosePool(pb.ClosePoolRequest(pool_id=pool.pool_id), metadata=me)


def test_who_leaves_while_a_pool_opens_leaves_it_usable(daemon, tiny_world, world):
    stub, me = daemon.stub(), (("merge3-driver", "impatient"),)
    wanted = pb.OpenPoolRequest(models=["base", "italian"])
    leaving = stub.OpenPool.future(wanted, metadata=me)
    time.sleep(0.005)
    leaving.cancel()
    pool = stub.OpenPool(wanted, metadata=me)
    assert pool.holders == 1
    assert stub.ClosePool(pb.ClosePoolRequest(pool_id=pool.pool_id), metadata=me).holders == 0


def test_one_pool_too_many(tiny_world, start):
    daemon = start(tiny_world, limits={"pools": 2})
    stub = daemon.stub()
    pools = [stub.OpenPool(pb.OpenPoolRequest(models=["base", expert])) for expert in ("english", "italian")]
    refused(
        lambda: stub.OpenPool(pb.OpenPoolRequest(models=["base", "sorting"])),
        "RESOURCE_EXHAUSTED",
        "2 are open",
        "--max-pools",
    )
    stub.OpenPool(pb.OpenPoolRequest(models=["base", "italian"]))  # one that is open is shared
    stub.ClosePool(pb.ClosePoolRequest(pool_id=pools[0].pool_id))
    stub.OpenPool(pb.OpenPoolRequest(models=["base", "sorting"]))


BAD_POOLS = {
    "none": ([], "INVALID_ARGUMENT", "0 models"),
    "many": (["base"] * 65, "INVALID_ARGUMENT", "65 models"),
    "empty name": ([""], "INVALID_ARGUMENT", "models[0]"),
    "revision": (["base@main"], "INVALID_ARGUMENT", "a revision"),
    "nowhere": (["base", "nowhere"], "NOT_FOUND", "nowhere"),
    "nul": (["base", "a\0b"], "INVALID_ARGUMENT", "path"),
    "long": (["base", "x" * 5000], "INVALID_ARGUMENT", "5000 characters"),
    "long name": (["base", "x" * 300], "INVALID_ARGUMENT", "File name too long"),
    "file": (["base", "english.jsonl"], "NOT_FOUND", "no such directory"),
}


@pytest.mark.parametrize("case", BAD_POOLS)
def test_pools_that_cannot_be(daemon, case):
    models, code, word = BAD_POOLS[case]
    refused(lambda: daemon.stub().OpenPool(pb.OpenPoolRequest(models=models)), code, word)
    refused(
        lambda: daemon.stub().OpenPool(pb.OpenPoolRequest(models=["base"], dtype="int8")), "INVALID_ARGUMENT", "float32"
    )


# -- items


def test_registering_again_is_free_and_what_is_missing_is_named(daemon, world, by_hand):
    registering, some_items = by_hand
    stub, items = world.stub, some_items(40, start=1000)
    definition = world.config.genome.definition()
    none = stub.RegisterItems(registering(world.pool.pool_id, items, definition, known=range(40)))
    assert none.items_id == "" and list(none.missing_entries) == list(range(40))
    first = stub.RegisterItems(registering(world.pool.pool_id, items, definition, known=range(0, 40, 2)))
    assert list(first.missing_entries) == list(range(0, 40, 2))
    whole = stub.RegisterItems(registering(world.pool.pool_id, items, definition, known=range(1, 40, 2)))
    assert whole.items_id and whole.items == 40
    again = stub.RegisterItems(registering(world.pool.pool_id, items, definition, known=range(40)))
    assert again.items_id == whole.items_id
    other = stub.RegisterItems(registering(world.pool.pool_id, items, definition, known=range(40), seed=1))
    assert other.items_id != whole.items_id


def changed(**changes):
    message = pb.Item(
        id="a", task="t", kind="generate", prompt="one two", texts=pb.Texts(values=["x"]), metric="exact", max_tokens=2
    )
    message.MergeFrom(pb.Item(**{k: v for k, v in changes.items() if v is not None}))
    for key in [k for k, v in changes.items() if v is None]:
        message.ClearField(key)
    return message


BAD_ITEMS = {
    "kind": (changed(kind="quiz"), "kind is 'quiz'; expected choice, generate, classify"),
    "prompt": (changed(prompt=None), "prompt is"),
    "answer": (changed(texts=None), "answer is None"),
    "pattern": (changed(metric="regex", texts=pb.Texts(values=["(("])), "is no pattern"),
    "number": (changed(metric="number", texts=pb.Texts(values=["many"])), "expected a number"),
    "tokens": (changed(max_tokens=-1), "max_tokens is -1"),
    "one choice": (
        pb.Item(id="a", kind="choice", prompt="p", choices=["x"], index=0),
        "1 choices; expected at least 2",
    ),
    "beyond": (pb.Item(id="a", kind="choice", prompt="p", choices=["x", "y"], index=2), "an index below 2"),
    "classify": (pb.Item(id="a", kind="classify", prompt="p", index=0), "classify"),
    "long": (changed(prompt=" ".join(["one"] * 5000)), "tokens"),
}


@pytest.mark.parametrize("case", BAD_ITEMS)
def test_items_that_cannot_be(world, case):
    message, words = BAD_ITEMS[case]
    parts = [
        pb.RegisterItemsRequest(header=pb.RegisterHeader(pool_id=world.pool.pool_id)),
        pb.RegisterItemsRequest(entries=pb.Entries(entries=[pb.Entry(digest=convert.digest(message), item=message)])),
    ]
    refused(lambda: world.stub.RegisterItems(iter(parts)), "INVALID_ARGUMENT", words, reason="items")


def test_registrations_that_cannot_be(world, by_hand):
    registering, some_items = by_hand
    stub, pool, items = world.stub, world.pool.pool_id, some_items(3, start=2000)
    header, entries = registering(pool, items)
    stub.RegisterItems(iter([header, entries]))
    digest = entries.entries.entries[0].digest
    wrong = pb.RegisterItemsRequest(
        entries=pb.Entries(entries=[pb.Entry(digest=digest[:31] + b"!", item=entries.entries.entries[0].item)])
    )
    space = convert.space_to(world.config.genome.definition())

    def with_header(**fields):
        return [pb.RegisterItemsRequest(header=pb.RegisterHeader(pool_id=pool, **fields)), entries]

    def with_space(**fields):
        other = pb.SpaceDefinition()
        other.CopyFrom(space)
        for key, value in fields.items():
            if key == "bounds":
                other.bounds["weight"].CopyFrom(value)
            elif key in ("models", "genes"):
                getattr(other, key)[:] = value
            else:
                setattr(other, key, value)
        return with_header(space=other)

    blob = pb.Blob(digest=b"0" * 32, data=b"nothing", last=True)
    key = hashlib.sha256(b"no message \xff").digest()
    junk = pb.RegisterItemsRequest(blob=pb.Blob(digest=key, data=b"no message \xff", last=True))
    cases = [
        ([], "an empty stream"),
        ([entries], "first one header"),
        ([header, header], "first one header"),
        ([header], "no items"),
        ([header, pb.RegisterItemsRequest()], "nothing"),
        ([header, wrong], "of something else"),
        ([header, pb.RegisterItemsRequest(entries=pb.Entries(entries=[pb.Entry(digest=b"short")]))], "SHA-256"),
        ([header, pb.RegisterItemsRequest(blob=blob)], "blob: digest"),
        (with_header(weights={"words": -1.0}), "weights: words"),
        (with_header(weights={"words": float("nan")}), "weights: words"),
        (with_header(weights={"words": 0.0}), "weights"),
        (with_header(heads={"words": "/nowhere"}), "heads: words"),
        ([*with_header(estimators={"words": key})[:1], junk, entries], "not a message of that kind"),
        (with_space(method="tise"), "did you mean"),
        (with_space(preset="magic"), "genome: preset"),
        (with_space(genes=["luck"]), "luck"),
        (with_space(bounds=pb.Range(low=1, high=0)), "low < high"),
        (with_space(base=""), "base_model"),
        (with_space(models=[]), "0 models"),
    ]
    for parts, words in cases:
        refused(lambda parts=parts: stub.RegisterItems(iter(parts)), "INVALID_ARGUMENT", words)
    unknown = [pb.RegisterItemsRequest(header=pb.RegisterHeader(pool_id="none")), entries]
    refused(lambda: stub.RegisterItems(iter(unknown)), "NOT_FOUND", "is not open")


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
