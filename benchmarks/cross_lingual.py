"""Skills of one language beside the words of another: what each of the demo's experts can do, and the evolved merge.

python benchmarks/cross_lingual.py --runs runs/demo-0 .. [--save]    --runs: finished demos
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from measure import report, table

# What a task needs: its language, and its skill.
TASKS = {
    "english": "English: sums",
    "sorting": "English: sorting",
    "italian": "Italian: products",
    "translation": "English to Italian: numbers",
}
MODELS = {
    "base": "base",
    "english": "skill expert (English sums)",
    "sorting": "skill expert (sorting)",
    "italian": "language expert (Italian)",
    "translation": "language expert (translation)",
    "uniform_linear": "mean of all",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    results = [json.loads((run / "run" / "result.json").read_text()) for run in options.runs]
    found = {name: average([r["baselines_detail"][key]["tasks"] for r in results]) for key, name in MODELS.items()}
    found["**evolved**"] = average([result["heldout_detail"]["tasks"] for result in results])
    rows = []
    for name, tasks in found.items():
        cells = [f"{tasks[task]:.2f}" for task in TASKS]
        rows.append([name, *cells, f"{mean(tasks[task] for task in TASKS):.2f}"])
    seeds = ", ".join(str(result["seed"]) for result in results)
    items = results[0]["heldout_items"]
    title = f"Held-out accuracy by what a task needs ({items:,} items; demo, seed {seeds})"
    report("cross_lingual", table(title, ["model", *TASKS.values(), "mean"], rows), {"tasks": found}, options.save)


def average(runs: list[dict[str, float]]) -> dict[str, float]:
    """Task -> mean over runs."""
    return {task: mean(run[task] for run in runs) for task in TASKS}


if __name__ == "__main__":
    main()
