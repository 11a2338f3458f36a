"""A fit on a daemon is the fit in this process, bit for bit, also when the daemon dies in the middle of it."""

import gc
import json
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from merge3.client import remote_fit
from merge3.client.remote import RemoteEngine
from merge3.engine import LocalEngine
from merge3.errors import Busy, Unavailable
from merge3.pool import Pool
from merge3_server.host import Host
from tests.classifiers import make_classifier
from tests.commands import client
from tests.server.calling import refused
from tests.server.fitting import METHODS, TASKS, begun, by_hand, free, learning, local, remote, told


@pytest.fixture(scope="module")
def long(tiny_world):
    """A fit of many turns, and its steps in this process."""
    what = learning(tiny_world, steps=160, check_every=16)  # a fast machine is not through before it is told to stop
    return SimpleNamespace(**vars(what), steps=local(what))


@pytest.mark.parametrize("method", METHODS)
def test_steps_weights_and_states_are_those_of_this_process(daemon, tiny_world, method):
    what = learning(tiny_world, method, steps=25, check_every=10)
    mine = local(what)
    engine = remote(daemon.address, what)
    theirs = list(engine.fit(what.asked, what.fit))
    assert told(mine) == told(theirs)
    assert {s.number for s in mine if s.recipe} <= {s.number for s in theirs if s.recipe} >= {10, 20, 25}
    for step in theirs:
        assert (step.state is None) == (step.recipe is None)
    # From a state of either, the other goes on to the same end.
    half = next(step for step in theirs if step.number == 10)
    assert half.recipe == next(step for step in mine if step.number == 10).recipe
    rest = list(engine.fit(what.asked, what.fit, half.state))
    assert [step.number for step in rest] == list(range(11, 26)) and told(rest)[1:] == told(mine)[1:]
    assert told(rest)[0] == told(mine)[0][10:]
    assert list(engine.fit(what.asked, what.fit, rest[-1].state)) == []
    engine.close()


def test_the_same_fit_twice_begins_at_the_start(tiny_world):
    what = learning(tiny_world, steps=6)
    engine = LocalEngine(Pool.open(what.models[0], what.models[1:]))
    first = list(engine.fit(what.asked, what.fit))
    assert told(first) == told(list(engine.fit(what.asked, what.fit)))
    some = list(engine.fit(what.asked, what.fit, seconds=0))
    assert [step.number for step in some] == [1] and some[0].state.step == 1


def test_others_are_answered_while_a_fit_lasts(daemon, long):
    """Its own driver between two steps, as held-out items are measured, and another one all the while."""
    engine, other = remote(daemon.address, long), remote(daemon.address, long)
    (alone,) = engine.evaluate(long.held, [long.models[1]])
    answers, ended = [], threading.Event()

    def ask():
        while not ended.is_set():
            answers.extend(other.evaluate(long.held, [long.models[1]]))

    asking = threading.Thread(target=ask, daemon=True)
    steps = []
    for step in engine.fit(long.asked, long.fit):
        steps.append(step)
        if step.number == 1:
            asking.start()
        if step.number % 16 == 0:
            (measured,) = engine.evaluate(long.held, [step.recipe])
            assert measured.error is None and measured.recipe_hash == step.recipe.hash()
    ended.set()
    asking.join(60)
    assert told(steps) == told(long.steps)
    assert len(answers) >= 3 and all(np.array_equal(a.responses, alone.responses) for a in answers)


def test_a_driver_that_measures_for_long_is_no_stalled_reader(start, tiny_world):
    what = learning(tiny_world, steps=60, check_every=1)  # a recipe a step: more than flow control lets pass unread
    daemon = start(tiny_world, limits={"stalled": 0.5, "turn": 0.1})
    steps = []
    for step in remote(daemon.address, what).fit(what.asked, what.fit):
        steps.append(step)
        if step.number == 1:
            time.sleep(4)
    assert [step.number for step in steps] == list(range(1, 61))
    assert not [line for line in daemon.lines if "not read for" in line]


def test_a_second_fit_is_refused_and_one_that_is_left_leaves_room(daemon, tiny_world):
    engine, what, request = by_hand(daemon, tiny_world, steps=1000)
    stub, began = daemon.stub(), time.monotonic()
    stream = stub.Fit(request)
    assert next(stream).number == 1
    refused(lambda: stub.Fit(request), "RESOURCE_EXHAUSTED", "fit: one is under way with this pool", reason="occupied")
    with pytest.raises(Busy, match="one is under way with this pool, for .*; expected one at a time"):
        next(remote(daemon.address, what).fit(what.asked, what.fit))
    stream.cancel()
    short = replace(what.fit, recipe=replace(what.fit.recipe, fit={"steps": 3, "batch": 4}))
    expected = told(local(SimpleNamespace(models=what.models, fit=short, asked=what.asked)))
    assert told(free(lambda: list(engine.fit(what.asked, short)))) == expected
    # A driver that leaves by closing its generator, and one whose connection is gone.
    steps = engine.fit(what.asked, what.fit)
    assert next(steps).number == 1
    steps.close()
    channel = grpc.insecure_channel(daemon.address, options=(("grpc.use_local_subchannel_pool", 1),))
    lost = free(lambda: begun(daemon.stub(channel).Fit(request)))
    channel.close()
    assert told(free(lambda: list(engine.fit(what.asked, short)))) == expected
    del lost
    assert time.monotonic() - began < 60
    daemon.wait_for(" steps=3 of=3 ")


