"""What do compacted experts take, and what do they cost a swap?

python benchmarks/residual.py [--save]    a base and three experts of 100 million parameters in bfloat16, some minutes

Bytes as planned, and as a process of its own takes them; time of swaps in turn, with one process's pools side by side;
the relative error of the experts, whose changes are random here: those of a fine-tune are less even, and lose less.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from measure import alternating, median, report, table

from merge3 import Pool, Recipe, Slot
from merge3.world.family import make_family

OPTIONS = ("full", "residual:0.05", "residual:0.1", "residual:0.2", "int8")
METHODS = {"task_arithmetic": {}, "ties": {"density": 0.5}, "dare_ties": {"density": 0.5}}
SHAPE = {"layers": 10, "hidden_size": 768, "intermediate_size": 2560, "vocab_size": 14_000}
MIB = 2**20
CHILD = """
import sys, torch
from transformers import LlamaForCausalLM  # before the count begins
from residual import recipe_of
from merge3 import Pool, Slot

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

before, (option, *models) = status("VmRSS"), sys.argv[1:]
pool = Pool.open(models[0], models[1:], experts_as=option)
pool.read_all()
slot = Slot(pool)
for seed in range(2):
    slot.swap(recipe_of("ties", models), seed)
print(status("VmRSS") - before, status("VmHWM") - before)
"""


def recipe_of(method: str, models: list[str]) -> Recipe:
    """Over all experts alike."""
    sources = [{"model": model, "parameters": {"weight": 0.4} | METHODS[method]} for model in models[1:]]
    return Recipe.parse({"merge_method": method, "base_model": models[0], "models": sources})


def taken(option: str, models: list[str]) -> tuple[int, int]:
    """(bytes that a process of its own takes for pool and live model in the end, and at most)"""
    # Tensors of larger models are beyond what glibc's heap would keep when they are freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    folder = Path(__file__).parent
    command = [sys.executable, "-c", CHILD, option, *models]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=folder)
    now, most = done.stdout.split()[-2:]
    return int(now), int(most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--options", nargs="+", default=list(OPTIONS))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_family(Path(folder), **SHAPE, dtype=torch.bfloat16)
        models = [str(Path(folder) / name) for name in ("base", "e0", "e1", "e2")]
        processes = {option: taken(option, models) for option in options.options}
        slots = {option: Slot(Pool.open(models[0], models[1:], experts_as=option)) for option in options.options}
        times = {}
        for method in METHODS:
            recipe = recipe_of(method, models)
            swaps = {option: partial(slot.swap, recipe) for option, slot in slots.items()}
            times[method] = alternating(swaps, options.repeats)
        rows, data = [], {}
        for option, slot in slots.items():
            plan, losses = slot.pool.memory, slot.pool.compacted.losses
            ratios = [median(times[m][option]) / median(times[m]["full"]) for m in METHODS] if "full" in slots else []
            now, most = processes[option]
            error = max((loss.error for loss in losses), default=0.0)
            data[option] = {"plan": plan.total, "experts": plan.compact, "now": now, "most": most, "error": error}
            data[option] |= {"ratios": dict(zip(METHODS, ratios))}
            cells = [plan.total, now, most]
            rows.append(
                [option, *(f"{size / MIB:.0f}" for size in cells), f"{error:.3f}", *(f"{r:.2f}" for r in ratios)]
            )
    columns = ["experts", "planned, MiB", "taken, MiB", "at most, MiB", "relative error", *METHODS]
    title = "A base and three experts of 100 M parameters: memory with a live model, and time of a swap (full: 1)"
    report(
        "residual",
        table(title, columns, rows),
        {"found": data, "recipes": json.loads(json.dumps(METHODS))},
        options.save,
    )


if __name__ == "__main__":
    main()
