"""What the benchmarks share: a timer, the copy bandwidth and matrix rate of this machine, a table.

Every figure a benchmark prints is a ratio of two things measured in the same run; machines differ and
are noisy, so medians are taken and the order of measurements is interleaved.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def seconds(act: Callable[[], object], repeats: int = 7, warmup: int = 1) -> list[float]:
    """Times of `act`, after a warm-up."""
    for _ in range(warmup):
        act()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return times


def alternating(acts: dict[str, Callable[[], object]], repeats: int = 7) -> dict[str, list[float]]:
    """Times of several acts in turn (a b c a b c ..), so that a machine that slows down slows all."""
    times: dict[str, list[float]] = {name: [] for name in acts}
    for act in acts.values():
        act()
    for _ in range(repeats):
        for name, act in acts.items():
            start = time.perf_counter()
            act()
            times[name].append(time.perf_counter() - start)
    return times


median = statistics.median


def matrix_rate(size: int = 1024, dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of a large matrix product."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    return 2 * size**3 / median(seconds(lambda: a @ b, 9, 2))


def machine() -> dict:
    """Facts about where this ran."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Markdown."""
    lines = [f"**{title}**", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(c) for c in row) + " |" for row in rows]
    return "\n".join(lines)


def report(name: str, text: str, data: dict, save: bool) -> None:
    """Print a table; with --save keep it and its numbers under benchmarks/results/."""
    facts = machine()
    text = f"{text}\n\n{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}"
    print(text)
    if save:
        folder = Path(__file__).with_name("results")
        (folder / f"{name}.json").write_text(json.dumps({"machine": facts} | data, indent=1) + "\n")
        (folder / f"{name}.md").write_text(text + "\n")
