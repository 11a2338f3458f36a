"""Search alone, fit alone, and a search that begins at a fit: what each reaches, and what it asks.

python benchmarks/fit_and_search.py [--seeds 0 1 2] [--save]    about ten minutes a seed on two cores

The demo's models, its search, and a search of a third of its candidates that begins at a fit: around it, where every
tensor keeps its own weight, and at the means of its groups of layers. All are measured on the same held-out items. An
item that goes forward and backward counts as three answers.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean

import yaml
from measure import report, table

from merge3.client.demo import configuration
from merge3.client.run import evolve
from merge3.search.config_files import load_config
from merge3.world.kept import made
from merge3.world.training import make_models

WORLDS = Path("build/worlds").resolve()
FITS = {"supermerge": "fit, labels (supermerge)", "expert_kl": "fit, no labels (expert_kl)"}
BUDGET = 200  # of a search after a fit, beside 600
WAYS = {"around it": {"space": "around"}, "from its means": {"space": "parameters"}}


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
            for way, changes in WAYS.items():
                config = configuration(seed, BUDGET) | {"fit": {"method": method}}
                config["optimizer"]["sigma"] = None  # what is usual after a fit
                config["genome"] |= changes
                result = searched(folder, f"{method}-{len(found)}", config)
                asked = result["ledger"]["fit"]
                found[title] = {"heldout": result["baselines"]["fit"], "answers": asked}
                both = {"heldout": result["heldout"], "answers": result["item_answers"]}
                found[f"{title} + search {way}"] = both
    for name, one in found.items():
        print(f"seed {seed}  {name:<60} {json.dumps(one)}", flush=True)
    return found


def searched(folder: Path, name: str, config: dict) -> dict:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return evolve(load_config(folder / f"{name}.yaml"), folder / name, quiet=True, export=False)


if __name__ == "__main__":
    main()
