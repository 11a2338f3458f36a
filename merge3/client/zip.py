"""`merge3-client fit` and `merge` of a recipe whose models are zipped: match units on items, write, measure."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merge3.client.fit_files import FitFiles
from merge3.client.fit_items import Taught, load_items
from merge3.client.fit_result import other_run, peak_memory
from merge3.client.terminal import bar
from merge3.errors import BadInput, ItemsError, Merge3Warning, RecipeError
from merge3.files import write_atomically
from merge3.learn.settings import ZipSettings, located, read_zip
from merge3.learn.zip import Seen, Zipped, built, measure_zip, same_question, zip_models
from merge3.learn.zip_correlation import Batch, renew_statistics
from merge3.learn.zip_file import FILE, save_zip
from merge3.learn.zip_items import shown
from merge3.learn.zip_matching import MATCHES
from merge3.live.load import load_model, promoted
from merge3.methods.zipped import ZIPPED, Zipped as Row
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.search.measure import Measured, items_name, measured, short_names
from merge3.tasks import Item, Scorer, by_task, items_hash


@dataclass(frozen=True)
class Asked:
    """A recipe that was read. names: of the two models, in order; folders: where their tokenizers lie."""

    recipe: Recipe
    row: Row
    settings: ZipSettings
    taught: Taught
    names: tuple[str, str]


@dataclass(frozen=True)
class Done:
    """models: name -> what came of it, live; of a zip that is one model both are that one."""

    zipped: Zipped
    models: Mapping[str, torch.nn.Module]


@dataclass(frozen=True)
class Work:
    """Both models live, the items they were shown, and what their units did."""

    asked: Asked
    models: tuple[torch.nn.Module, torch.nn.Module]
    folders: tuple[Path, Path]
    dtype: torch.dtype
    batches: Sequence[Batch]
    seen: Seen

    def zipped(self, match: str) -> Done:
        """By a way of matching of learn/zip_matching.py. Batch norms get the statistics that items give them."""
        settings, own = self.asked.settings, []
        zipped = zip_models(self.models, self.seen, MATCHES[match](settings.alpha, settings.beta))
        for model, tensors in zip(self.models, zipped.own):
            own.append(built(model, {**zipped.common, **tensors}))
            if zipped.one:
                break
        if self.seen.limit > 0:
            zipped = _renewed(own, zipped, self.batches)
        return Done(zipped, dict(zip(self.asked.names, own if len(own) > 1 else own * 2)))


def read(file: Path, recipe: Recipe) -> Asked:
    """Raises RecipeError for what no zip can begin with, ItemsError for its items."""
    row = ZIPPED[recipe.method]
    if not recipe.whole:
        raise RecipeError(f"{file}: slices", f"found with {row.name}", "`models`, two of one architecture")
    if recipe.base_model is not None:
        expected = "none: the two models share no ancestor"
        raise RecipeError(f"{file}: base_model", f"found {recipe.base_model}", expected)
    models = [str(source.model) for source in recipe.slices[0].sources]
    if len(models) != 2 or len(set(models)) != 2:
        raise RecipeError(f"{file}: models", f"{len(set(models))} of them", f"two: {row.name} merges pairs")
    given = [("parameters", recipe.parameters), *(("models", source.parameters) for source in recipe.slices[0].sources)]
    for place, parameters in given:
        for name in parameters:
            raise RecipeError(f"{file}: {place}: {name}", f"given with {row.name}", "settings of `fit:`")
    for key in ("surgery", "tower", "tokenizer", "chat_template"):
        if getattr(recipe, key):
            raise RecipeError(f"{file}: {key}", f"found with {row.name}", "a recipe without")
    settings = located(read_zip(recipe.fit, f"{file}: fit"), Path(file).parent)
    taught = load_items(recipe, settings, f"{file}: fit")
    first, second = short_names(models).values()
    if "/" in first + second:
        first, second = "first", "second"
    return Asked(recipe, row, settings, taught, (first, second))


def work(asked: Asked, device: str = "cpu", quiet: bool = False) -> Work:
    """Open both models and show them the items. Raises BadInput for models that cannot be zipped."""
    pools = [Pool.open(source.model, (), device) for source in asked.recipe.slices[0].sources]
    folders = tuple(pool.words.folder() for pool in pools)
    name = asked.recipe.out_dtype or asked.recipe.dtype
    dtype = getattr(torch, name) if name else torch.promote_types(*(promoted(pool) for pool in pools))
    models = tuple(load_model(pool, torch.float32) for pool in pools)
    if not same_question(models):
        _check_experts(asked)
    system = next(iter(asked.taught.chat.values()), None)
    batches = shown(asked.taught.learned, models, folders, system)
    told = lambda done, total: quiet or bar("showing items to both models", done, total)
    return Work(asked, models, folders, dtype, batches, measure_zip(models, batches, asked.settings.reach, told))


def merge_zip(
    file: Path, recipe: Recipe, directory: Path, as_json: bool = False, quiet: bool = False
) -> None:
    """`merge` of such a recipe: the checkpoint alone is wanted, or those of both models."""
    ready = work(read(file, recipe), quiet=quiet or as_json)
    done = ready.zipped(ready.asked.row.match)
    save(ready, done, directory)
    result = json.loads((directory / FILE).read_text())
    print(json.dumps(result) if as_json else told_sizes(result, directory))


def fit_zip(
    recipe: Recipe, file: Path, directory: Path, resume: bool, as_json: bool, quiet: bool, device: str, export: bool,
    compare: Sequence[Path],
) -> dict[str, Any]:
    """As fit.fit, which hands over to this. It takes one pass over the items, and is begun anew by --resume."""  # fmt: skip
    asked = read(file, recipe)
    others = {str(run): other_run(run, asked.taught.heldout) for run in compare}
    began = time.perf_counter()
    ready = work(asked, device, quiet or as_json)
    files = FitFiles(directory, resume)
    files.begin(_identity(ready))
    write_atomically(directory / "recipe.yaml", recipe.to_yaml())
    done = ready.zipped(asked.row.match)
    seconds = time.perf_counter() - began
    if export and not (directory / "model").exists():
        save(ready, done, directory / "model")
    result = _summary(ready, done, others, seconds)
    write_atomically(directory / "result.json", json.dumps(result, indent=2))
    return result


def save(ready: Work, done: Done, directory: Path) -> None:
    """Write what came of the models, and zip.json."""
    asked, settings = ready.asked, ready.asked.settings
    told = {
        "method": asked.row.name,
        "models": [str(model) for model in asked.recipe.models()],
        "layers": ready.seen.depth,
        "of": ready.seen.map.layers,
        "alpha": settings.alpha,
        "beta": settings.beta,
        "items": items_hash(asked.taught.learned),
    }
    save_zip(done.zipped, done.models, dict(zip(asked.names, ready.folders)), told, directory, ready.dtype)


def _check_experts(asked: Asked) -> None:
    """Models with labels of their own answer their own tasks: somebody has to say whose is whose."""
    for task in dict.fromkeys(item.task for item in asked.taught.learned):
        if task not in asked.taught.experts:
            expected = "whose head answers, as `model`; or as many files as models, in their order"
            raise RecipeError("fit: items", f"no model for task {task!r}, and each has labels of its own", expected)


def _renewed(models: Sequence[torch.nn.Module], zipped: Zipped, batches: Sequence[Batch]) -> Zipped:
    """With batch norms' statistics as the items give them: those in common first, then each model's own."""
    norms = [name for name, module in models[0].named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if not norms:
        return zipped
    shared = [name for name in norms if f"{name}.running_mean" in zipped.common]
    renew_statistics(models[0], batches, shared)
    state = models[0].state_dict()
    common = {name: state[name].clone() for name in zipped.common}
    own = []
    for model, tensors in zip(models, zipped.own):
        model.load_state_dict({**common, **tensors})
        renew_statistics(model, batches, [name for name in norms if name not in shared])
        own.append({name: model.state_dict()[name].clone() for name in tensors})
    own += [{} for _ in zipped.own[len(own) :]]
    return Zipped(common, tuple(own), zipped.groupings, zipped.correlation)


def _identity(ready: Work) -> dict[str, str]:
    asked = ready.asked
    settings = asked.settings.model_dump(mode="json", exclude={"items"})
    found = {"method": asked.row.name, "settings": json.dumps(settings, sort_keys=True)}
    for name, items in (("learned items", asked.taught.learned), ("held-out items", asked.taught.heldout)):
        found[name] = items_hash(items)
    for place, source in enumerate(asked.recipe.slices[0].sources):
        found[f"checkpoint {place}"] = Pool.open(source.model, ()).content_hashes()[str(source.model)]
    return found


# -- what it is worth


def _answers(ready: Work, models: Mapping[str, torch.nn.Module]) -> Measured | None:
    """Held-out accuracy, every task asked of its own model's result; None where none can be asked. Tasks that a model
    has no labels for are left out."""
    taught, responses, answered = ready.asked.taught, [], []
    names = dict(zip((str(model) for model in ready.asked.recipe.models()), ready.asked.names))
    folders = dict(zip(ready.asked.names, ready.folders))
    for task, items in by_task(taught.heldout).items():
        name = names.get(taught.experts.get(task, ""), ready.asked.names[0])
        model = models.get(name)
        if model is None:
            continue
        system = taught.chat.get(task)
        try:
            found = Scorer(items, model, folders[name], system is not None, system=system or "").score(model)
        except ItemsError as error:
            warnings.warn(f"task {task} is not measured: {error}", Merge3Warning, stacklevel=2)
            continue
        responses.append(found)
        answered += items
    return measured(np.concatenate(responses), answered) if answered else None


def _table(ready: Work, done: Done) -> tuple[dict[str, Measured], dict[str, Measured]]:
    """(the zip, what stands beside it), by name; without what has no answers."""
    asked = ready.asked
    ours = {asked.row.name: _answers(ready, done.models)}
    beside = {}
    for name, model in zip(asked.names, ready.models):
        if same_question(ready.models):
            beside[name] = _answers(ready, dict.fromkeys(asked.names, model))
        else:
            beside[name] = _answers(ready, {name: model})
    for row in ZIPPED.values():
        if row.name != asked.row.name:
            beside[row.name] = _answers(ready, ready.zipped(row.match).models)
    beside["average"] = _answers(ready, ready.zipped("as_they_are").models)
    keep = lambda found: {name: detail for name, detail in found.items() if detail is not None}
    return keep(ours), keep(beside)


def _summary(ready: Work, done: Done, others: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """result.json."""
    asked, taught = ready.asked, ready.asked.taught
    ours, beside = _table(ready, done)
    size = sum(len(batch) for batch in ready.batches)
    result: dict[str, Any] = {
        "method": asked.row.name,
        "models": [str(model) for model in asked.recipe.models()],
        "seed": asked.settings.seed,
        "learned_items": len(taught.learned),
        "labels": False,
        "settings": asked.settings.model_dump(mode="json"),
        "zip": {
            "layers": ready.seen.depth,
            "of": ready.seen.map.layers,
            "one": done.zipped.one,
            "correlation": {space: _numbers(pair) for space, pair in done.zipped.correlation.items()},
            "not_one_to_one": sorted(s for s, g in done.zipped.groupings.items() if not g.one_to_one),
        },
        "passes": {"forward": 2 * size},
        "others": dict(others),
        "seconds": seconds,
        "peak_memory": peak_memory(),
    }
    if ours:
        result |= {
            "heldout": ours[asked.row.name]["accuracy"],
            "heldout_detail": ours[asked.row.name],
            "heldout_items": len(taught.heldout),
            "heldout_name": items_name(taught.heldout),
            "baselines": {name: detail["accuracy"] for name, detail in beside.items()},
            "baselines_detail": beside,
            "best_baseline": max(beside, key=lambda name: beside[name]["accuracy"]),
        }
    return result


def _numbers(pair: tuple[float, float]) -> list[float | None]:
    """None where no two units of both models are in one place."""
    return [None if value != value else value for value in pair]


def print_zip(result: Mapping[str, Any], directory: Path) -> None:
    """The table a person reads at the end."""
    from rich.console import Console

    from merge3.client.run import accuracy_table

    console, zipped = Console(), result["zip"]
    if "heldout" in result:
        rows = [(result["method"], result["heldout_detail"])]
        rows += [(name, other["detail"]) for name, other in result["others"].items()]
        rows += sorted(result["baselines_detail"].items(), key=lambda row: -row[1]["accuracy"])
        console.print(accuracy_table(rows, result["heldout_items"], "the zip", result["method"]))
    pairs = [pair for pair in zipped["correlation"].values() if None not in pair]
    before, after = np.mean(pairs, axis=0) if pairs else (0.0, 0.0)
    console.print(
        f"{zipped['layers']} of {zipped['of']} layers, {len(zipped['correlation'])} spaces: correlation of matched units "
        f"{before:.3f} before, {after:.3f} after; {result['learned_items']} unlabelled items, {result['seconds']:.0f} s"
    )
    if (directory / "model" / FILE).exists():
        console.print(told_sizes(json.loads((directory / "model" / FILE).read_text()), directory / "model"))


def told_sizes(told: Mapping[str, Any], directory: Path) -> str:
    """Where results lie, and how much of them is the same."""
    size = told["bytes"]
    places = dict.fromkeys(str(directory / place) for place in told["results"].values())
    line = f"{told['layers']} of {told['of']} layers are one: {', '.join(places)}"
    if len(places) == 1:
        return line
    shared = f"{len(told['shared'])} tensors in common, {size['shared']:,} bytes"
    return f"{line}; {shared}; {size['together']:,} bytes with those stored once, {size['apart']:,} as they lie"
