"""Does a path through two experts' layers do what no merge of their weights does? Seed by seed, on models made for it.

python benchmarks/paths.py [--seeds 0 1 2] [--budget 200] [--hops 6] [--save]    about five minutes a seed on one core

One expert reads Italian numbers, the other counts on in English; the questions ask for the number after next, from
Italian, which takes the first once and the second twice (merge3/world/stacked.py). Each has two layers, a path at most
`--hops`. Held-out accuracy of what each search ends with; `to best` is how many candidates it took to the best on the
search's items.
"""

import argparse
import tempfile
from contextlib import closing
from pathlib import Path
from statistics import mean

import numpy as np
import yaml
from measure import report, table

from merge3.client import run
from merge3.hops import read_hops, shown
from merge3.recipe import Recipe
from merge3.search.config_files import load_config
from merge3.search.journal import Journal
from merge3.world.kept import made
from merge3.world.stacked import make_stacked

WORLDS = Path("build/worlds").resolve()
EXPERTS = ("reader", "counter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--hops", type=int, default=6)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    found = [measured(seed, options.budget, options.hops) for seed in options.seeds]
    rows = []
    for name in found[0]:
        own = [100 * of_seed[name]["accuracy"] for of_seed in found]
        spent = [of_seed[name].get("to_best") for of_seed in found]
        cells = ["" if spent[0] is None else f"{mean(spent):.0f}"]
        rows.append([name, f"**{mean(own):.1f}**", *(f"{value:.1f}" for value in own), *cells])
    seeds = [f"seed {seed}" for seed in options.seeds]
    title = f"Held-out accuracy, %: {options.budget} candidates a search, paths of at most {options.hops} layers"
    text = table(title, ["", "mean", *seeds, "to best"], rows)
    for seed, of_seed in zip(options.seeds, found):
        for name, one in of_seed.items():
            if one.get("path"):
                print(f"seed {seed}, {name}: {one['path']}")
    report("paths", text, vars(options) | {"found": found}, options.save)


def measured(seed: int, budget: int, hops: int) -> dict[str, dict]:
    """Name -> held-out accuracy, candidates to the best and the path, of endpoints, merges by hand and searches."""
    world = made(WORLDS, make_stacked, seed=seed)
    experts = [str(world / name) for name in EXPERTS]
    merge = {"base_model": str(world / "base"), "models": experts, "merge_method": "task_arithmetic"}
    merge |= {"layer_granularity": 1, "bounds": {"weight": [-0.5, 2.0]}}
    path = {"models": experts, "space": "path", "repetitions": 2, "max_hops": hops}
    stages = ["parameters", {"space": "path", "optimizer": {"name": "catcma"}}]
    both = {"genome": merge | {"repetitions": 2, "max_hops": hops}, "stages": stages}
    searches = {
        "merge: cma over weights, layer by layer": ({"genome": merge}, "cma", budget),
        "path: catcma": ({"genome": path}, "catcma", budget),
        "path: cma over thresholded numbers": ({"genome": path}, "cma", budget),
        "path: random": ({"genome": path}, "random", budget),
        "path, scales fixed at 1: catcma": ({"genome": path | {"genes": ["slot"]}}, "catcma", budget),
        "merge, then path: half of the candidates each": (both, "cma", budget // 2),
        "merge, then path: as many each as a search": (both, "cma", budget),
    }
    found: dict[str, dict] = {}
    for name, (settings, optimizer, candidates) in searches.items():
        with tempfile.TemporaryDirectory() as folder:
            told = searched(Path(folder), settings, world, optimizer, candidates, seed)
        if not found:
            baselines = told["result"]["baselines"]
            found |= {other: {"accuracy": baselines[other]} for other in ("base", *EXPERTS)}
            by_hand = {other: value for other, value in baselines.items() if other not in found}
            best = max(by_hand, key=by_hand.get)
            found["best merge by hand"] = {"accuracy": by_hand[best], "name": best}
        found[name] = {key: told[key] for key in ("accuracy", "to_best", "path")}
    return found


def searched(folder: Path, settings: dict, world: Path, optimizer: str, budget: int, seed: int) -> dict:
    """One search to its end."""
    data = settings | {
        "tasks": [{"items": str(world / "count.jsonl")}],
        "extract": {"method": "all"},
        "estimate": {"method": "mean"},
        "optimizer": {"name": optimizer, "budget": budget, "seed": seed},
    }
    (folder / "evolve.yaml").write_text(yaml.safe_dump(data))
    result = run.evolve(load_config(folder / "evolve.yaml"), folder / "run", quiet=True, export=False)
    with closing(Journal(folder / "run")) as journal:
        values = np.array([candidate.value for candidate in journal.candidates()])
    hops = read_hops(Recipe.from_yaml(folder / "run" / "best.yaml"))
    names = {str(world / name): name for name in EXPERTS} | {str((folder / "run" / "parameters").resolve()): "merge"}
    to_best = int(np.nanargmax(values)) + 1
    told = {"accuracy": result["heldout"], "to_best": to_best, "result": result}
    return told | {"path": shown(hops, names) if hops else ""}


if __name__ == "__main__":
    main()
