"""What comes over the wire from those who do not mean well, or do not know better."""

import json
import random
import socket
import threading
import time

import grpc
import numpy as np
import pytest

from merge3.rpc import convert, spaces
from merge3.rpc import merge3_pb2 as pb
from tests.asking import answers

METHODS = (
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
)
STREAMED = ("EvaluateStream", "Fit", "Export", "Generate")


def still_serves(world):
    found = world.stub.Evaluate(world.request(), timeout=60)
    assert found.estimates[0].value == np.mean(found.responses) and len(found.responses) == 6
    return list(found.responses)


def test_garbage_bytes_on_the_port(daemon, world):
    host, port = daemon.address.split(":")
    rng = random.Random(0)
    before = still_serves(world)
    for start in (
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
    ):
        for size in (0, 1, 9, 1000, 100_000):
            with socket.create_connection((host, int(port)), timeout=10) as s:
                s.settimeout(0.2)
                try:
                    s.sendall(start + rng.randbytes(size))
                    s.recv(1000)
                except OSError:
                    pass  # closed on us, as it should
    assert still_serves(world) == before


def test_messages_over_the_limit(world):
    for request in (world.request(np.zeros(1_000_000)), pb.EvaluateRequest(recipe="x" * 5_000_000)):
        with pytest.raises(grpc.RpcError) as caught:
            world.stub.Evaluate(request)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError) as caught:
        world.stub.Evaluate(world.request(), metadata=(("x-request-id", "y" * 100_000),))
    assert caught.value.code() in (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
    )
    still_serves(world)


def test_a_million_items(daemon, world):
    """Refused at the hundred-thousand-and-first, whatever is still to come, and nothing stays behind."""
    sent = 0

    def million():
        nonlocal sent
        yield pb.RegisterItemsRequest(header=pb.RegisterHeader(pool_id=world.pool.pool_id))
        for start in range(0, 1_000_000, 10_000):
            entries = pb.Entries(entries=[pb.Entry(digest=(start + i).to_bytes(32, "big")) for i in range(10_000)])
            sent += 10_000
            yield pb.RegisterItemsRequest(entries=entries)

    with pytest.raises(grpc.RpcError) as caught:
        world.stub.RegisterItems(million())
    assert (
        caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "at most 100000 in one" in caught.value.details()
    )
    assert sent < 1_000_000
    still_serves(world)


def test_banks_that_never_end(world):
    def endless():
        yield pb.RegisterItemsRequest(header=pb.RegisterHeader(pool_id=world.pool.pool_id))
        for _ in range(400):
            yield pb.RegisterItemsRequest(blob=pb.Blob(digest=b"d" * 32, data=bytes(1 << 20)))

    with pytest.raises(grpc.RpcError) as caught:
        world.stub.RegisterItems(endless())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "bytes of item banks" in caught.value.details()


def test_a_client_that_stops_reading(daemon, world):
    """Its streams fill what flow control allows and then wait; others are served meanwhile, and memory is bounded."""
    from merge3.recipe import Recipe

    models = world.config.models
    recipe = Recipe.parse(
        {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 0.5}} for m in models]}
    ).to_yaml()
    unread = []
    for _ in range(20):
        channel = grpc.insecure_channel(
            daemon.address, options=(("grpc.use_local_subchannel_pool", 1), ("grpc.http2.lookahead_bytes", 1))
        )
        stub = daemon.stub(channel)
        watch = stub.Watch(pb.WatchRequest(interval_seconds=0.05))
        next(watch)
        export = stub.Export(pb.ExportRequest(pool_id=world.pool.pool_id, recipe=recipe))
        next(export)
        unread.append((channel, watch, export))
    before = world.stub.Status(pb.StatusRequest()).resident_bytes
    for _ in range(30):
        still_serves(world)
        time.sleep(0.05)
    assert world.stub.Status(pb.StatusRequest()).resident_bytes < before * 1.1
    for channel, watch, export in unread:
        watch.cancel(), export.cancel()
        channel.close()
    until = time.monotonic() + 20
    while list(daemon.exports.glob("merge3-export-*")) and time.monotonic() < until:
        time.sleep(0.05)
    assert not list(daemon.exports.glob("merge3-export-*"))


