"""Two models to be zipped: a recipe as it is read, both models live, what they were shown, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from merge3.checkpoint.read import INDEX, SINGLE
from merge3.client.fit_items import Taught, load_items
from merge3.client.terminal import bar
from merge3.errors import CheckpointError, RecipeError
from merge3.learn.settings import ZipSettings, located, read_zip
from merge3.learn.zip import Seen, Zipped, built, measure_zip, same_question, zip_models
from merge3.learn.zip_correlation import Batch, renew_statistics
from merge3.learn.zip_items import shown
from merge3.learn.zip_matching import MATCHES
from merge3.live.load import load_model, promoted
from merge3.methods.zipped import ZIPPED
from merge3.methods.zipped import Zipped as Row
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.search.measure import short_names


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
        own = [model.to(self.dtype) for model in own]  # what is measured is what is written
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
        found = f"{len(models)} of them" if len(models) != 2 else "a model twice"
        raise RecipeError(f"{file}: models", found, f"two: {row.name} merges pairs")
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
    if any("/" in name or set(name) <= {"."} for name in (first, second)):  # no names of folders
        first, second = "first", "second"
    return Asked(recipe, row, settings, taught, (first, second))


def work(asked: Asked, device: str = "cpu", quiet: bool = False) -> Work:
    """Open both models and show them the items. Raises BadInput for models that cannot be zipped."""
    pools = [Pool.open(source.model, (), device) for source in asked.recipe.slices[0].sources]
    for source, pool in zip(asked.recipe.slices[0].sources, pools):
        source.check_depth(pool.layouts[str(source.model)].layers, "models")
        opened = pool.base_checkpoint
        if opened.warnings and opened.adapter is None:  # transformers reads its weights here, and takes the other file
            raise CheckpointError(pool.base, f"{INDEX} and {SINGLE}, which it does not name", "one of the two")
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
