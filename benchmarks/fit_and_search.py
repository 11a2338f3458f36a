"""Search alone, fit alone, and a search that begins at a fit: what each reaches, and what it asks.

python benchmarks/fit_and_search.py [--seeds 0 1 2] [--save]    about ten minutes a seed on two cores

The demo's models, its search, and the same search with less than half its candidates from where a fit ended. All are
measured on the same held-out items. An item that goes forward and backward counts as three answers.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from statistics import mean

import yaml
from measure import report, table

from merge3.client.demo import configuration
from merge3.client.fit import fit
from merge3.client.run import evolve
from merge3.search.config_files import load_config
from merge3.world.kept import made
from merge3.world.numbers import TASKS
from merge3.world.training import make_models

WORLDS = Path("build/worlds").resolve()
FITS = {"supermerge": "fit, labels (supermerge)", "expert_kl": "fit, no labels (expert_kl)"}
BUDGET = 200  # of a search after a fit, beside 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    found = [compared(seed) for seed in options.seeds]
    whole = mean(of_seed["search alone"]["answers"] for of_seed in found)
    rows = []
    for name in found[0]:
        own = [of_seed[name] for of_seed in found]
        answers = mean(one["answers"] for one in own)
        cells = [f"**{mean(one['heldout'] for one in own):.3f}**", *(f"{one['heldout']:.3f}" for one in own)]
        rows.append([name, *cells, f"{answers:,.0f}", f"{answers / whole:.2f}"])
    seeds = [f"seed {seed}" for seed in options.seeds]
    columns = ["", "held-out accuracy", *seeds, "item answers", "of the search's"]
    report("fit_and_search", table("The demo's experts", columns, rows), {"seeds": options.seeds, "found": found},
           options.save)  # fmt: skip


def compared(seed: int) -> dict[str, dict]:
    """Name -> {heldout, answers}."""
    world = made(WORLDS, make_models, seed=seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for entry in world.iterdir():
            (folder / entry.name).symlink_to(entry)
        result = searched(folder, "search", configuration(seed))
        found = {"search alone": {"heldout": result["heldout"], "answers": result["item_answers"]}}
        found["best baseline"] = {"heldout": result["baselines"][result["best_baseline"]], "answers": 0}
        for method, title in FITS.items():
            result = fitted(folder, method, seed)
            answers = 3 * result["passes"]["forward"] + result["passes"].get("forward of experts", 0)
            found[title] = {"heldout": result["heldout"], "answers": answers}
            config = configuration(seed, BUDGET)
            shutil.copy(folder / method / "fitted.yaml", folder / f"{method}.start.yaml")
            config["genome"]["start"] = f"./{method}.start.yaml"
            result = searched(folder, f"{method}-search", config)
            both = {"heldout": result["heldout"], "answers": answers + result["item_answers"]}
            found[f"{title} + search"] = both
    for name, one in found.items():
        print(f"seed {seed}  {name:<40} {json.dumps(one)}", flush=True)
    return found


def searched(folder: Path, name: str, config: dict) -> dict:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return evolve(load_config(folder / f"{name}.yaml"), folder / name, quiet=True, export=False)


def fitted(folder: Path, method: str, seed: int) -> dict:
    experts = list(TASKS)
    recipe = {"merge_method": method, "base_model": str(folder / "base"), "dtype": "float32"}
    recipe["models"] = [{"model": str(folder / task)} for task in experts]
    recipe["fit"] = {"items": [str(folder / f"{task}.jsonl") for task in experts], "seed": seed, "check_every": 0}
    (folder / f"{method}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return fit(folder / f"{method}.yaml", folder / method, quiet=True, export=False)


if __name__ == "__main__":
    main()
