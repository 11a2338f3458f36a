"""Who is next: one queue per driver, taken in turn; bounded; a job whose caller left is dropped or stopped.

A slot is written by one candidate at a time, so each worker runs one job at a time.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from merge3.errors import Busy, Unavailable
from merge3_server.settings import Limits

if TYPE_CHECKING:
    from merge3_server.workers import Worker


@dataclass(eq=False)
class Job:
    """A call of a Host method. stop: set when whoever asked has left."""

    number: int
    driver: str
    call: str
    arguments: tuple
    emit: Callable[[Any], None] | None
    future: asyncio.Future
    stop: threading.Event = field(default_factory=threading.Event)
    queued_at: float = field(default_factory=time.monotonic)


@dataclass
class DriverState:
    """What a driver has waiting, and what it had done."""

    jobs: deque[Job] = field(default_factory=deque)
    evaluated: int = 0
    last_seen: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Done:
    """A job's result, the seconds that it waited, and where it ran."""

    result: Any
    queue_seconds: float
    worker: str


class Scheduler:
    """Owns the workers."""

    def __init__(self, workers: Sequence[Worker], limits: Limits):
        self.workers, self.limits = list(workers), limits
        self.drivers: OrderedDict[str, DriverState] = OrderedDict()
        self.busy: dict[str, Job] = {}
        self.queued, self.evaluated = 0, 0
        self.ending = asyncio.Event()
        self.ended: deque[float] = deque()  # times of the last minute's candidates
        self._pinned: dict[str, deque[Job]] = {worker.name: deque() for worker in workers}
        self._numbers, self._changed = itertools.count(), asyncio.Condition()
        self._seconds = 0.1  # of a job, smoothed
        self._loops: list[asyncio.Task] = []

    def start(self) -> None:
        """Let every worker take jobs."""
        self._loops = [asyncio.create_task(self._serve(worker), name=worker.name) for worker in self.workers]

    async def run(self, driver: str, call: str, *arguments: Any, emit: Callable[[Any], None] | None = None) -> Done:
        """Wait for a turn, run, return. Raises Busy where the queue is full, or what the host raised.

        Cancelling the caller drops the job if it waits, and stops it between two batches if it runs.
        """
        self.refuse_if_stopping()
        state = self.drivers.setdefault(driver, DriverState())
        state.last_seen = time.monotonic()
        for found, limit, whose in (
            (self.queued, self.limits.queue, "the daemon's"),
            (len(state.jobs), self.limits.driver_queue, "this driver's"),
        ):
            if found >= limit:
                wait = max(0.05, self._seconds * found / len(self.workers) / 2)
                raise Busy(
                    f"{whose} queue", f"{found} requests wait", f"fewer than {limit}", retry_after=min(wait, 60.0)
                )
        job = self._job(driver, call, arguments, emit)
        self.queued += 1
        state.jobs.append(job)
        return await self._finish(job)

    async def broadcast(
        self, driver: str, call: str, *arguments: Any, emit: Callable[[Any], None] | None = None
    ) -> list[Done]:
        """Run on every worker, before anything that waits."""
        jobs = []
        for worker in self.workers:
            jobs.append(self._job(driver, call, arguments, emit))
            self._pinned[worker.name].append(jobs[-1])
        return await asyncio.gather(*(self._finish(job) for job in jobs))

    @property
    def stopping(self) -> bool:
        """Whether no more jobs are accepted."""
        return self.ending.is_set()

    def refuse_if_stopping(self) -> None:
        """Raises Unavailable when the daemon is stopping."""
        if self.stopping:
            raise Unavailable("daemon", "stopping", "another try when it is back")

    def rate(self) -> float:
        """Candidates of the last minute."""
        while self.ended and self.ended[0] < time.monotonic() - 60:
            self.ended.popleft()
        return float(len(self.ended))

    async def drain(self) -> None:
        """Until nothing waits or runs. New jobs are refused from now on."""
        self.ending.set()
        async with self._changed:
            await self._changed.wait_for(lambda: not self.queued and not self.busy and not any(self._pinned.values()))

    def abandon(self) -> None:
        """Stop what runs between two batches; what waits is answered as unavailable."""
        self.ending.set()
        for job in [
            *self.busy.values(),
            *(j for s in self.drivers.values() for j in s.jobs),
            *itertools.chain(*self._pinned.values()),
        ]:
            job.stop.set()
            if not job.future.done():
                job.future.set_exception(
                    Unavailable("daemon", "stopped before this was done", "another try when it is back")
                )
        for worker in self.workers:
            if worker.name in self.busy:
                worker.cancel(self.busy[worker.name])

    def _job(self, driver: str, call: str, arguments: tuple, emit) -> Job:
        return Job(next(self._numbers), driver, call, arguments, emit, asyncio.get_running_loop().create_future())

    async def _finish(self, job: Job) -> Done:
        async with self._changed:
            self._changed.notify_all()
        try:
            return await job.future
        except asyncio.CancelledError:
            job.stop.set()
            self._forget(job)
            for worker in self.workers:
                if self.busy.get(worker.name) is job:
                    worker.cancel(job)
            raise

    def _forget(self, job: Job) -> None:
        """Take a job that still waits out of its queue."""
        state = self.drivers.get(job.driver)
        if state is not None and job in state.jobs:
            state.jobs.remove(job)
            self.queued -= 1
        for pinned in self._pinned.values():
            if job in pinned:
                pinned.remove(job)

    def _take(self, worker: str) -> Job | None:
        if self._pinned[worker]:
            return self._pinned[worker].popleft()
        for driver, state in self.drivers.items():
            if state.jobs:
                self.drivers.move_to_end(driver)  # the others first, next time
                self.queued -= 1
                return state.jobs.popleft()
        return None

    async def _serve(self, worker: Worker) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._pinned[worker.name] or self.queued)
                job = self._take(worker.name)
                if job is None:
                    continue
                self.busy[worker.name] = job
            await self._run(worker, job)
            async with self._changed:
                del self.busy[worker.name]
                self._changed.notify_all()
            self._tidy()

    async def _run(self, worker: Worker, job: Job) -> None:
        if job.future.done():  # cancelled at the very moment it was taken
            return
        began = time.monotonic()
        try:
            result = await worker.run(job)
        except Exception as error:
            if not job.future.done():
                job.future.set_exception(error)
            return
        ended = time.monotonic()
        if job.call == "evaluate":
            self._seconds = 0.9 * self._seconds + 0.1 * (ended - began)
            self.evaluated += 1
            self.ended.append(ended)
            self.rate()
            if job.driver in self.drivers:
                self.drivers[job.driver].evaluated += 1
                self.drivers[job.driver].last_seen = ended
        if not job.future.done():
            job.future.set_result(Done(result, began - job.queued_at, worker.name))

    def _tidy(self) -> None:
        """Forget drivers that have had nothing to do for long: there may be any number of names."""
        if len(self.drivers) > 1000:
            old = time.monotonic() - 60
            for name in [n for n, s in self.drivers.items() if not s.jobs and s.last_seen < old]:
                del self.drivers[name]
