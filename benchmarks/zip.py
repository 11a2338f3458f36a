"""ZipIt beside permutation and the plain average: two models of different initialisations, five digits each, asked for
all ten.

python benchmarks/zip.py [--families resnet vit] [--seeds 0 1 2] [--save]    a minute a seed and family, two cores

Units are matched on unlabelled images; what is compared is accuracy over all ten digits on images that neither models
nor matchings have seen. A zip up to a part of the depth ends in two models that share their first layers, and the
ensemble is two that share nothing: there the digit is the one that both together find likeliest. Zip with beta 1, which
was best on every seed of those tried (0, 0.125, 0.3, 0.6, 1), and with the authors' default.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from measure import report, table

from merge3.client.zip_work import Asked, Work, read, work
from merge3.learn.zip_file import contents
from merge3.learn.zip_matching import ALPHA, BETA
from merge3.recipe import Recipe
from merge3.tasks import Item
from merge3.world.kept import made
from merge3.world.strangers import LABELS, TASKS, make_strangers

WORLDS = Path("build/worlds").resolve()
WHOLE, THIRD, TWO_THIRDS = 1.0, 1 / 3, 2 / 3
ROWS = (  # name, depth, match, beta
    ("average", WHOLE, "as_they_are", BETA),
    ("permute", WHOLE, "one_to_one", BETA),
    ("zip, beta 0.125", WHOLE, "zip", BETA),
    ("zip, beta 1", WHOLE, "zip", 1.0),
    ("average, two thirds of the layers", TWO_THIRDS, "as_they_are", BETA),
    ("permute, two thirds of the layers", TWO_THIRDS, "one_to_one", BETA),
    ("zip, two thirds of the layers, beta 1", TWO_THIRDS, "zip", 1.0),
    ("average, a third of the layers", THIRD, "as_they_are", BETA),
    ("permute, a third of the layers", THIRD, "one_to_one", BETA),
    ("zip, a third of the layers, beta 1", THIRD, "zip", 1.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["resnet", "vit"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    found = {family: [measured(family, seed) for seed in options.seeds] for family in options.families}
    texts = []
    for family, of_seeds in found.items():
        rows = []
        for name in of_seeds[0]:
            own = [100 * of_seed[name][0] for of_seed in of_seeds]
            share = of_seeds[0][name][1]
            rows.append([name, f"**{mean(own):.1f}**", *(f"{value:.1f}" for value in own), f"{share:.2f}"])
        seeds = [f"seed {seed}" for seed in options.seeds]
        title = f"Accuracy over ten digits, {family}, %"
        texts.append(table(title, ["merge", "mean", *seeds, "size, in models"], rows))
    report("zip", "\n\n".join(texts), {"seeds": options.seeds, "accuracy": found}, options.save)


def measured(family: str, seed: int) -> dict[str, tuple[float, float]]:
    """Name -> (accuracy, how many models' worth of weights it takes)."""
    world = made(WORLDS, make_strangers, family=family, seed=seed)
    found: dict[str, tuple[float, float]] = {}
    ready: dict[float, Work] = {}
    for name, depth, match, beta in ROWS:
        if depth not in ready:
            ready[depth] = work(asked(world, depth), quiet=True)
        own = ready[depth]
        own = replace(own, asked=replace(own.asked, settings=own.asked.settings.model_copy(update={"beta": beta})))
        done = own.zipped(match)
        places = {task: Path("." if done.zipped.one else task) for task in TASKS}
        size = contents(done.zipped, places, torch.float32)["bytes"]
        one = sum(tensor.numel() * 4 for tensor in own.models[0].state_dict().values())
        found[name] = together(list(done.models.values()), own.asked.taught.heldout), size["together"] / one
    whole = ready[WHOLE]
    found["ensemble"] = together(list(whole.models), whole.asked.taught.heldout), 2.0
    for task, model in zip(TASKS, whole.models):
        found[f"the model of {task} digits alone"] = together([model], whole.asked.taught.heldout), 1.0
    for name, (value, _) in found.items():
        print(f"{family}, seed {seed}  {name:<40} {100 * value:.1f}", flush=True)
    return found


def asked(world: Path, depth: float) -> Asked:
    """A recipe of the world's two models, as the command reads it."""
    fit = {"items": [str(world / f"{task}.jsonl") for task in TASKS], "per_task": 300, "alpha": ALPHA, "depth": depth}
    recipe = Recipe.parse({"merge_method": "zipit", "models": [{"model": str(world / t)} for t in TASKS], "fit": fit})
    with tempfile.TemporaryDirectory() as folder:
        return read(Path(folder) / "zip.yaml", recipe)


@torch.no_grad()
def together(models: list, items: list[Item]) -> float:
    """Accuracy of the mean of these models' probabilities."""
    pixels = torch.stack([torch.from_numpy(np.load(item.image)) for item in items])
    right = torch.tensor([models[0].config.label2id[item.answer] for item in items])
    said = sum(model(pixel_values=pixels).logits.softmax(-1) for model in models)
    assert said.shape[-1] == LABELS
    return float((said.argmax(-1) == right).float().mean())


if __name__ == "__main__":
    main()
