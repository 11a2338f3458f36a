"""Surgery on several merges, beside a linear probe: what adapters of a task add, and what labels would.

python benchmarks/surgery.py [--seeds 0 1 2] [--save]    about four minutes a seed on two cores

The eight image tasks of benchmarks/learned.py. Adapters of rank 4 (width 64) are fitted to unlabelled images; the probe
is a logistic regression on the merge's last representation, fitted to the same images' labels.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import mean

import numpy as np
from learned import WORLDS, recipe_of
from measure import report, table
from sklearn.linear_model import LogisticRegression

from merge3 import Pool, Recipe
from merge3.client.fit import fit
from merge3.client.fit_items import load_items
from merge3.learn.distributions import of_labels
from merge3.learn.features import features
from merge3.learn.settings import read_surgery
from merge3.live.slot import Slot
from merge3.tasks.requests import Image
from merge3.tasks.score import reader_of
from merge3.world.digits import TASKS, make_digits
from merge3.world.kept import made

HOSTS = {
    "average": ("task_arithmetic", {"weight": 1 / len(TASKS)}),
    "task arithmetic 0.3": ("task_arithmetic", {"weight": 0.3}),
    "TIES": ("ties", {"weight": 0.5, "density": 0.2, "normalize": False}),
    "supermerge": ("supermerge", {}),
}
RANK, PER_TASK = 4, 175


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    found = [{name: measured(seed, name) for name in HOSTS} for seed in options.seeds]
    rows = []
    for name in HOSTS:
        own = [of_seed[name] for of_seed in found]
        alone, operated, probe = (100 * mean(one[key] for one in own) for key in ("alone", "surgery", "probe"))
        gains = [100 * (one["surgery"] - one["alone"]) for one in own]
        each = ", ".join(f"{gain:+.1f}" for gain in gains)
        rows.append([name, f"{alone:.1f}", f"**{operated:.1f}**", each, f"{probe:.1f}"])
    seeds = ", ".join(map(str, options.seeds))
    columns = ["merge", "alone", f"surgery, rank {RANK}", f"gain at seeds {seeds}", "linear probe"]
    title = "Held-out accuracy over eight image tasks, % (75 items a task)"
    report("surgery", table(title, columns, rows), {"seeds": options.seeds, "found": found}, options.save)


def measured(seed: int, name: str) -> dict[str, float]:
    world = made(WORLDS, make_digits, seed=seed)
    method, parameters = HOSTS[name]
    own = {"items": [str(world / f"{task}.jsonl") for task in TASKS]}
    fitting = own | {"check_every": 0} if method == "supermerge" else None
    recipe = recipe_of(world, method, fit=fitting, **parameters)
    data = recipe.to_dict() | {"surgery": own | {"rank": RANK, "per_task": PER_TASK}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(Recipe.parse(data).to_yaml())
        result = fit(file, Path(folder) / "run", quiet=True, export=False)
        fitted = Recipe.from_yaml(Path(folder) / "run" / "fitted.yaml")
    alone = next(value for key, value in result["baselines"].items() if key.endswith(" alone"))
    found = {"alone": alone, "surgery": result["heldout"], "probe": probed(world, fitted, data["surgery"])}
    print(f"seed {seed}  {name:<22} {found}", flush=True)
    return found


def probed(world: Path, recipe: Recipe, settings: dict) -> float:
    """Accuracy of a linear probe of each task on the merge's representation."""
    taught = load_items(recipe, read_surgery(settings, "surgery"), "surgery")
    experts = [str(world / task) for task in TASKS]
    slot = Slot(Pool.open(str(world / "base"), experts))
    slot.swap(recipe)
    reader = reader_of(taught.learned, slot.model, world / "base")

    def states(items):
        asked = [of_labels(item, Image(reader.pixels(item))) for item in items]
        return np.stack([state[0].numpy() for state in features(slot.model, asked, "the merge")])

    right = []
    for task in TASKS:
        learned = [item for item in taught.learned if item.task == task]
        heldout = [item for item in taught.heldout if item.task == task]
        probe = LogisticRegression(max_iter=2000).fit(states(learned), [item.answer for item in learned])
        right.append(probe.score(states(heldout), [item.answer for item in heldout]))
    return mean(right)


if __name__ == "__main__":
    main()
