"""Merges by linear algebra beside TIES and task arithmetic, on eight image tasks: the claims of their papers.

python benchmarks/linear_algebra.py [--seeds 0 1 2] [--save]    about a minute a seed on two cores, worlds aside

Worlds, items and the two baselines are those of benchmarks/learned.py. All methods' lambda, doge's eta and wudi's rate
of learning are tuned on the items that learned merges learn from; what is compared is accuracy on the held-out ones.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from statistics import mean

from learned import LAMBDAS, opened, recipe_of
from measure import report, table

from merge3 import LocalEngine, Pool, Recipe
from merge3.learn.survivors import write_survivors

# Name -> method, and the values of every parameter that is tried beside lambda.
DERIVED = {
    "Iso-C": ("iso_c", {}),
    "TSV-M": ("tsv_m", {}),
    "WUDI, 300 steps": ("wudi", {"learning_rate": (1e-5, 1e-4)}),
    "WUDI, closed form": ("wudi", {"closed": (True,)}),
    "DOGE": ("doge", {"eta": (0.02, 0.04, 0.07, 0.1, 0.2)}),
    "DOGE, the base's others": ("doge", {"eta": (0.02, 0.04, 0.07, 0.1, 0.2), "others": (False,)}),
}
TRIED = (*LAMBDAS, 2.0)
LEAD = {"DOGE": 0.0, "Iso-C": 0.05, "TSV-M": 0.05, "WUDI, 300 steps": 0.05, "WUDI, closed form": 0.05}  # over TIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    found = [measured(seed) for seed in options.seeds]
    rows = []
    for name in found[0]:
        own = [100 * of_seed[name] for of_seed in found]
        lead = min(of_seed[name] - of_seed["TIES"] for of_seed in found)
        rows.append([name, f"**{mean(own):.1f}**", *(f"{value:.1f}" for value in own), f"{100 * lead:+.1f}"])
    for name, lead in LEAD.items():
        least = min(of_seed[name] - of_seed["TIES"] for of_seed in found)
        print(f"{name}: {100 * least:+.1f} to TIES at least; claimed {100 * lead:+.1f}")
    seeds = [f"seed {seed}" for seed in options.seeds]
    title = "Held-out accuracy over eight image tasks, % (75 items a task); everything tuned on other items"
    text = table(title, ["merge", "mean", *seeds, "least lead over TIES"], rows)
    report("linear_algebra", text, {"seeds": options.seeds, "accuracy": found}, options.save)


def measured(seed: int) -> dict[str, float]:
    """Name of a merge -> held-out accuracy."""
    digits = opened(seed)
    world, experts, engine, learned, heldout = digits
    found: dict[str, float] = {}

    def tuned(name: str, engine: LocalEngine, models: list[str], recipes: list[Recipe]) -> None:
        asked = [digits.asks(part, models) for part in (learned, heldout)]
        values = [one.value for one in engine.evaluate(asked[0], recipes)]
        best = recipes[values.index(max(values))]
        found[name] = next(engine.evaluate(asked[1], [best])).value
        told = ", ".join(f"{key} {value}" for key, value in best.parameters.items())
        print(f"seed {seed}  {name:<24} {100 * found[name]:.1f}  {told}", flush=True)

    weighted = [recipe_of(world, "task_arithmetic", weight=value) for value in TRIED]
    tuned("task arithmetic", engine, experts, weighted)
    with tempfile.TemporaryDirectory() as folder:
        over = write_survivors(recipe_of(world, "adamerging", fit={"items": ["i"]}), engine.pool, 0.2, Path(folder))
        trimmed = [str(source.model) for source in over.slices[0].sources]
        settings = {"weight": 1.0, "density": 1.0, "normalize": True}
        ties = [recipe_of(world, "ties", trimmed, **settings, **{"lambda": value}) for value in TRIED]
        tuned("TIES", LocalEngine(Pool.open(str(world / "base"), trimmed)), trimmed, ties)
    for name, (method, choices) in DERIVED.items():
        recipes = []
        for values in itertools.product(TRIED, *choices.values()):
            common = dict(zip(("lambda", *choices), values))
            data = {"merge_method": method, "base_model": str(world / "base"), "dtype": "float32"}
            data |= {"models": [{"model": model} for model in experts], "parameters": common}
            recipes.append(Recipe.parse(data))
        tuned(name, engine, experts, recipes)
    return found


if __name__ == "__main__":
    main()
