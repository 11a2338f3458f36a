"""How many answers does a search need for what a search on all items finds?

For each seed: train the demo's models, and search 1,000 candidates that answer all items, once by plain CMA-ES and once
with the surrogate; the better one of the two on held-out items is the full search. Then searches of a few items per
candidate, assisted by the surrogate, end after shares of its answers, their final race included, each of them anew:
from the uniform merge, with the prior `norms`, and from a fit that takes half of the answers (an item that goes forward
and backward counts as three). Told is what each finds of the full search's held-out accuracy, and the least share of
answers from which on all larger ones reach 95 %.

python benchmarks/headline.py [--seeds 101 102 103 104 105] [--folder DIR] [--save]     DIR keeps models and searches

Nothing was tuned on these seeds; optimizers.py is for that, on others.
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
from merge3.search.fit_first import PASSES
from merge3.search.journal import read_result
from merge3.world.training import make_models

ITEMS, BUDGET, TASKS = 250, 1000, 4  # search items per task, candidates of a full search
SIZE, POPULATION = 9, 20  # of a search on few answers: items per task, candidates in a generation
PARTS = (50, 100, 200, 400)
STEPS, RATE = 26, 0.08  # of a fit, whose batch is what half of the answers pay
WAYS = {"none": "uniform merge", "norms": "uniform merge, norms", "fit": "fit"}
FULL = {"plain": False, "surrogate": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103, 104, 105])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    data = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in options.seeds:
            data.append(searched(seed, (options.folder or Path(temporary)) / f"seed-{seed}"))
            print(cells(data[-1]), flush=True)
    columns = ["begins at", "seed", "best baseline", "full search", *(f"1/{part}" for part in PARTS), "answers to 95 %"]
    rows = []
    for way in WAYS:
        rows += [cells(row)[list(WAYS).index(way)] for row in data]
        means = [np.mean([row[way][str(part)]["share"] for row in data]) for part in PARTS]
        rows.append([WAYS[way], "mean", "", "", *(f"**{mean:.3f}**" for mean in means), ""])
    title = f"Of the held-out accuracy of a full search ({BUDGET * ITEMS * TASKS:,} answers), found with a part of them"
    report("headline", table(title, columns, rows), {"rows": data}, options.save)


def searched(seed: int, folder: Path) -> dict:
    """All searches of a seed."""
    if not (folder / "base").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_models(folder, seed, progress=lambda *_: None)
    every = {"extract": {"method": "all"}, "estimate": {"method": "mean"}}
    full = {}
    for name, surrogate in FULL.items():
        full[name] = search(seed, folder, f"full-{name}", {"budget": BUDGET, "surrogate": surrogate}, every)
    best = max(found["heldout"] for found in full.values())
    row = {"seed": seed, "baseline": max(full["plain"]["baselines"].values()), "full": best}
    row |= {name: found["heldout"] for name, found in full.items()}
    few = {"extract": {"method": "random", "size": SIZE}, "estimate": {"method": "mean"}}
    for way in WAYS:
        row[way] = {}
        for part in PARTS:
            answers, optimizer, settings = BUDGET * ITEMS * TASKS / part, {"population": POPULATION}, few
            if way == "fit":
                batch = int(answers / 2 / (PASSES * STEPS * TASKS))
                answers -= PASSES * STEPS * TASKS * batch
                settings = few | {"fit": {"steps": STEPS, "learning_rate": RATE, "batch": batch}}
                optimizer["sigma"] = None  # what is usual after a fit
            else:
                optimizer["prior"] = way
            # What the race at the end may cost on top is a tenth.
            optimizer["budget"] = int(answers / TASKS / SIZE / 1.1)
            found = search(seed, folder, f"{way}-{part}", optimizer, settings)
            row[way][str(part)] = {
                "heldout": found["heldout"],
                "answers": found["ledger"]["total"],
                "share": found["heldout"] / best,
                "fit": found["baselines"].get("fit"),
            }
    return row


def search(seed: int, folder: Path, name: str, optimizer: dict, settings: dict) -> dict:
    """A search's result; what is finished in the folder is not searched again."""
    place, file = folder / name, folder / f"{name}.yaml"
    if not (place / "result.json").exists():
        config = configuration(seed, BUDGET) | {"limit": ITEMS} | settings
        config["optimizer"] |= optimizer
        file.write_text(yaml.safe_dump(config))
        run.evolve(load_config(file), place, resume=(place / "run.db").exists(), quiet=True, export=False)
    found = read_result(place)
    print(seed, name, f"{found['heldout']:.3f}", found["ledger"], f"{found['seconds']:.0f} s", flush=True)
    return found


def needed(found: dict[str, dict]) -> str:
    """The least share from which on 95 % is reached, and what it took."""
    least = None
    for part in PARTS:
        if found[str(part)]["share"] < 0.95:
            break
        least = part
    return f"{found[str(least)]['answers']:,} (1/{least})" if least else f"more than 1/{PARTS[0]}"


def cells(row: dict) -> list[list[str]]:
    """A row for people, of every way to begin."""
    found = []
    for way, title in WAYS.items():
        shares = [f"{row[way][str(part)]['share']:.3f}" for part in PARTS]
        known = [str(row["seed"]), f"{row['baseline']:.3f}", f"{row['full']:.3f}"]
        found.append([title, *known, *shares, f"**{needed(row[way])}**"])
    return found


if __name__ == "__main__":
    main()
