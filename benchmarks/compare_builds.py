"""Swaps of this tree against those of another tree with its own build, in turn, per instruction set.

python benchmarks/compare_builds.py OTHER [--cpu avx2 avx512] [--parameters 16000000] [--rounds 7] [--save]

OTHER: a checkout whose merge3 is built in place. Each build and instruction set is a process of its own, on one thread;
for every case they are asked in turn, several times, since a machine that others use runs fast and slow by the minute;
for the same reason the process's CPU time is taken, not the clock's.
Printed: medians, as a share of a streaming copy's bandwidth, and how many times faster this tree is.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from measure import report, table
from stream import streaming_copy

MODES = {
    "plain sum": ("all", "none", False),
    "elect": ("all", "sum", False),
    "magnitude + elect": ("magnitude", "sum", False),
    "magnitude + elect + normalize": ("magnitude", "sum", True),
    "band + elect": ("band", "sum", False),
    "random + elect": ("random", "sum", False),
    "random + elect + normalize": ("random", "sum", True),
    "ranked + elect": ("ranked", "sum", False),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ROWS = 4096  # of the tensor that is merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--cpu", nargs="+", default=["avx2", "avx512"])
    parser.add_argument("--parameters", type=int, default=16_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    trees = {"other": options.other.resolve(), "this": here}
    children = {(c, name): child(tree, c, options.parameters) for c in options.cpu for name, tree in trees.items()}
    rows, data = [], []
    for dtype in DTYPES:
        for count in (1, 3, 8):
            for name in MODES:
                times: dict = {}
                for _ in range(options.rounds):
                    for key, process in children.items():
                        times.setdefault(key, []).append(ask(process, f"{dtype} {count} {name}"))
                for cpu in options.cpu:
                    old, new = (median(times[cpu, tree], 0) for tree in trees)
                    copy = median(times[cpu, "this"] + times[cpu, "other"], 1)
                    facts = {"dtype": dtype, "experts": count, "mode": name, "cpu": cpu}
                    data.append(facts | {"old": old, "new": new, "copy": copy})
                    share = [f"{(count + 2) / 2 * copy / t:.2f}" for t in (old, new)]
                    row = [*facts.values(), f"{1e3 * old:.1f}", f"{1e3 * new:.1f}", *share, f"**{old / new:.2f}**"]
                    rows.append(row)
                    print(*row, flush=True)
    for process in children.values():
        process.stdin.close()
    columns = [
        "dtype",
        "experts",
        "mode",
        "loops",
        "before, ms",
        "now, ms",
        "before, of copy",
        "now, of copy",
        "faster",
    ]
    size = f"{options.parameters / 1e6:.0f} M parameters"
    title = f"Swap of {size}, one thread, CPU time, two builds in turn; copy: past the caches"
    report("compare_builds", table(title, columns, rows), {"rows": data}, options.save)


def median(times: list[tuple[float, float]], which: int) -> float:
    return sorted(t[which] for t in times)[len(times) // 2]


def child(tree: Path, cpu: str, parameters: int) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(tree), "MERGE3_CPU": cpu, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"import compare_builds; compare_builds.serve({parameters})"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=environment, cwd=Path(__file__).parent, **pipes)


def ask(process: subprocess.Popen, case: str) -> tuple[float, float]:
    """Seconds of a swap, and of a copy just after it."""
    print(case, file=process.stdin, flush=True)
    swap, copy = process.stdout.readline().split()
    return float(swap), float(copy)


def serve(parameters: int) -> None:
    """Answer cases on standard input, until it ends."""
    from merge3 import kernels
    from merge3.kernels import DENSITY, EPSILON, HI, LO, LO_SHARE, WEIGHT, Modes

    copy_, loaded, tables = streaming_copy(), None, []
    for line in sys.stdin:
        dtype, count, name = line.strip().split(" ", 2)
        count, mode = int(count), Modes(*MODES[name])
        if loaded != dtype:
            torch.manual_seed(0)
            base = (torch.randn(ROWS, parameters // ROWS) * 0.02).to(DTYPES[dtype])
            experts = [(base.float() + torch.randn_like(base.float()) * 0.002).to(DTYPES[dtype]) for _ in range(8)]
            out, loaded, tables = torch.empty_like(base), dtype, []
        if mode.sparsify == "ranked" and len(tables) < count:
            table, _ = kernels.rank_tables([base], experts[:1], 1)
            tables = table * 8  # all experts are alike
        c = kernels.coefficients(1, count)
        c[..., WEIGHT], c[..., DENSITY], c[..., EPSILON] = 0.3, 0.5, 0.1
        c[..., LO], c[..., LO_SHARE], c[..., HI] = 0.0013, 0.5, 0.005
        ranks = tables[:count] if mode.sparsify == "ranked" else []
        swap = [out], [base], experts[:count], c, torch.ones(1), mode, None, ranks
        kernels.merge_(*swap)
        print(cpu_seconds(kernels.merge_, *swap), cpu_seconds(copy_, out, base), flush=True)


def cpu_seconds(act, *arguments) -> float:
    start = time.process_time()
    act(*arguments)
    return time.process_time() - start


if __name__ == "__main__":
    main()