def test_a_stalled_reader_is_left(monkeypatch):
    """The limit that ends it, in this process, where it can be made short."""
    import asyncio

    from merge3_server.interceptors import Around
    from merge3_server.metrics import Metrics
    from merge3_server.security import Tokens
    from merge3_server.streams import lively

    class Reader:
        async def write(self, response):
            await asyncio.sleep(60)

    class Silent:
        def __aiter__(self):
            return self

        async def __anext__(self):
            await asyncio.sleep(60)

    async def body():
        from merge3.errors import Cancelled

        monkeypatch.delenv("MERGE3_TOKEN", raising=False)
        with pytest.raises(Cancelled, match="not read for 0.05 s"):
            await Around(Tokens(None), Metrics(), 0.05)._write(Reader(), "response")
        with pytest.raises(Cancelled, match="nothing for 0.05 s"):
            async for _ in lively(Silent(), 0.05):
                pass

    asyncio.run(body())


def test_a_thousand_idle_connections(daemon, world):
    host, port = daemon.address.split(":")
    idle = []
    try:
        for i in range(1000):
            s = socket.create_connection((host, int(port)), timeout=10)
            if i % 2:
                s.sendall(
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
                )  # a real one that then says nothing
            idle.append(s)
        for _ in range(3):
            still_serves(world)
        fresh = grpc.insecure_channel(daemon.address, options=(("grpc.use_local_subchannel_pool", 1),))
        assert daemon.stub(fresh).Status(pb.StatusRequest(), timeout=20).state == "serving"
    finally:
        for s in idle:
            s.close()
    still_serves(world)


def test_many_calls_at_once_are_queued_or_told_when_to_come_back(tiny_world, start, by_hand):
    registering, some_items = by_hand
    from merge3.search.config_files import load_config
    from merge3.space import Space

    daemon = start(tiny_world, limits={"queue": 20, "driver_queue": 20})
    config, stub = load_config(tiny_world / "evolve.yaml"), daemon.stub()
    pool = stub.OpenPool(pb.OpenPoolRequest(models=config.models))
    space = Space(config.genome.definition(), convert.pool_from(pool, "").layout)
    items_id = stub.RegisterItems(registering(pool.pool_id, some_items(50), config.genome.definition())).items_id
    request = pb.EvaluateRequest(pool_id=pool.pool_id, items_id=items_id, genome=pb.Genome(values=space.initial()))
    calls = [stub.Evaluate.future(request) for _ in range(300)]
    full = [call.exception() for call in calls if call.exception()]
    assert 0 < len(full) <= 280 and {e.code() for e in full} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    trailing = dict(full[0].trailing_metadata())
    assert (
        50 <= int(trailing["retry-after-ms"]) <= 60_000
        and pb.Error.FromString(trailing["merge3-error-bin"]).reason == "busy"
    )
    # RemoteEngine waits and comes back; a stream's requests wait by themselves.
    from merge3.client.remote import RemoteEngine

    engines = [RemoteEngine(daemon.address, config.models) for _ in range(30)]
    found = []
    threads = [
        threading.Thread(target=lambda e=e: found.append(answers(e, config.models[0], some_items(20))), daemon=True)
        for e in engines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 30 and len(list(stub.EvaluateStream(iter([request] * 60)))) == 60


# -- the fuzz


def seeds(world, by_hand):
    """A valid request of every method, as bytes."""
    registering, some_items = by_hand
    from merge3.recipe import Recipe

    models = list(world.config.models)
    recipe = Recipe.parse(
        {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 0.5}} for m in models]}
    ).to_yaml()
    at = dict(pool_id=world.pool.pool_id)
    estimator = pb.Estimator(
        method="gmp-irt", bank=b"0" * 32, subset=[0, 1], weights=pb.Array(shape=[2], values=[0.5, 0.5])
    )
    bank = pb.ItemBank(
        items=["a", "b"], models=["m"], a=pb.Array(shape=[2, 1], values=[1, 2]), b=pb.Array(shape=[2], values=[0, 1])
    )
    blob = estimator.SerializeToString()
    return {
        "OpenPool": [pb.OpenPoolRequest(models=["base", "english"])],
        "ListPools": [pb.ListPoolsRequest()],
        "ClosePool": [pb.ClosePoolRequest(**at)],
        "RegisterItems": [
            *registering(
                world.pool.pool_id, some_items(4), world.config.genome.definition(), estimators={"words": b"0" * 32}
            ),
            pb.RegisterItemsRequest(blob=pb.Blob(digest=convert.digest(estimator), data=blob, last=True)),
            pb.RegisterItemsRequest(
                blob=pb.Blob(digest=convert.digest(bank), data=bank.SerializeToString(), last=True)
            ),
        ],
        "RelativeNorms": [
            pb.RelativeNormsRequest(**at, space=spaces.space_to(world.config.genome.definition())),
        ],
        "Evaluate": [
            world.request(idempotency_key="fuzz"),
            pb.EvaluateRequest(**at, items_id=world.items_id, recipe=recipe),
        ],
        "EvaluateStream": [world.request(index=3)],
        "Fit": fitting(world),
        "Export": [pb.ExportRequest(**at, recipe=recipe, directory="fuzz")],
        "Generate": [pb.GenerateRequest(**at, endpoint=models[0], prompt="english one plus", max_tokens=1)],
        "Status": [pb.StatusRequest()],
    }


