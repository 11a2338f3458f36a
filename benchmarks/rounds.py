"""Does a search in rounds find a better merge than one search with as many candidates? On the demo's models.

python benchmarks/rounds.py [--seeds 0 1 2] [--budget 180] [--methods task_arithmetic] [--folder DIR] [--save]

The demo's base and four experts, trained from seed 0; seeds are the searches'. For each method the demo's configuration
in one round, two, three, each of which has its share of the budget. Held-out accuracy of what each ends with.
`answers`: item answers spent, those of the elites' contenders and of the races included, of the search with one round.
`won`: which rounds the winners are of.
DIR keeps models and finished searches.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import mean

import yaml
from measure import report, table

from merge3.client import run
from merge3.client.demo import configuration
from merge3.search.config_files import load_config
from merge3.search.journal import read_result
from merge3.world.kept import made
from merge3.world.training import make_models

ITEMS, SIZE, POPULATION, ROUNDS = 400, 40, 15, (1, 2, 3)  # items per task, of them asked of a candidate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=180)
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    rows, data = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for seed in options.seeds:
            for method in options.methods:
                for rounds in ROUNDS:
                    found = searched(folder, method, rounds, seed, options.budget)
                    data[f"{method}, {rounds}, {seed}"] = found
                    print(f"seed {seed}, {method}, {rounds} rounds: {found}", flush=True)
    for method in options.methods:
        found = {rounds: [data[f"{method}, {rounds}, {seed}"] for seed in options.seeds] for rounds in ROUNDS}
        for rounds, own in found.items():
            accuracies = [100 * one["heldout"] for one in own]
            spent = mean(one["answers"] / other["answers"] for one, other in zip(own, found[1]))
            won = ", ".join(str(one["won"]) for one in own) if rounds > 1 else ""
            rows.append([method, rounds, *cells(accuracies), f"{spent:.2f}", won])
        best = [100 * max(one["baselines"].values()) for one in found[1]]
        rows.append(["best baseline", "", *cells(best), "", ""])
    seeds = [f"seed {seed}" for seed in options.seeds]
    title = f"Held-out accuracy, %, of searches in rounds: {options.budget} candidates in all"
    text = table(title, ["", "rounds", "mean", *seeds, "answers", "won"], rows)
    report("rounds", text, {"budget": options.budget, "seeds": options.seeds, "found": data}, options.save)


def cells(values: list[float]) -> list[str]:
    """The mean, and each."""
    return [f"**{mean(values):.1f}**", *(f"{value:.1f}" for value in values)]


def searched(folder: Path, method: str, rounds: int, seed: int, budget: int) -> dict:
    """One search to its end; what is finished in the folder is not searched again."""
    place = folder / f"{method}-{rounds}-{seed}-{budget}"
    if not (place / "result.json").exists():
        world = made(folder / "worlds", make_models, seed=0, items=ITEMS)
        file = folder / f"{place.name}.yaml"
        file.write_text(yaml.safe_dump(settings(world, method, rounds, seed, budget)))
        run.evolve(load_config(file), place, resume=(place / "run.db").exists(), quiet=True, export=False)
    result = read_result(place)
    won = next((one["round"] for one in result.get("rounds", ()) if one["won"]), 1)
    baselines = {name: value for name, value in result["baselines"].items() if not name.startswith("round ")}
    return {"heldout": result["heldout"], "answers": result["item_answers"], "won": won, "baselines": baselines}


def settings(world: Path, method: str, rounds: int, seed: int, budget: int) -> dict:
    """The demo's configuration over a world that lies elsewhere."""
    data, place = configuration(seed, budget), lambda name: str(world / name.removeprefix("./"))
    genome = data["genome"]
    genome |= {"models": [place(m) for m in genome["models"]], "base_model": place(genome["base_model"])}
    data["genome"] = genome | {"merge_method": method}
    data["tasks"] = [{"items": place(task["items"])} for task in data["tasks"]]
    data["extract"] = {"method": "random", "size": SIZE}
    data["optimizer"] |= {"population": POPULATION} | ({"rounds": rounds} if rounds > 1 else {})
    return data


if __name__ == "__main__":
    main()
