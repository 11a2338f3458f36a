"""What Prometheus sees."""

from __future__ import annotations

import os
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from merge3.errors import ConfigError, Unavailable

_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60)


class Metrics:
    """Counters of one daemon, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        of = {"registry": self.registry}
        self._calls = Counter("merge3_calls_total", "Calls by method and status", ["method", "code"], **of)
        self._call_seconds = Histogram("merge3_call_seconds", "Length of calls", ["method"], buckets=_SECONDS, **of)
        self._candidates = Counter("merge3_candidates_total", "Candidates evaluated", ["outcome"], **of)
        self._answers = Counter("merge3_item_answers_total", "Items answered", **of)
        self._candidate_seconds = Histogram(
            "merge3_candidate_seconds", "Merging, asking and estimating one", buckets=_SECONDS, **of
        )
        self._swap_seconds = Histogram("merge3_swap_seconds", "Merging one", buckets=_SECONDS, **of)
        self._queue_seconds = Histogram("merge3_queue_seconds", "Waiting for a turn", buckets=_SECONDS, **of)

    def watch(self, queued: Callable[[], float], pools: Callable[[], float]) -> None:
        """Gauges read when they are asked for."""
        Gauge("merge3_queued", "Requests waiting", registry=self.registry).set_function(queued)
        Gauge("merge3_pools", "Pools open", registry=self.registry).set_function(pools)
        Gauge("merge3_resident_bytes", "Memory of the daemon's process", registry=self.registry).set_function(
            resident_bytes
        )

    def call(self, method: str, code: str, seconds: float) -> None:
        """Count a call that ended. code: its gRPC status name."""
        self._calls.labels(method, code).inc()
        self._call_seconds.labels(method).observe(seconds)

    def candidate(self, seconds: float, swap_seconds: float, queue_seconds: float, answers: int, failed: bool) -> None:
        """Count a candidate that was evaluated. answers: how many items it was asked."""
        self._candidates.labels("failed" if failed else "answered").inc()
        self._answers.inc(answers)
        self._candidate_seconds.observe(seconds)
        self._swap_seconds.observe(swap_seconds)
        self._queue_seconds.observe(queue_seconds)

    def serve(self, address: str) -> int:
        """Answer HTTP at `host:port`, in a thread; the port taken. Port 0: a free one."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError("--metrics", f"found {address!r}", "host:port")
        try:
            server, _ = start_http_server(int(port), host.strip("[]"), self.registry)
        except OSError as error:
            raise Unavailable(f"--metrics {address}", error.strerror or str(error), "a free port") from None
        return server.server_port


def resident_bytes() -> int:
    """Resident memory of this process, 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="utf-8") as handle:
            return int(handle.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
