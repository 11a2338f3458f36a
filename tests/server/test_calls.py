"""Pools and registrations by hand: what the service gives, and what it says to what it cannot use."""

import contextlib
import hashlib
import shutil
import time

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from merge3.client.remote import RemoteEngine
from merge3.engine import LocalEngine
from merge3.pool import Pool
from merge3.rpc import convert, spaces
from merge3.rpc import merge3_pb2 as pb
from merge3.space import SpaceDefinition
from tests.server.calling import refused

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
        "RelativeNorms",
        "Evaluate",
        "EvaluateStream",
        "Fit",
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


def test_a_model_that_was_changed_is_not_served_as_it_was(start, tiny_world, tmp_path):
    """Its last driver was killed, so that the pool is still held; what is opened then is what lies there now."""
    for name in ("base", "sorting"):
        shutil.copytree(tiny_world / name, tmp_path / name)
    stub = start(tmp_path, limits={"idle": 0.0}).stub()
    wanted = pb.OpenPoolRequest(models=["base", "sorting"])
    killed, other = ((("merge3-driver", name),) for name in ("killed", "other"))
    before = stub.OpenPool(wanted, metadata=killed)
    assert stub.OpenPool(wanted, metadata=other).pool_id == before.pool_id
    shutil.copy(tiny_world / "italian" / "model.safetensors", tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "sorting" / "model.safetensors")
    now = stub.OpenPool(wanted, metadata=other)
    assert now.pool_id != before.pool_id and now.content_hashes["base"] == before.content_hashes["base"]
    assert now.content_hashes["sorting"] != before.content_hashes["sorting"]
    assert [p.pool_id for p in stub.ListPools(pb.ListPoolsRequest()).pools] == [now.pool_id]


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
    space = spaces.space_to(world.config.genome.definition())

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


def test_relative_norms_are_those_of_this_process(daemon, world):
    definition = world.config.genome.definition()
    local = LocalEngine(Pool.open(world.config.models[0], world.config.models[1:]))
    with contextlib.closing(RemoteEngine(daemon.address, world.config.models)) as engine:
        found, expected = engine.relative_norms(definition), local.relative_norms(definition)
    assert np.array_equal(found, expected, equal_nan=True) and len(found) == world.space.size
    path = SpaceDefinition(definition.models, "passthrough", kind="path")
    request = pb.RelativeNormsRequest(pool_id=world.pool.pool_id, space=spaces.space_to(path))
    refused(lambda: world.stub.RelativeNorms(request), "INVALID_ARGUMENT", "a path has no task vectors")
