"""The findings of "What Matters for Model Merging at Scale?" (arXiv 2410.03617), asked of small vision transformers.

python benchmarks/study.py [--seeds 0 1] [--resume] [--save]

A seed takes about five minutes of training, then four to ten, on one core.

Worlds of study_worlds.py: three widths, bases that know little or much, eight experts each. Four methods merge two to
eight experts; lambda is tuned on a share of the items. It writes build/study/seed-0/study.yaml and runs the command on
it; build/study/seed-0/run/report.html has the pictures.
"""

import argparse
import os
import sys
from pathlib import Path

import yaml
from measure import report, table
from study_worlds import QUALITIES, WIDTHS, make_width

from merge3.client.study import study
from merge3.client.study_report import SHARES, TITLES
from merge3.client.study_report import table as of_study
from merge3.world.digits import TASKS
from merge3.world.kept import made

WORLDS, FOLDER = Path("build/worlds").resolve(), Path("build/study").resolve()
SUM = {"weight": 1.0, "density": 0.3}
METHODS = [
    "linear",
    {"merge_method": "task_arithmetic", "parameters": {"weight": 1.0}},
    {"merge_method": "ties", "parameters": SUM | {"normalize": True}},
    {"merge_method": "dare_ties", "parameters": SUM},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of training, of which experts are merged")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        folder = FOLDER / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "study.yaml").write_text(yaml.safe_dump(configuration(seed, folder), sort_keys=False))
        result = study(folder / "study.yaml", folder / "run", options.resume)
        if result is None:
            sys.exit(130)
        results.append(result)
    kept = ("worlds", "means", "findings", "experts", "subsets", "seed", "draws")
    found = [{key: result[key] for key in kept} for result in results]
    report("study", text_of(results), {"found": found}, options.save)


def configuration(seed: int, folder: Path) -> dict:
    """study.yaml, its worlds made."""
    worlds = []
    for width in WIDTHS:
        for quality in QUALITIES:
            print(f"width {width}, {quality} base", file=sys.stderr, flush=True)
            place = os.path.relpath(made(WORLDS, make_width, width=width, quality=quality, seed=seed), folder)
            experts = {task: f"{place}/{task}" for task in TASKS}
            worlds.append({"name": f"width {width}, {quality}", "width": width, "quality": quality,
                           "base": f"{place}/base", "experts": experts, "items": f"{place}/items"})  # fmt: skip
    tune = {"lambda": [0.15, 0.3, 0.5, 0.8, 1.2]}
    settings = {"methods": METHODS, "experts": [2, 4, 6, 8], "subsets": 5, "tune": tune, "seed": seed}
    return settings | {"worlds": worlds}


def text_of(results: list[dict]) -> str:
    """The findings with every seed, then of the first one a table for each kind of task."""
    rows = []
    for of_seeds in zip(*(result["findings"] for result in results)):
        told = [
            f"**{one['verdict']}** {one['value']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})" for one in of_seeds
        ]
        rows.append([of_seeds[0]["finding"], of_seeds[0]["of"], *told])
    seeds = [f"seed {result['seed']}: value, 95 %" for result in results]
    result = results[0]
    title = f"Findings of the paper, {len(result['cells'])} merges a seed"
    parts = [table(title, ["finding", "what is measured", *seeds], rows)]
    counts = [f"{count} experts" for count in result["experts"]]
    for metric, title in TITLES.items():
        rows = [[world, method, *cells] for world, method, cells in of_study(result, metric)]
        parts.append(table(f"{title}: {SHARES[metric]}, seed {result['seed']}", ["world", "method", *counts], rows))
    rows = []
    for world in result["worlds"]:
        experts = list(world["experts"].values())
        numbers = [world["base"]["value"], sum(experts) / len(experts), world["base_share"]["value"]]
        rows.append([world["name"], *(f"{number:.3f}" for number in numbers)])
    columns = ["world", "base, tasks of experts", "experts, own tasks", "base as a share"]
    return "\n\n".join([*parts, table(f"The worlds: accuracy, seed {result['seed']}", columns, rows)])


if __name__ == "__main__":
    main()
