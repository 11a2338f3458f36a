"""Turns: fair between drivers, bounded, dropped when the caller leaves; one answer per key."""

import asyncio
import time

import pytest

from merge3.errors import BadInput, Busy, Unavailable
from merge3_server.answers import Answers
from merge3_server.catalog import Bounded
from merge3_server.scheduler import Scheduler
from merge3_server.settings import Limits


class Scripted:
    """A worker that does as its jobs say: (name, seconds) are slept; an exception is raised."""

    device, pid = "cpu", 0

    def __init__(self, name="w"):
        self.name, self.done, self.cancelled = name, [], []

    async def run(self, job):
        what, seconds = job.arguments
        until = time.monotonic() + seconds
        while time.monotonic() < until and not job.stop.is_set():
            await asyncio.sleep(0.001)
        if isinstance(what, Exception):
            raise what
        self.done.append(what)
        return what

    def cancel(self, job):
        self.cancelled.append(job.arguments[0])


def run(body, workers=1, **limits):
    async def whole():
        made = [Scripted(f"w{i}") for i in range(workers)]
        scheduler = Scheduler(made, Limits(**limits))
        scheduler.start()
        await asyncio.wait_for(body(scheduler, *made), 20)

    asyncio.run(whole())


def test_drivers_take_turns_however_much_each_asks():
    async def body(s, worker):
        first = asyncio.create_task(s.run("a", "evaluate", "a-first", 0.02))
        await asyncio.sleep(0.005)
        many = [asyncio.create_task(s.run("a", "evaluate", f"a{i}", 0.001)) for i in range(20)]
        await asyncio.sleep(0)
        few = [asyncio.create_task(s.run("b", "evaluate", f"b{i}", 0.001)) for i in range(3)]
        await asyncio.gather(first, *many, *few)
        assert [n for n in worker.done if n.startswith("a")] == ["a-first", *(f"a{i}" for i in range(20))]
        assert worker.done.index("b2") <= 7  # a b a b a b
        assert s.evaluated == 24 and s.drivers["b"].evaluated == 3 and s.queued == 0

    run(body)


def test_full_queues_say_when_to_come_back():
    async def body(s, worker):
        tasks = [asyncio.create_task(s.run("a", "evaluate", 0, 0.1))]
        await asyncio.sleep(0.005)  # it runs; three more wait
        tasks += [asyncio.create_task(s.run("a", "evaluate", i, 0.01)) for i in (1, 2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="this driver's queue: 3 requests wait; expected fewer than 3") as caught:
            await s.run("a", "evaluate", 9, 0)
        assert 0.05 <= caught.value.retry_after <= 60
        tasks += [asyncio.create_task(s.run(d, "evaluate", d, 0.001)) for d in "bc"]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="the daemon's queue"):
            await s.run("d", "evaluate", 9, 0)
        await asyncio.gather(*tasks)
        assert (await s.run("d", "evaluate", 9, 0)).result == 9

    run(body, queue=5, driver_queue=3)


def test_who_leaves_is_dropped_or_stopped():
    async def body(s, worker):
        running = asyncio.create_task(s.run("a", "evaluate", "running", 10))
        waiting = [asyncio.create_task(s.run("a", "evaluate", f"waiting{i}", 0)) for i in range(3)]
        await asyncio.sleep(0.01)
        waiting[1].cancel()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert (await waiting[0]).result == "waiting0" and (await waiting[2]).result == "waiting2"
        assert "waiting1" not in worker.done and worker.cancelled == ["running"] and s.queued == 0

    run(body)


def test_errors_reach_their_caller_alone_and_every_worker_works():
    async def body(s, *workers):
        found = await asyncio.gather(
            *(s.run("a", "evaluate", ValueError("mine") if i == 3 else i, 0.01) for i in range(10)),
            return_exceptions=True,
        )
        assert isinstance(found[3], ValueError) and [f.result for f in found if not isinstance(f, Exception)] == [
            0,
            1,
            2,
            4,
            5,
            6,
            7,
            8,
            9,
        ]
        assert all(w.done for w in workers)
        for done in await s.broadcast("a", "open", "all", 0):
            assert done.result == "all"
        assert all(w.done[-1] == "all" for w in workers)

    run(body, workers=2)


def test_draining_finishes_and_abandoning_answers():
    async def body(s, worker):
        tasks = [asyncio.create_task(s.run("a", "evaluate", i, 0.005)) for i in range(5)]
        await asyncio.sleep(0.002)
        draining = asyncio.create_task(s.drain())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="stopping"):
            await s.run("a", "evaluate", 9, 0)
        await draining
        assert [t.result().result for t in tasks] == [0, 1, 2, 3, 4]
        s.ending.clear()
        tasks = [asyncio.create_task(s.run("a", "evaluate", i, 10)) for i in range(3)]
        await asyncio.sleep(0.01)
        s.abandon()
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(answer, Unavailable)

    run(body)


def test_answers_are_made_once_and_forgotten_in_time():
    async def body():
        answers, made = Answers(0.05, 3), []

        async def make(value=1, error=None):
            await asyncio.sleep(0.005)
            made.append(value)
            if error:
                raise error
            return value

        assert await asyncio.gather(*(answers.once("k", b"r", make) for _ in range(10))) == [1] * 10 and made == [1]
        assert await answers.once("k", b"r", make) == 1 and made == [1]
        with pytest.raises(BadInput, match="another request"):
            await answers.once("k", b"s", make)
        await answers.once("", b"r", make), await answers.once("", b"r", make)
        assert len(made) == 3  # no key, no promise
        for _ in range(2):
            with pytest.raises(Busy):
                await answers.once("bad", b"r", lambda: make(error=Busy("x")))
        assert len(made) == 5
        await asyncio.sleep(0.06)
        await answers.once("k", b"s", make)  # forgotten: another request may have it
        assert len(made) == 6
        # The first caller leaves, the second still gets it; when all have left, the work stops.
        one, two = (asyncio.create_task(answers.once("shared", b"r", make)) for _ in range(2))
        await asyncio.sleep(0)
        one.cancel()
        assert await two == 1 and len(made) == 7
        left = asyncio.create_task(answers.once("left", b"r", make))
        await asyncio.sleep(0.001)
        left.cancel()
        await asyncio.sleep(0.02)
        assert len(made) == 7
        for i in range(20):
            await answers.once(f"many{i}", b"r", make)
        assert len(answers._entries) <= 4

    asyncio.run(body())


def test_bounded_keeps_what_was_used_last():
    kept = Bounded(10)
    for i in range(5):
        kept.put(i, i, 2)
    assert kept.get(0) == 0
    kept.put(5, 5, 4)
    assert [k for k in range(6) if kept.get(k) is not None] == [0, 3, 4, 5] and kept.size == 10
    kept.put(5, 5, 4)
    assert kept.size == 10
    kept.put("large", 1, 100)  # alone, rather than nothing
    assert len(kept) == 1
