"""What a daemon costs and what it stands: a candidate through loopback gRPC against one embedded; 64 drivers at once;
two Ray workers against one.

    python benchmarks/daemon.py                 # about five minutes
    python benchmarks/daemon.py --only overhead --models DIR --save

--models: a folder as the demo makes it (base, experts, JSONL items); without it one is trained quickly, once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import grpc
import numpy as np
from measure import median, report, table

from merge3.client.remote import RemoteEngine
from merge3.engine import LocalEngine
from merge3.pool import Pool
from merge3.registration import Registration
from merge3.rpc import merge3_pb2 as pb
from merge3.rpc import merge3_pb2_grpc
from merge3.space import Space, SpaceDefinition
from merge3.tasks import read_items
from merge3.world.kept import made
from merge3.world.numbers import TASKS
from merge3.world.training import make_models

EXPERTS = tuple(TASKS)
WORLDS = Path(__file__).resolve().parents[1] / "build" / "worlds"


class Daemon:
    """A merge3-server process for the length of a `with`."""

    def __init__(self, root: Path, *options: str):
        command = [
            sys.executable,
            "-m",
            "merge3_server",
            "serve",
            "--root",
            str(root),
            "--listen",
            "127.0.0.1:0",
            *options,
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.address = self.process.stdout.readline().split(" on ")[1].strip()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *exc) -> None:
        self.process.terminate()
        self.process.wait(60)


def models(root: Path) -> list[str]:
    return [str(root / name) for name in ("base", *EXPERTS)]


def definition(root: Path) -> SpaceDefinition:
    base, *experts = models(root)
    return SpaceDefinition(tuple(experts), "task_arithmetic", base)


def genomes(space: Space, count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.clip(space.initial() + rng.normal(size=space.size) * 0.05, *space.bounds()) for _ in range(count)]


def overhead(root: Path, repeats: int = 200) -> tuple[list, dict]:
    """The same candidates embedded and remote in turn, for a few numbers of items, alone and as generations of 20."""
    rows, data = [], {}
    items = [item for task in EXPERTS for item in read_items(root / f"{task}.jsonl")[:150]]
    with Daemon(root) as daemon:
        local = LocalEngine(Pool.open(*[models(root)[0], models(root)[1:]]))
        remote = RemoteEngine(daemon.address, models(root))
        space = Space(definition(root), local.info().layout)
        for per_task, at_once in ((5, 1), (30, 1), (150, 1), (5, 20)):
            asked = [item for i, item in enumerate(items) if i % 150 < per_task]
            times: dict[str, list[float]] = {"embedded": [], "remote": []}
            question = Registration(tuple(asked), space.definition)
            for engine in (local, remote):
                list(engine.evaluate(question, genomes(space, 3, seed=1)))
            candidates = genomes(space, repeats)
            for start in range(0, repeats, at_once):
                for name, engine in (("embedded", local), ("remote", remote)):
                    began = time.perf_counter()
                    list(engine.evaluate(question, candidates[start : start + at_once]))
                    times[name].append((time.perf_counter() - began) / at_once)
            embedded, through = median(times["embedded"]), median(times["remote"])
            rows.append(
                [
                    len(asked),
                    at_once,
                    f"{1000 * embedded:.1f}",
                    f"{1000 * through:.1f}",
                    f"{1000 * (through - embedded):+.1f}",
                    f"{100 * (through / embedded - 1):+.1f} %",
                ]
            )
            data[f"{len(asked)} items, {at_once} at once"] = {"embedded_s": embedded, "remote_s": through}
        remote.close()
    return rows, data


def load(root: Path, drivers: int = 64, calls: int = 10_000) -> tuple[list, dict]:
    """Unary calls from many drivers, each with its own key; every answer checked against the first to its genome."""
    items = [item for task in EXPERTS for item in read_items(root / f"{task}.jsonl")[:2]]
    with Daemon(root) as daemon:
        engine = RemoteEngine(daemon.address, models(root))
        space = Space(definition(root), engine.info().layout)
        asked, items_id = genomes(space, 50), engine._register(Registration(tuple(items), space.definition))
        stub = merge3_pb2_grpc.Merge3Stub(grpc.insecure_channel(daemon.address))
        before = stub.Status(pb.StatusRequest())
        answers: Counter[str] = Counter()
        wrong, queued, memory, lock = [], [], [], threading.Lock()
        expected: dict[int, tuple] = {}
        done = threading.Event()

        def drive(driver: int, keys: list[int]) -> None:
            channel = grpc.insecure_channel(daemon.address, options=(("grpc.use_local_subchannel_pool", 1),))
            own, metadata = merge3_pb2_grpc.Merge3Stub(channel), (("merge3-driver", f"driver-{driver}"),)
            for key in keys:
                request = pb.EvaluateRequest(
                    pool_id=engine._pool_id, items_id=items_id, idempotency_key=f"load-{key}", index=key
                )
                request.genome.values.extend(asked[key % len(asked)])
                found = own.Evaluate(request, metadata=metadata)
                with lock:
                    answers[f"{found.index}"] += 1
                    queued.append(found.queue_seconds)
                    if expected.setdefault(key % len(asked), tuple(found.responses)) != tuple(found.responses):
                        wrong.append(key)

        def sample() -> None:
            while not done.wait(0.5):
                memory.append((sum(answers.values()), stub.Status(pb.StatusRequest()).resident_bytes))

        threads = [threading.Thread(target=drive, args=(d, list(range(d, calls, drivers)))) for d in range(drivers)]
        sampler = threading.Thread(target=sample)
        began = time.perf_counter()
        for thread in (*threads, sampler):
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - began
        done.set()
        sampler.join()
        after = stub.Status(pb.StatusRequest())
        engine.close()
    warm = next(size for count, size in memory if count >= calls // 10)
    data = {
        "drivers": drivers,
        "calls": calls,
        "answered": sum(answers.values()),
        "lost": calls - len(answers),
        "twice": sum(n > 1 for n in answers.values()),
        "evaluated": after.evaluated - before.evaluated,
        "wrong": len(wrong),
        "seconds": seconds,
        "p50_queue_s": float(np.percentile(queued, 50)),
        "p99_queue_s": float(np.percentile(queued, 99)),
        "memory_warm": warm,
        "memory_end": after.resident_bytes,
        "memory_growth": after.resident_bytes / warm - 1,
    }
    rows = [
        [
            drivers,
            calls,
            data["lost"],
            data["twice"],
            data["evaluated"],
            data["wrong"],
            f"{calls / seconds:.0f}",
            f"{1000 * data['p50_queue_s']:.0f}",
            f"{1000 * data['p99_queue_s']:.0f}",
            f"{100 * data['memory_growth']:+.1f} %",
        ]
    ]
    return rows, data


def workers(root: Path, count: int = 60, repeats: int = 3) -> tuple[list, dict]:
    """Candidates per minute of one and of two one-thread Ray workers, in turn."""
    items = [item for task in EXPERTS for item in read_items(root / f"{task}.jsonl")[:150]]
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for number in (1, 2):
            with Daemon(root, "--workers", f"ray:{number}", "--threads", "1") as daemon:
                engine = RemoteEngine(daemon.address, models(root))
                space = Space(definition(root), engine.info().layout)
                question = Registration(tuple(items), space.definition)
                list(engine.evaluate(question, genomes(space, 6, seed=1)))  # both have seen the items
                began = time.perf_counter()
                assert len(list(engine.evaluate(question, genomes(space, count)))) == count
                rates[number].append(60 * count / (time.perf_counter() - began))
                engine.close()
    one, two = median(rates[1]), median(rates[2])
    return [[f"{one:.0f}", f"{two:.0f}", f"**{two / one:.2f}x**"]], {"per_minute": rates, "ratio": two / one}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--only", choices=("overhead", "load", "workers"), action="append")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    parts = {
        "overhead": (
            "A candidate, median of 200",
            ("items", "at once", "embedded ms", "through the daemon ms", "more", ""),
            overhead,
        ),
        "load": (
            "Many drivers at once, 8 items per candidate",
            (
                "drivers",
                "calls",
                "lost",
                "answered twice",
                "evaluated",
                "wrong",
                "calls per s",
                "queue p50 ms",
                "queue p99 ms",
                "memory after warm-up",
            ),
            load,
        ),
        "workers": ("Ray workers of one thread, candidates per minute", ("one", "two", ""), workers),
    }
    root = (arguments.models or made(WORLDS, make_models, seed=0, base_steps=60, expert_steps=10)).resolve()
    texts, data = [], {}
    for name in arguments.only or parts:
        title, columns, measure = parts[name]
        rows, data[name] = measure(root)
        texts.append(table(title, columns, rows))
        print(texts[-1], flush=True)
    report("daemon", "\n\n".join(texts), data, arguments.save and not arguments.only)


if __name__ == "__main__":
    main()
