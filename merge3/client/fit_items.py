"""The items of a fit: which are learned from, which measure it, and whose task is whose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from merge3.errors import ItemsError, RecipeError
from merge3.learn.fit import Fit, others_of
from merge3.learn.losses import LOSSES
from merge3.learn.settings import FitSettings, SurgerySettings, ZipSettings
from merge3.recipe import Recipe
from merge3.search.seeds import seed_of
from merge3.tasks import Item, read_items, split_heldout


@dataclass(frozen=True)
class Taught:
    """learned: the items of every task that are learned from; heldout: those that measure, all where none are held
    out; none where somebody else measures. experts: task -> its own model; chat: task -> system message, of prompts
    that the chat template wraps."""

    learned: list[Item]
    heldout: list[Item]
    experts: dict[str, str]
    chat: dict[str, str]


def load_items(recipe: Recipe, settings: FitSettings | SurgerySettings | ZipSettings, where: str) -> Taught:
    """Items of every task, split as a search with the same seed splits them. Raises ItemsError or RecipeError."""
    if not settings.items:
        raise RecipeError(f"{where}.items", "none", "files of items, one for each task")
    if settings.system_instruction and not settings.apply_chat_template:
        raise RecipeError(f"{where}.system_instruction", "without apply_chat_template", "both, or neither")
    models = others_of(recipe)
    needed = isinstance(settings, SurgerySettings)
    if isinstance(settings, FitSettings):
        needed = LOSSES[Fit(recipe).method.loss].expert
    items: list[Item] = []
    experts: dict[str, str] = {}
    for at, entry in enumerate(settings.items):
        own = read_items(entry.items, entry.name)
        if entry.name is not None:
            own = [replace(item, task=entry.name) for item in own]
        model = _model_of(entry.model, at, len(settings.items), models, f"{where}.items[{at}].model")
        tasks = dict.fromkeys(item.task for item in own)
        if model is None and needed:
            expected = "the expert whose outputs are matched, as `model`; or as many files as models, in their order"
            raise RecipeError(f"{where}.items[{at}]", f"no model for task {', '.join(tasks)}", expected)
        for task in tasks:
            if task in experts and experts[task] != model:
                raise RecipeError(f"{where}.items[{at}]", f"task {task!r} is in another file too", "a task a file")
            if model is not None:
                experts[task] = model
        items += own
    _check_unique(items)
    learned, heldout = split_heldout(items, settings.heldout, seed_of("held-out", settings.seed))
    rng = np.random.default_rng(seed_of("limit", settings.seed))
    chosen: list[Item] = []
    for task in dict.fromkeys(item.task for item in learned):
        own = [item for item in learned if item.task == task]
        chosen += [own[i] for i in sorted(rng.permutation(len(own))[: settings.per_task])]
    chat = dict.fromkeys(experts, "") if settings.apply_chat_template else {}
    if settings.apply_chat_template:
        chat = {item.task: settings.system_instruction or "" for item in items}
    return Taught(chosen, heldout or learned, experts, chat)


def _model_of(said: str | None, at: int, files: int, models: Sequence[str], where: str) -> str | None:
    """The expert of a file: the one that is named, by its path or, where that is one model's alone, the path's last
    part; else the one in its place."""
    if said is None:
        return models[at] if files == len(models) else None
    if said in models:
        return said
    close = [model for model in models if Path(model).name == said.removeprefix("./").rstrip("/")]
    if not close:  # a path, as it is from where the recipe lies or from here
        close = [model for model in models if Path(model).resolve() == Path(said).expanduser().resolve()]
    if len(close) != 1:
        several = f", of which {len(close)} end so" if close else ""
        raise RecipeError(where, f"found {said!r}", f"one of {', '.join(models)}{several}")
    return close[0]


def _check_unique(items: Sequence[Item]) -> None:
    seen: set[tuple[str, str]] = set()
    for item in items:
        if (item.task, item.id) in seen:
            raise ItemsError(f"task {item.task!r}", f"item id {item.id!r} twice", "unique ids within a task")
        seen.add((item.task, item.id))
