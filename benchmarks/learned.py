"""Learned merges beside hand-picked ones, on eight image tasks: the claims of their papers, seed by seed.

python benchmarks/learned.py [--seeds 0 1 2] [--save]    about eight minutes a seed on two cores, worlds included

Every expert answers with its own head. Lambda of task arithmetic and TIES is tuned on the items that are learned from;
what is compared is accuracy on items that nothing was learned from. TIES trims the whole model, as its authors do.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
from measure import report, table

from merge3 import LocalEngine, Pool, Recipe, Registration, read_items
from merge3.client.fit import fit
from merge3.learn.survivors import write_survivors
from merge3.search.seeds import seed_of
from merge3.tasks import Item, split_heldout
from merge3.world.digits import TASKS, make_digits
from merge3.world.kept import made

WORLDS = Path("build/worlds").resolve()
LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5)
FITS = {
    "adamerging, one weight a task": ("adamerging", {"level": "task", "per_task": 175}),
    "adamerging, one weight a tensor": ("adamerging", {"per_task": 175}),
    "adamerging++, one weight a task": ("adamerging++", {"level": "task", "per_task": 175}),
    "adamerging++, one weight a tensor": ("adamerging++", {"per_task": 175}),
    "supermerge, 32 labels a task": ("supermerge", {}),
    "supermerge, in pairs": ("supermerge", {"groups": {"size": 2}}),
    "supermerge, without tanh": ("supermerge", {"bound": "none"}),
    "expert_kl, 32 inputs a task": ("expert_kl", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="of the fits, those whose names begin so")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    found = [measured(seed, options.only) for seed in options.seeds]
    rows = []
    for name in found[0]:
        own = [100 * of_seed[name] for of_seed in found]
        spread = f"{np.std(own, ddof=1):.1f}" if len(own) > 1 else ""
        rows.append([name, f"**{mean(own):.1f}**", spread, *(f"{value:.1f}" for value in own)])
    seeds = [f"seed {seed}" for seed in options.seeds]
    title = "Held-out accuracy over eight image tasks, % (75 items a task)"
    report("learned", table(title, ["merge", "mean", "sd", *seeds], rows), {"seeds": options.seeds, "accuracy": found},
           options.save)  # fmt: skip


class Digits(NamedTuple):
    """A world of eight image tasks, open. learned, heldout: items that merges may be tuned on, and the others."""

    world: Path
    experts: list[str]
    engine: LocalEngine
    learned: list[Item]
    heldout: list[Item]

    def asks(self, items: list[Item], experts: list[str] | None = None) -> Registration:
        """Every task before the head of its own expert."""
        return Registration(tuple(items), heads=dict(zip(TASKS, experts or self.experts)))

    def alone(self) -> float:
        """Mean held-out accuracy of the experts, each on its own task."""
        found = []
        for task, expert in zip(TASKS, self.experts):
            own = Registration(tuple(item for item in self.heldout if item.task == task), heads={task: expert})
            found.append(next(self.engine.evaluate(own, [expert])).value)
        return mean(found)


def opened(seed: int) -> Digits:
    """The world of a seed, made where it is not there."""
    world = made(WORLDS, make_digits, seed=seed)
    items = [item for task in TASKS for item in read_items(world / f"{task}.jsonl")]
    experts = [str(world / task) for task in TASKS]
    engine = LocalEngine(Pool.open(str(world / "base"), experts))
    return Digits(world, experts, engine, *split_heldout(items, 0.3, seed_of("held-out", 0)))


def measured(seed: int, only: list[str] | None) -> dict[str, float]:
    """Name of a merge -> held-out accuracy."""
    digits = opened(seed)
    world, experts, engine, learned, heldout = digits
    tuning, held = digits.asks(learned), digits.asks(heldout)
    accuracy = lambda engine, asked, recipe: next(engine.evaluate(asked, [recipe])).value
    found = {"base": accuracy(engine, held, str(world / "base")), "each expert on its task": digits.alone()}
    found["average"] = accuracy(engine, held, recipe_of(world, "task_arithmetic", weight=1 / len(TASKS)))

    def tuned(engine, method, models, **parameters):
        recipes = [recipe_of(world, method, models, **parameters, **{_SCALE[method]: value}) for value in LAMBDAS]
        best = max(recipes, key=lambda recipe: accuracy(engine, tuning, recipe))
        return accuracy(engine, held, best)

    found["task arithmetic, lambda tuned"] = tuned(engine, "task_arithmetic", experts)
    with tempfile.TemporaryDirectory() as folder:
        over = write_survivors(recipe_of(world, "adamerging", fit={"items": ["i"]}), engine.pool, 0.2, Path(folder))
        trimmed = [str(source.model) for source in over.slices[0].sources]
        ties = LocalEngine(Pool.open(str(world / "base"), trimmed))
        tuning, held = digits.asks(learned, trimmed), digits.asks(heldout, trimmed)
        found["TIES, lambda tuned"] = tuned(ties, "ties", trimmed, weight=1.0, density=1.0, normalize=True)
        for name, (method, settings) in FITS.items():
            if only is None or name.startswith(tuple(only)):
                found[name] = fitted(world, Path(folder) / str(len(found)), method, settings)
    for name, value in found.items():
        print(f"seed {seed}  {name:<36} {100 * value:.1f}", flush=True)
    return found


_SCALE = {"task_arithmetic": "weight", "ties": "lambda"}


def recipe_of(
    world: Path, method: str, models: list[str] | None = None, fit=None, recipe: dict | None = None, **parameters
) -> Recipe:
    """Of all experts alike. recipe: parameters of the recipe, others are of its models."""
    shared = (recipe or {}) | {key: parameters.pop(key) for key in ("lambda", "normalize") if key in parameters}
    data = {"merge_method": method, "base_model": str(world / "base"), "dtype": "float32"}
    data["models"] = [{"model": model, "parameters": parameters} for model in models or [str(world / t) for t in TASKS]]
    return Recipe.parse(data | ({"parameters": shared} if shared else {}) | ({"fit": fit} if fit else {}))


def fitted(world: Path, folder: Path, method: str, settings: dict) -> float:
    """Held-out accuracy of a fit as the command runs it."""
    items = [str(world / f"{task}.jsonl") for task in TASKS]
    recipe = recipe_of(world, method, fit={"items": items, "check_every": 0} | settings)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return fit(folder / "recipe.yaml", folder / "run", quiet=True, export=False)["heldout"]


if __name__ == "__main__":
    main()
