"""How many CPU threads there are, and how they wait. Imports no torch: it acts before torch is loaded.

libgomp (under torch's operators, MKL and our kernels) and OpenBLAS (under NumPy and SciPy) read their variables
once, when they are loaded; `configure` sets them first. Threads are as many as the process may really use: a
container with two cores of a 64-core host gets two.

A thread that waits at the end of a parallel step spins for milliseconds before it sleeps, unless told otherwise.
On a core of its own that saves a wake-up. On a shared core it takes the time that its partner, waiting for a core,
needs. So threads spin for some tens of microseconds and then sleep: always, because other work may come at any time.

How many threads a step gets follows from its size alone, never from the load: sums in another order round
otherwise, and a resumed search is, bit for bit, the one that was never stopped.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merge3 import cgroups
from merge3.errors import BadInput

MOST = 1024
# Of libgomp, before a thread sleeps. A demo search of 60 candidates on two quiet cores took 35 to 42 s with 1,000,
# 33 to 36 s with 3,000, 33 s with 10,000 or libgomp's own 300,000, 41 s on one thread; beside one busy process per
# core 75 s (processor time 1.2 times that alone) with 3,000, 95 s (1.6 times) with 10,000.
_SPINS = 3000


def threads_option(text: str | None) -> int | None:
    """What --threads does in every command: check the number, and set this process to it."""
    if text is None:
        return None
    count = int(text) if text.isdecimal() and len(text) < 9 else 0
    if not 1 <= count <= MOST:
        raise BadInput("--threads", f"found {text!r}", f"a whole number from 1 to {MOST}")
    configure(count)
    return count


def available(groups: Path = cgroups.GROUPS, mount: Path = cgroups.MOUNT) -> int:
    """Cores that this process may use: by its affinity, and by the CPU quota of every cgroup above it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in cgroups.folders("cpu", groups, mount) for quota in _quota(folder)]
    return max(1, min([cores, *map(math.ceil, quotas)]))


def environment(threads: int) -> dict[str, str]:
    """Variables with which a process starts so many threads, which do not spin."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} | _WAITING | _NUMPY


def configure(threads: int | None = None) -> None:
    """Set this process's variables; to be called before torch and NumPy are imported.

    threads: asked for explicitly, and then more than what variables say. Otherwise variables that are set are kept.
    """
    if threads is not None:
        os.environ |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(available()))  # MKL and OpenBLAS follow it
    if not any(name in os.environ for name in _WAITING):
        os.environ |= _WAITING
    for name, value in _NUMPY.items():
        os.environ.setdefault(name, value)


# KMP_BLOCKTIME: of the OpenMP runtime that torch has on other systems.
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(_SPINS), "KMP_BLOCKTIME": "0"}
_NUMPY = {"OPENBLAS_NUM_THREADS": "1"}


def _quota(group: Path) -> Iterator[float]:
    """Of one cgroup, if it has any: version 2 writes `150000 100000` or `max 100000`; version 1 two files, -1: none."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = (float(n) for name in names for n in (group / name).read_text(encoding="utf-8").split())
        except (OSError, ValueError):  # not there, `max`, or not ours to read
            continue
        if quota > 0 and period > 0:
            yield quota / period


_WORTH = 2_000_000  # elements a step goes over, from which on a second thread saves more than it costs


@contextmanager
def few_threads(work: int) -> Iterator[None]:
    """Run small work on one of torch's threads. work: elements that each step goes over.

    Handing out a part of a few microseconds and waiting for it costs more than computing it. The threads follow from
    the size alone, so results do too.
    """
    import torch

    before = torch.get_num_threads()
    if work >= _WORTH or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