def test_what_was_prepared_is_given_up_when_the_fit_ends(tiny_world, start, monkeypatch):
    hosts, prepared, given = [], Host.fit, Host.forget_fit

    def fitting(self, *arguments, **more):
        found = prepared(self, *arguments, **more)
        hosts.append((self, len(self._fits), [engine._learning.last[1] for engine in self._opened.values()]))
        return found

    forgotten = threading.Event()
    monkeypatch.setattr(Host, "fit", fitting)
    monkeypatch.setattr(Host, "forget_fit", lambda *told, **more: (given(*told, **more), forgotten.set()))
    what = learning(tiny_world, steps=12, items=4)
    list(remote(start(tiny_world, limits={"turn": 0.1}).address, what).fit(what.asked, what.fit))
    assert len(hosts) > 2 and all(count == 1 for _, count, _ in hosts)  # turns, of one fit
    assert len({id(fitting) for _, _, (fitting,) in hosts}) == 1  # prepared once
    assert forgotten.wait(10)
    host = hosts[0][0]
    assert not host._fits and [engine._learning.last for engine in host._opened.values()] == [(None, None)]


@pytest.mark.parametrize(
    ("how", "at"),
    [
        pytest.param("sigterm", 25, marks=pytest.mark.heavy),
        ("kill", 25),
        pytest.param("kill", 3, marks=pytest.mark.heavy),  # in the second turn
    ],
)
def test_a_daemon_that_goes_away_in_the_middle(long, tiny_world, start_process, free_port, how, at):
    """Waited for, and the steps are those of a fit that was never interrupted, each told once."""
    options = ("--root", tiny_world, "--listen", f"127.0.0.1:{free_port}", "--threads", "1")
    daemons, codes, notes, steps = [start_process(*options)], [], [], []

    def restart():
        codes.append(daemons[0].stop() if how == "sigterm" else daemons[0].kill())
        daemons.append(start_process(*options))

    restarting = threading.Thread(target=restart, daemon=True)
    engine = RemoteEngine(f"127.0.0.1:{free_port}", long.models, note=notes.append)
    for step in engine.fit(long.asked, long.fit):
        steps.append(step)
        if step.number == at:
            restarting.start()
            if how == "kill" and at == 25:  # what is asked meanwhile comes back by itself, and the fit after it
                restarting.join()
                (measured,) = engine.evaluate(long.held, [long.models[1]])
                assert measured.error is None
    restarting.join(60)
    assert codes == [0 if how == "sigterm" else -9] and len(daemons) == 2 and "is away" in notes[0]
    assert told(steps) == told(long.steps)


def test_sigterm_ends_the_stream_with_unavailable(tiny_world, start):
    daemon = start(tiny_world, grace=20)
    _, _, request = by_hand(daemon, tiny_world, steps=1000)
    stream = daemon.stub().Fit(request)
    found, began = [next(stream)], time.monotonic()
    daemon.ask()
    with pytest.raises(grpc.RpcError) as caught:
        found.extend(stream)
    daemon.wait(30)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and "stopping" in caught.value.details()
    assert found[-1].HasField("state") and found[-1].state.step == found[-1].number  # nothing that was done is lost
    assert time.monotonic() - began < 15


def test_a_stream_of_before_that_the_daemon_takes_for_alive(monkeypatch, daemon, tiny_world):
    """Whose connection broke comes back at once, perhaps before the daemon has missed it."""
    monkeypatch.setattr(remote_fit, "_AGAIN", 0.1)
    engine, what, _ = by_hand(daemon, tiny_world, steps=12, check_every=1)
    _, _, request = by_hand(daemon, tiny_world, steps=1000)
    held = []

    def broken(stream, engine=engine):
        yield next(stream)
        stream.cancel()
        held.append(free(lambda: begun(daemon.stub().Fit(request))))
        threading.Timer(0.5, held[0].cancel).start()
        yield from stream

    real, streams = engine._stub.Fit, []

    def fit(request, metadata):
        streams.append(real(request, metadata=metadata))
        return Broken(streams[-1], broken) if len(streams) == 1 else streams[-1]

    engine._stub.Fit = fit
    steps = list(engine.fit(what.asked, what.fit))
    assert [step.number for step in steps] == list(range(1, 13)) and len(streams) > 2
    assert told(steps) == told(local(what))