def fitting(world):
    """Two short fits, from the start and from a state."""
    base, expert, *_ = world.config.models
    sources = {"base_model": base, "models": [{"model": expert}]}
    asked = dict(pool_id=world.pool.pool_id, items_id=world.items_id, experts={"words": expert})
    whole = pb.FitRequest(**asked, recipe=json.dumps({"merge_method": "expert_kl", **sources, "fit": {"steps": 2}}))
    first = next(step for step in world.stub.Fit(whole) if step.number == 2)
    half = pb.FitRequest(**asked, recipe=whole.recipe, state=first.state)
    half.state.step = 1
    return [whole, half]


def mutated(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        act, at = rng.randrange(6), rng.randrange(len(data) + 1)
        if act == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif act == 1 and data:
            data[at % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif act == 2:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))
        elif act == 3:
            del data[at : at + rng.choice((1, 2, 8, 64))]
        elif act == 4:
            del data[at:]
        else:
            data[at:at] = data[at : at + rng.choice((4, 32))] * rng.choice((1, 3))
    return bytes(data)


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.heavy)])
def test_mutated_requests(daemon, world, by_hand, count):
    """Each gets an answer or a status that is no internal error; then it evaluates as before."""
    before = still_serves(world)
    raw, corpus = lambda b: b, seeds(world, by_hand)
    # A name of its own, so that a mutated ClosePool gives up nothing of the fixture's.
    metadata, codes, unwell = (("merge3-driver", "fuzz"),), {}, []
    channels = [grpc.insecure_channel(daemon.address) for _ in range(2)]

    def callers(channel):
        made = {}
        for name in METHODS:
            kind = (
                ("stream" if name in ("RegisterItems", "EvaluateStream") else "unary")
                + "_"
                + ("stream" if name in STREAMED else "unary")
            )
            make = getattr(channel, kind)
            made[name] = make(f"/merge3.v1.Merge3/{name}", request_serializer=raw, response_deserializer=raw)
        return made

    def fuzz(channel, seed, count):
        rng, calls, pending = random.Random(seed), callers(channel), []
        for number in range(count):
            name = rng.choice(METHODS)
            messages = [m.SerializeToString() for m in corpus[name]]
            if name == "RegisterItems":
                at = rng.randrange(len(messages))
                messages[at] = mutated(messages[at], rng)
                request = iter(messages)
            else:
                data = mutated(rng.choice(messages), rng)
                request = iter([data]) if name == "EvaluateStream" else data
            act = calls[name] if name in STREAMED else calls[name].future
            pending.append((name, act(request, metadata=metadata, timeout=120)))
            if len(pending) >= 64 or number == count - 1:
                for name, call in pending:
                    try:
                        for _ in call if name in STREAMED else ():
                            pass
                        code = "OK" if name in STREAMED or call.exception() is None else call.exception().code().name
                    except grpc.RpcError as error:
                        code, call = error.code().name, error
                    codes[code] = codes.get(code, 0) + 1
                    if code in ("INTERNAL", "UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED"):
                        unwell.append((name, code, call.details()))
                pending = []

    threads = [threading.Thread(target=fuzz, args=(c, i, count // 2), daemon=True) for i, c in enumerate(channels)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(500)
        assert not thread.is_alive()
    assert unwell == []
    assert (
        sum(codes.values()) == count
        and codes.get("OK", 0) > count // 20
        and codes.get("INVALID_ARGUMENT", 0) > count // 20
    ), codes
    assert still_serves(world) == before
    assert not [
        line for i, line in enumerate(daemon.lines) if "internal error" in "".join(daemon.lines[max(0, i - 40) : i + 1])
    ]
