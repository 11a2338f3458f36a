"""`router:` of a recipe: prompts that are read, a router that is fitted to the common model, and who it sends where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merge3.checkpoint import check_free
from merge3.errors import BadInput, RecipeError
from merge3.files import folder_beside, put_in_place, resource_error
from merge3.learn.router import Router, fit_router, load_router, save_router
from merge3.learn.settings import RouterSettings, located, read_router
from merge3.live.slot import Slot
from merge3.methods import VARIANTS
from merge3.methods.variants import tasks_of
from merge3.packaging import chat_template
from merge3.pool import Pool
from merge3.recipe import Recipe, nearest
from merge3.search.seeds import seed_of
from merge3.tasks import Item, by_task, read_items


def prompts(recipe: Recipe, file: Path) -> tuple[RouterSettings, dict[str, list[Item]]]:
    """(the settings, some prompts of each task, drawn by the seed). file: the recipe's, beside which items lie.

    Raises RecipeError for a recipe without a router, a task without prompts, or prompts without a variant.
    """
    where = f"{file}: router"
    if recipe.method not in VARIANTS:
        found = f"`router:` in a recipe of {recipe.method}, which makes one model for all tasks"
        raise RecipeError(where, found, f"one of {', '.join(VARIANTS)}")
    if not recipe.router:
        raise RecipeError(where, "none", "`router: {items: [..]}`, a few prompts of every task")
    settings = located(read_router(recipe.router, where), Path(file).parent)
    if settings.system_instruction and not settings.apply_chat_template:
        raise RecipeError(f"{where}.system_instruction", "without apply_chat_template", "both, or neither")
    tasks = list(tasks_of(recipe, str(file)))
    found: dict[str, list[Item]] = {}
    for at, entry in enumerate(settings.items):
        for task, own in by_task(read_items(entry.items, entry.name)).items():
            name = entry.name or task
            if name not in tasks:
                expected, hint = ", ".join(tasks), nearest(name, tasks)
                raise RecipeError(f"{where}.items[{at}]", f"task {name!r} has no variant", expected, hint)
            found.setdefault(name, []).extend(own)
    for task in tasks:
        if task not in found:
            raise RecipeError(f"{where}.items", f"no prompts of task {task!r}", "some of every task")
    rng = np.random.default_rng(seed_of("limit", settings.seed))
    chosen = {}
    for task in tasks:
        own = found[task]
        chosen[task] = [own[i] for i in sorted(rng.permutation(len(own))[: settings.per_task])]
    return settings, chosen


def with_router(recipe: Recipe, file: Path, out: Path, pack: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """A packed folder with a router beside, there whole or not at all. pack: writes it into a new folder."""
    settings, chosen = prompts(recipe, file)
    place = check_free(out)
    with folder_beside(place) as folder:
        packed = Path(folder) / "packed"
        told = pack(packed)
        pool = Pool.open(str(packed), [])
        slot = Slot(pool)
        slot.load(pool.base)
        save_router(_fitted(slot, pool.words.folder(), settings, chosen), packed)
        try:
            put_in_place(packed, place)
        except OSError as error:
            raise resource_error(out, error) from None
    told["variants"]["folder"] = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    return told | {"path": str(out), "router": len(chosen)}


def routed(what: Path, subject: Recipe | str, slot: Slot, items: Sequence[Item]) -> list[str]:
    """Whose variant each item is sent to. what: the recipe's file, whose router is fitted, or the packed folder that
    has one; subject: as evaluate opened it. Overwrites the live model."""
    pool = slot.pool
    if isinstance(subject, Recipe):
        settings, chosen = prompts(subject, what)
        folder = pool.words.folder(chat_template(subject, pool))
        slot.swap(subject, where=str(what))
        return _fitted(slot, folder, settings, chosen).route(slot.model, folder, items)
    router = load_router(what)
    slot.load(subject)
    return router.route(slot.model, pool.words.folder(), items)


def told_of_routes(tasks: Sequence[str], items: Sequence[Item]) -> Mapping[str, Any]:
    """How many were sent to the variant of their own task, of those whose task has one."""
    own = [(task, item.task) for task, item in zip(tasks, items) if item.task in set(tasks)]
    counts = {task: tasks.count(task) for task in dict.fromkeys(tasks)}
    right = sum(sent == asked for sent, asked in own)
    return {"sent": counts, "of_own_task": right / len(own) if own else None}


def check_variants(route: bool, variants: bool, what: Path, recipe: Recipe | None) -> None:
    """Raises BadInput for --route of what has no variants, and for --no-variants where they would answer all the same.
    recipe: None where `what` is a folder."""
    if route and not variants:
        raise BadInput("--route", "given with --no-variants", "one of them: a router sends prompts to variants")
    if recipe is None:
        return
    if route and recipe.method not in VARIANTS:
        raise BadInput("--route", f"given with {what}, one model for all tasks", f"one of {', '.join(VARIANTS)}")
    if not variants and recipe.method in VARIANTS:
        expected = "the folder that `merge3-client merge` makes of it"
        raise BadInput("--no-variants", f"given with a recipe of {recipe.method}", expected)


def _fitted(slot: Slot, folder: Path, settings: RouterSettings, chosen: Mapping[str, Sequence[Item]]) -> Router:
    system = (settings.system_instruction or "") if settings.apply_chat_template else None
    return fit_router(slot.model, folder, chosen, system)
