"""One model per task beside one model for all, on eight image tasks: the claims of their papers, seed by seed.

python benchmarks/variants.py [--seeds 0 1 2] [--save]    about half a minute a seed, once its world is there

Every task is answered by its own variant, and with its own expert's head. Held-out accuracy; lambda of task
arithmetic, on which BYOM keeps residuals, is tuned on the other items, as in benchmarks/learned.py.
"""

import argparse
from pathlib import Path
from statistics import mean

import numpy as np
from learned import LAMBDAS, WORLDS, opened, recipe_of
from measure import report, table

from merge3 import Pool, Recipe, Slot, read_items
from merge3.learn.router import fit_router
from merge3.search.seeds import seed_of
from merge3.tasks import split_heldout
from merge3.world import numbers
from merge3.world.kept import made
from merge3.world.training import make_models

SHARES = (0.01, 0.05, 0.1)
METHODS = ("emr", "onebit", "byom_fft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    found = [measured(seed) for seed in options.seeds]
    rows = []
    for name in found[0]:
        own = [100 * of_seed[name][0] for of_seed in found]
        spread = f"{np.std(own, ddof=1):.1f}" if len(own) > 1 else ""
        share = f"{found[0][name][1]:.3f}" if found[0][name][1] else ""
        rows.append([name, f"**{mean(own):.1f}**", spread, *(f"{value:.1f}" for value in own), share])
    seeds = [f"seed {seed}" for seed in options.seeds]
    title = "Held-out accuracy over eight image tasks, % (75 items a task), and bytes of a task's part"
    text = table(title, ["merge", "mean", "sd", *seeds, "of an expert's"], rows)
    routes = [routed(seed) for seed in options.seeds]
    rows = [[name, *(f"{100 * of_seed[name]:.1f}" for of_seed in routes)] for name in METHODS]
    title = "Held-out prompts of the demo's four tasks that the router sends to their own task's variant, %"
    text += "\n\n" + table(title, ["merge", *seeds], rows)
    report("variants", text, {"seeds": options.seeds, "found": found, "routes": routes}, options.save)


def measured(seed: int) -> dict[str, tuple[float, float]]:
    """Name -> (held-out accuracy, a task's part in bytes as a share of an expert's; 0 where there is one model)."""
    digits = opened(seed)
    world, experts, engine, learned, heldout = digits
    tuning, held = digits.asks(learned), digits.asks(heldout)
    accuracy = lambda asked, subject: next(engine.evaluate(asked, [subject])).value
    found = {"base": (accuracy(held, str(world / "base")), 0.0), "each expert on its task": (digits.alone(), 0.0)}
    arithmetic = lambda value: recipe_of(world, "task_arithmetic", weight=value)
    best = max(LAMBDAS, key=lambda value: accuracy(tuning, arithmetic(value)))
    found["task arithmetic, lambda tuned"] = accuracy(held, arithmetic(best)), 0.0
    found["EMR's unified model alone"] = accuracy(held, recipe_of(world, "emr_unified")), 0.0

    def varied(name, method, **parameters):
        recipe = recipe_of(world, method, **parameters)
        value = accuracy(held, recipe)
        sizes = [told["bytes"] for told in engine.slot.variants(recipe).tasks.values()]
        whole = sum(info.nbytes for info in engine.pool.base_checkpoint.tensors.values())
        found[name] = value, mean(sizes) / whole

    varied("emr", "emr")
    varied("emr, rescaled as the code for tables", "emr", recipe={"rescale": "code"})
    varied("onebit, all tensors", "onebit")
    for share in SHARES:
        recipe = {"share": share, "weight": best}
        varied(f"byom_fft, {100 * share:.0f} % on task arithmetic", "byom_fft", recipe=recipe)
    for name, (value, _) in found.items():
        print(f"seed {seed}  {name:<40} {100 * value:.1f}", flush=True)
    return found


def routed(seed: int) -> dict[str, float]:
    """Method -> the share of prompts, none of which the router has seen, that it sends to their own task's variant."""
    world = made(WORLDS, make_models, seed=seed)
    found = {}
    for method in METHODS:
        recipe = recipe_over(world, numbers.TASKS, method)
        items = [item for task in numbers.TASKS for item in read_items(world / f"{task}.jsonl")]
        seen, asked = split_heldout(items, 0.3, seed_of("held-out", 0))
        slot = Slot(Pool.open(str(world / "base"), [str(world / task) for task in numbers.TASKS]))
        slot.swap(recipe)
        folder = slot.pool.words.folder()
        few = {task: [item for item in seen if item.task == task][:16] for task in numbers.TASKS}
        sent = fit_router(slot.model, folder, few).route(slot.model, folder, asked)
        found[method] = mean(task == item.task for task, item in zip(sent, asked))
    print(f"seed {seed}  router {found}", flush=True)
    return found


def recipe_over(world: Path, tasks, method: str) -> Recipe:
    """Of all experts alike, what the recipe does not say as one would pick by hand."""
    models = [{"model": str(world / task)} for task in tasks]
    return Recipe.parse({"merge_method": method, "base_model": str(world / "base"), "models": models})


if __name__ == "__main__":
    main()
