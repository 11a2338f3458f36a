"""Does a search on a fiftieth of the answers find a merge as good as a search on all items?

For each seed: train the demo's models, search once with every candidate answering all items, once with a few
items per candidate, gmp-irt, calibration, checks and race included, and compare on held-out items.

python benchmarks/headline.py [--seeds 0 1 2 3 4] [--folder DIR] [--save]      DIR keeps models and finished searches
"""

import argparse
import tempfile
from pathlib import Path

import yaml
from measure import report, table

from merge3.client import run, tiny
from merge3.client.demo import configuration
from merge3.search.config import load_config
from merge3.search.store import read_result

ITEMS, BUDGET = 500, 1000  # search items per task, candidates
FEW = {
    "extract": {"method": "irt", "size": 6},
    "estimate": {"method": "gmp-irt", "models": 24, "share": 0.2},
    "race": {"candidates": 8, "share": 0.1},
}
FULL = {"extract": {"method": "all"}, "estimate": {"method": "mean"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", choices=("few", "full"), help="run these searches and stop")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    rows, data = [], []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as temporary:
            row = compare(seed, (options.folder or Path(temporary)) / f"seed-{seed}", options.only)
        if options.only:
            continue
        data.append(row)
        rows.append(
            [seed, f"{row['baseline']:.3f}", f"{row['full']:.3f}", f"{row['few']:.3f}", f"**{row['share']:.3f}**",
             f"{row['full_answers']:,}", f"{row['few_answers']:,}", f"**1/{row['full_answers'] / row['few_answers']:.0f}**",
             f"1/{row['full_answers'] / row['few_answers_calibrated']:.0f}", f"{row['full_seconds'] / row['few_seconds']:.1f}x"]
        )  # fmt: skip
        print(rows[-1], flush=True)
    if options.only:
        return
    columns = ["seed", "best baseline", "full search", "few answers", "of full", "answers, full", "answers, few", "ratio",
               "ratio, calibration given", "faster"]  # fmt: skip
    title = f"Held-out accuracy of a search on all {4 * ITEMS:,} items and on a fiftieth of its answers ({BUDGET} candidates)"
    report("headline", table(title, columns, rows), {"rows": data}, options.save)


def compare(seed: int, folder: Path, only: str | None) -> dict:
    if not (folder / "base").exists():
        folder.mkdir(parents=True, exist_ok=True)
        tiny.make_models(folder, seed, progress=lambda *_: None)
    results = {}
    for name, settings in (("few", FEW), ("full", FULL)):
        if only not in (None, name):
            continue
        if not (folder / name / "result.json").exists():
            config = configuration(seed, BUDGET) | {"limit": ITEMS} | settings
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
            run.evolve(load_config(folder / f"{name}.yaml"), folder / name, quiet=True, export=False)
        results[name] = read_result(folder / name)
        print(seed, name, results[name]["heldout"], results[name]["ledger"], f"{results[name]['seconds']:.0f} s", flush=True)
    if only:
        return {}
    full, few = results["full"], results["few"]
    return {
        "seed": seed, "full": full["heldout"], "few": few["heldout"], "share": few["heldout"] / full["heldout"],
        "baseline": max(full["baselines"].values()), "full_answers": full["ledger"]["total"],
        "few_answers": few["ledger"]["total"], "few_answers_calibrated": few["ledger"]["total"] - few["ledger"]["calibration"],
        "full_seconds": full["seconds"], "few_seconds": few["seconds"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
