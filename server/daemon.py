"""Start, serve, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
from collections.abc import Callable

import grpc
from grpc_health.v1 import health as health_service
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from merge3.errors import Unavailable
from merge3.rpc import merge3_pb2 as pb
from merge3.rpc import merge3_pb2_grpc
from merge3_server.interceptors import Around
from merge3_server.metrics import Metrics
from merge3_server.pools import OPERATOR
from merge3_server.scheduler import Scheduler
from merge3_server.security import Tokens, credentials
from merge3_server.service import Service
from merge3_server.settings import Settings, read_pool_file
from merge3_server.workers import RayWorker, Worker, make_workers

log = logging.getLogger("merge3.daemon")
SERVICE = pb.DESCRIPTOR.services_by_name["Merge3"].full_name
OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second daemon on the same port is an error, not a coin toss
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.keepalive_time_ms", 60_000),  # a peer that is gone is noticed, and what it waits for is stopped
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


def on_signals(stop: Callable[[], None]) -> None:
    """SIGTERM and SIGINT call `stop`. For a daemon that has its process to itself, in its main thread."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


async def serve(
    settings: Settings,
    ready: Callable[[list[str]], None] = lambda addresses: None,
    watch: Callable[[Callable[[], None]], None] = on_signals,
) -> None:
    """Run until asked to stop. ready(addresses): called when calls are accepted, ports filled in.

    watch(stop): told once how to ask. stop(), in this loop, lets calls under way finish; a second stop() does not.
    """
    _raise_file_limit()
    tokens, secrets, metrics = Tokens(settings.tokens), credentials(settings), Metrics()
    workers = make_workers(settings.workers, settings.device, settings.threads)
    try:
        await _serve(settings, workers, tokens, secrets, metrics, ready, watch)
    finally:
        for worker in workers:
            worker.close()


async def _serve(
    settings: Settings, workers: list[Worker], tokens: Tokens, secrets, metrics: Metrics, ready, watch
) -> None:
    for worker in workers:
        if isinstance(worker, RayWorker):
            await worker.start()
    scheduler = Scheduler(workers, settings.limits)
    scheduler.start()
    service, health = Service(settings, scheduler, metrics), health_service.aio.HealthServicer()
    server = grpc.aio.server(interceptors=[Around(tokens, metrics, settings.limits.stalled)], options=OPTIONS)
    merge3_pb2_grpc.add_Merge3Servicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection(
        (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME), server
    )
    addresses = [_listen(server, address, secrets) for address in settings.listen]
    for name in ("", SERVICE):
        await health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)  # until the operator's pools are open
    await server.start()
    try:
        if settings.metrics:
            port = metrics.serve(settings.metrics)
            log.info("metrics", extra={"address": f"{settings.metrics.rpartition(':')[0]}:{port}"})
        asked, now = asyncio.Event(), asyncio.Event()
        watch(lambda: (now if asked.is_set() else asked).set())
        for file in settings.pools:
            entry = await service.pools.open(OPERATOR, *read_pool_file(file))
            spec = entry.spec
            fields = {"pool_id": spec.pool_id, "models": len(spec.models), "resident_bytes": entry.resident}
            log.info("pool", extra=fields)
        for name in ("", SERVICE):
            await health.set(name, health_pb2.HealthCheckResponse.SERVING)
        ready(addresses)
        await asked.wait()
        log.info("stopping", extra={"queued": scheduler.queued, "grace": settings.grace})
        await health.enter_graceful_shutdown()
        await _stop(server, scheduler, settings.grace, now)
    finally:
        await server.stop(None)  # where something above was refused, it still listens
    log.info("stopped")


async def _stop(server: grpc.aio.Server, scheduler: Scheduler, grace: float, now: asyncio.Event) -> None:
    """Refuse new work, finish what was accepted within the grace time (or until the second signal), end the rest."""
    drained = asyncio.create_task(scheduler.drain())
    impatient = asyncio.create_task(now.wait())
    # Candidates in the queue have half of the grace; then streams and stragglers are ended with a status.
    await asyncio.wait({drained, impatient}, timeout=grace / 2, return_when=asyncio.FIRST_COMPLETED)
    if not drained.done():
        scheduler.abandon()
    await server.stop(0.0 if now.is_set() else min(2.0, grace / 4))
    for task in (drained, impatient):
        task.cancel()


def _listen(server: grpc.aio.Server, address: str, secrets: grpc.ServerCredentials | None) -> str:
    """The address, with the port that was taken."""
    if address.startswith("unix:/"):
        file = address.removeprefix("unix:")
        if os.path.exists(file) and not _answers(file):
            os.unlink(file)  # left by a daemon that was killed
    try:
        port = server.add_secure_port(address, secrets) if secrets else server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if port == 0:
        raise Unavailable(f"--listen {address}", "cannot listen there", "a free address of this machine")
    if address.startswith("unix:/"):
        os.chmod(address.removeprefix("unix:"), 0o600)  # its user's alone; the operator may widen it
    return address if address.startswith("unix") else f"{address.rpartition(':')[0]}:{port}"


def _answers(file: str) -> bool:
    import socket

    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        try:
            client.connect(file)
        except OSError:
            return False
    return True


def _raise_file_limit() -> None:
    """Idle connections cost a descriptor each; the soft limit is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 65536)) if hard > 0 else max(soft, 65536), hard))
