"""Does a search for several objectives find on a twentieth of the answers the front that it finds on all of them?

For each seed: NSGA-II over the demo's models with every candidate answering all items, and the same with a few items
per candidate, surrogates and a race; the hypervolumes of both fronts on held-out items are compared, beyond the worst
of the models in each objective. `length`: of an expert that says every question again and a terse one of the same
skill, how short a merge is on the front within a point of the best accuracy. Merges that left the front because
held-out items say that they are dominated, two standard errors of every difference beyond doubt, are counted.

python benchmarks/fronts.py [--seeds 0 1 2 3 4] [--only two] [--models DIR] [--folder DIR] [--save]

DIR keeps models and finished searches. Models are one world's, trained from seed 0; seeds are the searches'.
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
from merge3.world.wordy import make_wordy

ITEMS, BUDGET, POPULATION = 200, 300, 20  # search items per task, candidates, of a generation
CASES = {
    "two": ["translation", "sorting"],
    "three": ["english", "translation", "sorting"],
    "length": ["accuracy", "length"],
}
SEARCHES = {
    "full": {"extract": {"method": "all"}, "estimate": {"method": "mean"}},
    "few": {"extract": {"method": "random", "size": 9}, "estimate": {"method": "mean"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", choices=tuple(CASES), nargs="+", default=list(CASES))
    parser.add_argument("--models", type=Path, help="the demo's, if they are there already")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    rows, data = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for case in options.only:
            for seed in options.seeds:
                found = {name: search(case, name, seed, folder, options.models) for name in SEARCHES}
                row = compared(case, seed, found)
                print(row, flush=True)
                data.append(row)
                rows.append([case, seed, *cells(row)])
            rows.append([case, "mean", *cells(mean([row for row in data if row["case"] == case]))])
    columns = ["objectives", "seed", "hypervolume, all items", "a few", "of all", "answers", "members (left)",
               "shortest within a point"]  # fmt: skip
    title = f"Fronts of NSGA-II on all {ITEMS} items per task and on {SEARCHES['few']['extract']['size']}"
    report("fronts", table(f"{title} ({BUDGET} candidates)", columns, rows), {"rows": data}, options.save)


def search(case: str, name: str, seed: int, folder: Path, models: Path | None) -> dict:
    """A search's result; what is finished in the folder is not searched again."""
    place = folder / f"{case}-{seed}-{name}"
    if not (place / "result.json").exists():
        config = settings(case, seed, folder, models) | SEARCHES[name]
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{case}-{seed}-{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        run.evolve(load_config(file), place, resume=(place / "run.db").exists(), quiet=True, export=False)
    return read_result(place)


def settings(case: str, seed: int, folder: Path, models: Path | None) -> dict:
    """The demo's configuration over these objectives' tasks; of `length`, over the two that are alike but for it."""
    objectives = CASES[case]
    config = configuration(seed, BUDGET) | {"objectives": objectives, "limit": ITEMS}
    config["optimizer"] |= {"name": "nsga2", "population": POPULATION}
    if case == "length":
        place, experts, tasks = made(folder / "wordy", make_wordy), ["terse", "verbose"], ["sums"]
    else:
        place = models or made(folder / "models", make_models)
        experts, tasks = ["english", "italian", "translation", "sorting"], objectives
    config["genome"] |= {"base_model": str(place / "base"), "models": [str(place / expert) for expert in experts]}
    config["tasks"] = [{"items": str(place / f"{task}.jsonl")} for task in tasks]
    return config


def made(place: Path, make) -> Path:
    """A world, made once."""
    if not (place / "base").exists():
        place.mkdir(parents=True, exist_ok=True)
        make(place, 0)
    return place.resolve()


def compared(case: str, seed: int, found: dict[str, dict]) -> dict:
    """One row of the table."""
    full, few = (found[name]["front"] for name in SEARCHES)
    whole, part = full["hypervolume"]["value"], few["hypervolume"]["value"]
    ledger = found["few"]["ledger"]
    row = {"case": case, "seed": seed, "full": whole, "few": part, "share": part / whole if whole else None,
           "interval": [few["hypervolume"][end] for end in ("low", "high")], "ratio": ledger["full"] / ledger["total"],
           "members": len(few["members"]), "left": len(few["left"]), "left, all items": len(full["left"])}  # fmt: skip
    if case == "length":
        row |= shortest(found["few"])
    return row


def shortest(result: dict) -> dict:
    """Of the members within a point of the front's best held-out accuracy the shortest: its length as a share of the
    verbose expert's, and how much accuracy it lacks."""
    members = [one["heldout"] for one in result["front"]["members"]]
    best = max(one["accuracy"][0] for one in members)
    near = [one for one in members if one["accuracy"][0] >= best - 0.01]
    short = min(near, key=lambda one: one["length"][0])
    verbose = result["baselines_detail"]["verbose"]["objectives"]
    return {"tokens": short["length"][0], "of verbose": short["length"][0] / verbose["length"][0],
            "lacks": best - short["accuracy"][0], "best": best, "verbose": verbose["accuracy"][0],
            "terse": result["baselines_detail"]["terse"]["accuracy"]}  # fmt: skip


def mean(rows: list[dict]) -> dict:
    """Of all numbers of the seeds."""
    return {key: np.mean([row[key] for row in rows]) for key in rows[0] if isinstance(rows[0][key], float | int)}


def cells(row: dict) -> list[str]:
    """A row for people."""
    length = f"{row['of verbose']:.2f} of the verbose expert's" if "of verbose" in row else ""
    return [f"{row['full']:.4f}", f"{row['few']:.4f}", f"**{row['share']:.3f}**", f"1/{row['ratio']:.0f}",
            f"{row['members']:.3g} ({row['left']:.3g})", length]  # fmt: skip


if __name__ == "__main__":
    main()
