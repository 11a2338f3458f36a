"""Who runs a job: the host in this process, or hosts that are Ray actors, one per GPU.

Restarting dead actors and repeating their calls is Ray's business (max_restarts, max_task_retries): an
evaluation changes nothing but its own slot, so repeating one is safe.
"""

from __future__ import annotations

import asyncio
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from merge3.errors import ConfigError, Merge3Error, Unavailable
from merge3.registration import Registration
from merge3_server.host import Host, Registered
from merge3_server.scheduler import Job

RETRIES = 3


class Worker(Protocol):
    """One slot. `run` is called for one job at a time."""

    name: str
    device: str
    pid: int

    async def run(self, job: Job) -> Any:
        """The result of the job's Host method, or what it raises."""

    def cancel(self, job: Job) -> None:
        """Stop a job between two batches."""

    def close(self) -> None:
        """Give up what the worker holds."""


class LocalWorker:
    """A thread of this process."""

    def __init__(self, device: str, threads: int | None = None):
        self.name, self.device, self.pid = "local", device, os.getpid()
        if threads:
            torch.set_num_threads(threads)
        self._host = Host()
        self._thread = ThreadPoolExecutor(1, "host")

    async def run(self, job: Job) -> Any:
        """See Worker."""
        call = getattr(self._host, job.call)
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: call(*job.arguments, stop=job.stop.is_set, emit=job.emit)
        )

    def cancel(self, job: Job) -> None:
        """See Worker. Nothing to do: the host asks job.stop itself."""

    def close(self) -> None:
        """See Worker."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def make_workers(choice: str, device: str, threads: int | None = None) -> list[Worker]:
    """`local`, `ray` (one worker per GPU, or one in all on the CPU) or `ray:N`."""
    if choice == "local":
        return [LocalWorker(device, threads)]
    match = re.fullmatch(r"ray(?::([1-9]\d*))?", choice)
    if match is None:
        raise ConfigError("--workers", f"found {choice!r}", "local, ray or ray:N")
    return _ray_workers(int(match[1]) if match[1] else None, device, threads)


@dataclass(frozen=True)
class Remembered:
    """What stands for a Registered whose registration lies in Ray's object store."""

    items_id: str
    pool_id: str
    reference: Any

    def load(self) -> Registration:
        """The registration, fetched from the object store."""
        import ray

        return ray.get(self.reference[0])


class _Actor:
    """A host in a process of its own. Runs with two threads, so that `cancel` gets in while `call` works."""

    def __init__(self, threads: int | None):
        if threads:
            torch.set_num_threads(threads)
        self._host, self._cancelled = Host(), -1

    def pid(self) -> int:
        return os.getpid()

    def cancel(self, number: int) -> None:
        self._cancelled = max(self._cancelled, number)

    def call(self, number: int, name: str, arguments: list) -> tuple[Any, list, int]:
        """(result, what was emitted, process). Errors travel as values: Ray repeats calls whose process died, not
        ours."""
        emitted: list = []
        try:
            result = getattr(self._host, name)(*arguments, stop=lambda: self._cancelled >= number, emit=emitted.append)
        except Merge3Error as error:
            result = error
        return result, emitted, os.getpid()


class RayWorker:
    """An actor, restarted by Ray when its process dies."""

    def __init__(self, name: str, device: str, actor, remembered: dict[str, Remembered]):
        self.name, self.device, self.pid = name, device, 0
        self._actor, self._remembered = actor, remembered

    async def start(self) -> None:
        """Wait for the actor, and learn its process's id."""
        self.pid = await self._actor.pid.remote()

    async def run(self, job: Job) -> Any:
        """See Worker. Raises Unavailable where the actor's process died at it again and again."""
        import ray

        arguments = [self._reference(a) if isinstance(a, Registered) else a for a in job.arguments]
        try:
            result, emitted, self.pid = await self._actor.call.remote(job.number, job.call, arguments)
        except (ray.exceptions.RayActorError, ray.exceptions.ActorUnavailableError) as error:
            raise Unavailable(
                f"worker {self.name}", f"died {RETRIES + 1} times at this ({type(error).__name__})"
            ) from None
        for what in emitted:
            job.emit and job.emit(what)
        if isinstance(result, Merge3Error):
            raise result
        return result

    def cancel(self, job: Job) -> None:
        """See Worker."""
        self._actor.cancel.remote(job.number)

    def close(self) -> None:
        """Shut Ray down, the other workers' actors with it."""
        import ray

        if ray.is_initialized():
            ray.shutdown()

    def _reference(self, registered: Registered) -> Remembered:
        import ray

        if registered.items_id not in self._remembered:
            # In a list: Ray would fetch a bare reference at every call, wanted or not.
            stored = [ray.put(registered.registration)]
            self._remembered[registered.items_id] = Remembered(registered.items_id, registered.pool_id, stored)
            while len(self._remembered) > 256:
                del self._remembered[next(iter(self._remembered))]
        return self._remembered[registered.items_id]


def _ray_workers(count: int | None, device: str, threads: int | None) -> list[Worker]:
    try:
        import ray
    except ImportError:
        raise Unavailable("--workers ray", "Ray is not installed", hint="pip install 'merge3-gpu[ray]'") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cluster = os.environ.get("RAY_ADDRESS")
    options = {} if cluster else {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    ray.init(logging_level="WARNING", log_to_driver=False, **options)
    gpus = int(ray.cluster_resources().get("GPU", 0)) if device.startswith("cuda") else 0
    if device.startswith("cuda") and gpus < (count or 1):
        raise Unavailable("--workers", f"{gpus} GPUs in the Ray cluster", f"{count or 1}")
    count = count or max(1, gpus)
    cores = int(ray.cluster_resources().get("CPU", 1))
    threads = threads or (None if gpus else max(1, cores // count))
    resources = {"num_gpus": 1} if gpus else {"num_cpus": min(1, cores / count)}
    kind = ray.remote(max_restarts=-1, max_task_retries=RETRIES, max_concurrency=2, **resources)(_Actor)
    remembered: dict[str, Remembered] = {}
    return [RayWorker(f"ray-{i}", device, kind.remote(threads), remembered) for i in range(count)]
