"""Does a search on a fiftieth of the answers find a merge as good as a search on all items?

For each seed: train the demo's models, search once with every candidate answering all items (plain CMA-ES), and
twice with a few items per candidate (assisted CMA-ES), final race included; compare on held-out items. `mean` needs no
calibration. `gmp-irt` is calibrated; its ratio is given with the calibration's answers and without, as when a
leaderboard's responses are at hand.

python benchmarks/headline.py [--seeds 0 1 2 3 4] [--folder DIR] [--save]      DIR keeps models and finished searches
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import yaml
from measure import report, table

from merge3.client import run
from merge3.client.demo import configuration
from merge3.search.config_files import load_config
from merge3.search.journal import read_result
from merge3.world.training import make_models

ITEMS, BUDGET = 500, 1000  # search items per task, candidates
SEARCHES = {
    "full": {"extract": {"method": "all"}, "estimate": {"method": "mean"}},
    "mean": {
        "extract": {"method": "random", "size": 9},
        "estimate": {"method": "mean"},
        "optimizer": {"population": 10},
    },
    "gmp-irt": {
        "extract": {"method": "random", "size": 9},
        "estimate": {"method": "gmp-irt", "models": 24, "share": 0.2},
        "optimizer": {"population": 10},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", choices=tuple(SEARCHES), help="run these searches and stop")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    rows, data = [], []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as temporary:
            results = searches(seed, (options.folder or Path(temporary)) / f"seed-{seed}", options.only)
        if options.only:
            continue
        full = results["full"]
        row = {"seed": seed, "baseline": max(full["baselines"].values()), "full": full["heldout"]}
        cells = [seed, f"{row['baseline']:.3f}", f"{row['full']:.3f}"]
        for name in ("mean", "gmp-irt"):
            found, ledger = results[name], results[name]["ledger"]
            given = ledger["full"] / (ledger["total"] - ledger["calibration"])
            row[name] = {
                "heldout": found["heldout"],
                "share": found["heldout"] / row["full"],
                "ledger": ledger,
                "ratio": ledger["full"] / ledger["total"],
                "ratio, calibration given": given,
            }
            ratio = f"1/{row[name]['ratio']:.0f}" + (f" (1/{given:.0f})" if ledger["calibration"] else "")
            cells += [f"{found['heldout']:.3f}", f"**{row[name]['share']:.3f}**", ratio]
        data.append(row)
        rows.append(cells)
    if options.only:
        return
    average = lambda name: f"**{np.mean([row[name]['share'] for row in data]):.3f}**"
    rows.append(["mean", "", "", "", average("mean"), "", "", average("gmp-irt"), ""])
    columns = [
        "seed",
        "best baseline",
        "all items",
        "mean, 9 items per task",
        "of all",
        "answers",
        "gmp-irt, 9 items per task",
        "of all",
        "answers (calibration given)",
    ]
    asked = f"a search on all {4 * ITEMS:,} items and on a fiftieth of its answers"
    title = f"Held-out accuracy of {asked} ({BUDGET} candidates)"
    report("headline", table(title, columns, rows), {"rows": data}, options.save)


def searches(seed: int, folder: Path, only: str | None) -> dict[str, dict]:
    """Results by search; what is finished in the folder is not searched again."""
    if not (folder / "base").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_models(folder, seed, progress=lambda *_: None)
    results = {}
    for name, settings in SEARCHES.items():
        if only not in (None, name):
            continue
        if not (folder / name / "result.json").exists():
            config = configuration(seed, BUDGET) | {"limit": ITEMS} | settings
            config["optimizer"] = configuration(seed, BUDGET)["optimizer"] | settings.get("optimizer", {})
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
            run.evolve(load_config(folder / f"{name}.yaml"), folder / name, quiet=True, export=False)
        results[name] = read_result(folder / name)
        print(
            seed,
            name,
            results[name]["heldout"],
            results[name]["ledger"],
            f"{results[name]['seconds']:.0f} s",
            flush=True,
        )
    return results


if __name__ == "__main__":
    main()