def test_a_stream_that_ends_well_before_the_last_step_is_no_finished_fit(daemon, tiny_world):
    engine, what, _ = by_hand(daemon, tiny_world, steps=12, check_every=1)

    def ended(stream):
        for message in stream:
            yield message
            if message.number == 5:
                return

    real = engine._stub.Fit
    engine._stub.Fit = lambda request, metadata: Broken(real(request, metadata=metadata), ended)
    steps = []
    with pytest.raises(Unavailable, match="ended a fit of 12 steps after step 5; expected all of them"):
        free(lambda: [steps.append(step) for step in engine.fit(what.asked, what.fit)])
    assert [step.number for step in steps] == [1, 2, 3, 4, 5]


def test_a_reader_that_fails_leaves_nobody_waiting(daemon, tiny_world):
    """Whatever it is that reading raises."""
    engine, what, _ = by_hand(daemon, tiny_world, steps=12)

    def failing(stream):
        yield next(stream)
        raise ValueError("no message")

    real = engine._stub.Fit
    engine._stub.Fit = lambda request, metadata: Broken(real(request, metadata=metadata), failing)
    raised = []

    def drive():
        try:
            free(lambda: list(engine.fit(what.asked, what.fit)))
        except ValueError as error:
            raised.append(str(error))

    driver = threading.Thread(target=drive, daemon=True)
    driver.start()
    driver.join(30)
    assert raised == ["no message"]


def test_what_is_to_be_forgotten_when_a_daemon_is_killed_is_no_lost_error(tiny_world, start, monkeypatch, caplog):
    entered, left = threading.Event(), threading.Event()

    def forgetting(self, *told, **more):
        entered.set()
        left.wait(20)

    monkeypatch.setattr(Host, "forget_fit", forgetting)
    daemon = start(tiny_world)
    engine, what, _ = by_hand(daemon, tiny_world, steps=2)
    list(engine.fit(what.asked, what.fit))
    assert entered.wait(10)
    killing = threading.Thread(target=daemon.kill, daemon=True)
    killing.start()
    daemon.wait_for("fit not forgotten: daemon: stopped before this was done")
    left.set()
    killing.join(60)
    gc.collect()
    assert not [r for r in caplog.records if "never retrieved" in r.getMessage()]


class Broken:
    """A stream that goes through `through`."""

    def __init__(self, stream, through):
        self._stream, self._through = stream, through

    def __iter__(self):
        return self._through(self._stream)

    def cancel(self):
        return self._stream.cancel()


# -- the command


def test_the_command_with_server_is_the_command_without(daemon, tiny_world, tmp_path):
    what = learning(tiny_world, steps=30, per_task=8, check_every=10)
    data = what.fit.recipe.to_dict()
    data["fit"]["items"] = [str(tiny_world / f"{task}.jsonl") for task in TASKS]
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(data))
    arguments = ["fit", str(tmp_path / "fit.yaml"), "--quiet", "--json"]
    for name, more in (("local", []), ("remote", ["--server", daemon.address])):
        done = client(*arguments, "--run-dir", str(tmp_path / name), *more)
        assert done.returncode == 0, done.stderr
    for file in ("fitted.yaml", "latest.yaml", "history.jsonl", "fit.json", "model/model.safetensors"):
        assert (tmp_path / "local" / file).read_bytes() == (tmp_path / "remote" / file).read_bytes(), file
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("local", "remote")]
    for result in results:
        assert result.pop("seconds") > 0 and result.pop("peak_memory")
    assert results[0] == results[1]
    assert (tmp_path / "remote" / "report.html").exists()


def test_heads_that_are_each_expert_s_own(tiny_world, tmp_path, start):
    """Classifiers of other questions: the pool says so, and every task is learned through its own head."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_world / "base")
    for seed, (name, labels) in enumerate((("base", 2), *zip(TASKS, (3, 4)))):
        make_classifier(labels, seed, len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for task, labels in zip(TASKS, (3, 4)):
        rows = [json.loads(line) for line in (tiny_world / f"{task}.jsonl").read_text().splitlines()[:20]]
        for i, row in enumerate(rows):
            rows[i] = {"id": row["id"], "kind": "classify", "prompt": row["prompt"], "answer": i % labels}
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    what = learning(tmp_path, steps=6)
    what.asked = replace(what.asked, heads=dict(zip(TASKS, what.models[1:])))
    engines = LocalEngine(Pool.open(what.models[0], what.models[1:])), remote(start(tmp_path).address, what)
    assert [engine.info().own_heads for engine in engines] == [True, True]
    assert list(engines[0].info().content_hashes) == list(engines[1].info().content_hashes) == what.models
    found = [list(engine.fit(what.asked, what.fit)) for engine in engines]
    assert [step.loss for step in found[0]] == [step.loss for step in found[1]]
    assert found[0][-1].recipe == found[1][-1].recipe
