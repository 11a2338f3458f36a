"""Several merges of the same models, one after the other in one slot, asked the same items: which is best?"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from merge3.adapters.lm_eval import load_benchmark
from merge3.client.compare_table import standings
from merge3.client.evaluate import Asked, check_unique, items_of_files, response_row
from merge3.client.run import open_pool
from merge3.engine import LocalEngine, Subject, Varied
from merge3.errors import BadInput, Merge3Error, Merge3Warning, RecipeError
from merge3.experts import Experts
from merge3.export import check_recipe
from merge3.files import write_atomically
from merge3.live.heads import own_heads
from merge3.methods import VARIANTS, method_named
from merge3.methods.base import DERIVED, NOTHING, PER_TASK, RECIPE
from merge3.methods.variants import tasks_of
from merge3.packaging import chat_template
from merge3.pool import Pool
from merge3.recipe import ModelRef, Recipe
from merge3.registration import Judge, Registration
from merge3.search.baselines import every_merge
from merge3.search.measure import measured, short_names
from merge3.tasks import Item, fit_to_model


@dataclass(frozen=True)
class Compared:
    """Name -> recipe, and the models, base first. files: where a recipe came from; skipped: method -> why it is not
    among them."""

    recipes: Mapping[str, Recipe]
    models: Sequence[str]
    files: Mapping[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def from_files(files: Sequence[Path]) -> Compared:
    """Recipes of files. Raises RecipeError, naming the file, for one that cannot stand beside the others."""
    names = short_names([str(file.with_suffix("")) for file in files])
    recipes: dict[str, Recipe] = {}
    where: dict[str, str] = {}
    for file in files:
        recipe, name = Recipe.from_yaml(file), names[str(file.with_suffix(""))]
        row = VARIANTS.get(recipe.method) or method_named(recipe.method, f"{file}: merge_method")
        if row.needs != NOTHING or row.result not in (RECIPE, DERIVED, PER_TASK):
            found = f"{row.name}, which needs {row.needs} and makes: {row.result}"
            raise RecipeError(f"{file}: merge_method", found, "a method that needs nothing but models")
        if name in recipes:
            raise RecipeError(file, "given twice", "each recipe once")
        recipes[name], where[name] = recipe, str(file)
    first, *others = recipes
    for name in others:
        _check_alike(recipes[name], recipes[first], where[name], where[first])
    models = {str(recipe.base_model): None for recipe in recipes.values() if recipe.base_model is not None}
    for recipe in recipes.values():
        models |= dict.fromkeys(str(model) for model in recipe.models())
    return Compared(recipes, list(models), where)


def _check_alike(recipe: Recipe, first: Recipe, where: str, other: str) -> None:
    """One pool and one live model stand for all recipes. Raises RecipeError."""
    settings = {
        "tokenizer": lambda one: one.tokenizer and one.tokenizer.describe(),
        "tower": lambda one: dict(one.tower),
        "dtype": lambda one: one.out_dtype or one.dtype,
    }
    for key, said in settings.items():
        if said(recipe) != said(first):
            found = f"found {said(recipe) or 'none'}, {other} has {said(first) or 'none'}"
            raise RecipeError(f"{where}: {key}", found, f"the same {key} in all recipes", "compare them apart")


def from_models(base: str | None, experts: Sequence[str]) -> Compared:
    """The merges of every method that needs nothing but these. Raises BadInput for a model that is given twice."""
    base = None if base is None else str(ModelRef.parse(base, "--base"))
    experts = [str(ModelRef.parse(expert, "--models")) for expert in experts]
    models = [*([base] if base is not None else []), *experts]
    for model in models:
        if models.count(model) > 1:
            raise BadInput("--models", f"{model} twice", "each model once, the base apart")
    recipes, skipped = {}, {}
    for name, found in every_merge(base, experts):
        if isinstance(found, str):
            skipped[name] = found
        else:
            recipes[name] = found
    return Compared(recipes, models, skipped=skipped)


def compare(
    what: Compared,
    asked: Asked,
    seed: int = 0,
    device: str = "cpu",
    memory_budget: str | None = None,
    responses_file: Path | None = None,
    skip_too_long: bool = False,
    quiet: bool = False,
    experts: str = "full",
) -> dict[str, Any]:
    """{"rows", "best_baseline", "items", "skipped", "seconds"}; a row has "name", "kind" (merge or model),
    "accuracy", "stderr", "tasks", "difference" and "difference_stderr" (paired, to the best model), "level" (with the
    first row) and, of a merge, "seconds" (of merging) and "recipe". Rows without answers come last, with "error".

    Recipes of files are all refused or all measured; of methods that do not fit, `skipped` says why. experts: how those
    that are merged are held, see Pool.open; rows of models are of their files. Then there is "experts" too.
    """
    held = Experts.parse(experts, "--experts")
    if not asked.files and not asked.tasks:
        raise BadInput("compare", "neither --items nor --task", "one of them, or both")
    items, began = items_of_files(asked), time.perf_counter()  # bad items before any model is opened
    check_unique(items)
    what = _possible(what, lambda recipe, where: _check_tasks(recipe, items, where))
    if not what.recipes:
        raise BadInput("compare", "no method that these models allow", "other models, or recipes")
    first = next(iter(what.recipes.values()))
    words = {"tokenizer": first.tokenizer, "tower": first.tower}
    looked = Pool.open(what.models[0], what.models[1:], device, memory_budget=memory_budget, **words)
    what = _possible(what, lambda recipe, where: check_recipe(recipe, looked, where))  # before weights are read
    _heads(looked, items)
    pool = open_pool(what.models, device, quiet, memory_budget, **words, experts=held)
    dtype = first.out_dtype or first.dtype
    engine = LocalEngine(pool, getattr(torch, dtype) if dtype else None)
    what = _possible(what, engine.slot.compile)
    items, judges, chat = _questions(asked, items, pool, first, skip_too_long)
    what = _possible(what, lambda recipe, where: _check_tasks(recipe, items, where))
    recipes = {name: Varied(one) if one.method in VARIANTS else one for name, one in what.recipes.items()}
    asking = Registration(tuple(items), heads=_heads(pool, items), seed=seed, chat=chat, judges=judges)
    names = short_names(what.models, recipes)
    subjects = {names[model]: model for model in what.models} | recipes
    for subject in subjects.values():  # what cannot be asked is refused before the first answer
        engine.prepare(asking, subject)
    rows, answers = [], {}
    for number, (name, subject) in enumerate(subjects.items(), 1):
        row, responses = _measured(engine, asking, name, subject)
        rows.append(row)
        if responses is not None:
            answers[name] = responses
        if not quiet:
            said = "no answers" if responses is None else f"{row['accuracy']:.3f}"
            print(f"{number}/{len(subjects)}  {name}: {said}", file=sys.stderr, flush=True)
    if responses_file is not None:
        lines = []
        for name, values in answers.items():
            lines += [json.dumps(response_row(name, item, float(v))) + "\n" for item, v in zip(items, values)]
        write_atomically(responses_file, "".join(lines))
    beside = {"items": len(items), "skipped": what.skipped, "seconds": time.perf_counter() - began}
    if held:
        beside["experts"] = {"option": str(held), "loss": [loss._asdict() for loss in pool.compacted.losses]}
    return standings(rows, answers, items) | beside


def _possible(what: Compared, check: Callable[[Recipe, str], Any]) -> Compared:
    """Without the methods whose recipes `check` refuses. Raises for a file's recipe that it does."""
    recipes, skipped = {}, dict(what.skipped)
    for name, recipe in what.recipes.items():
        try:
            check(recipe, what.files.get(name, "recipe"))
        except BadInput as error:
            if name in what.files:
                raise
            skipped[name] = f"{error.found}; expected {error.expected}" if error.expected else error.line()
        else:
            recipes[name] = recipe
    if not recipes:
        raise BadInput("compare", "no method that these models allow", "other models, or recipes")
    return replace(what, recipes=recipes, skipped=skipped)


def _check_tasks(recipe: Recipe, items: Sequence[Item], where: str) -> None:
    """Of a method with a model for each task: raises RecipeError where items have a task without."""
    if recipe.method not in VARIANTS:
        return
    tasks = tasks_of(recipe, where)
    for task in dict.fromkeys(item.task for item in items):
        if task not in tasks:
            raise RecipeError(f"{where}: tasks", f"none for task {task!r}", f"items of {', '.join(tasks)}")


def _questions(
    asked: Asked, items: list[Item], pool: Pool, recipe: Recipe, skip_too_long: bool
) -> tuple[list[Item], dict[str, Judge], dict[str, str]]:
    """(items of files and of lm-eval's tasks that fit, judges of the latter, chat as a registration has it)"""
    chat, judges = asked.chat(items), {}
    folder = pool.words.folder(chat_template(recipe, pool))
    for name in asked.tasks:
        benchmark = load_benchmark(name, asked.settings, folder, [str(path) for path in asked.task_path])
        items = items + benchmark.first(asked.limit)
        judges[name] = benchmark.judge
    check_unique(items)
    policy = "skip" if skip_too_long else "error"
    fitted = fit_to_model(items, folder, policy, bool(chat), asked.settings.system_instruction or "")
    for note in fitted.notes:
        print(note, file=sys.stderr)
    return fitted.items, judges, chat


def _heads(pool: Pool, items: Sequence[Item]) -> dict[str, str]:
    """Task -> the endpoint whose head answers, where endpoints have heads of their own: the one that is named so."""
    if not own_heads(pool):
        return {}
    models = {name: model for model, name in short_names(list(pool.endpoints)).items()}
    tasks = dict.fromkeys(item.task for item in items)
    for task in tasks:
        if task not in models:
            found = f"no model of this name, and every model has a head of its own: {', '.join(models)}"
            raise BadInput(f"task {task!r}", found, "tasks that are named as the model whose head answers them")
    return {task: models[task] for task in tasks}


def _measured(engine: LocalEngine, asking: Registration, name: str, subject: Subject) -> tuple[dict, Any]:
    """(a row, responses; None where there are none)"""
    (evaluation,) = engine.evaluate(asking, [subject])
    row: dict[str, Any] = {"name": name, "kind": "model"}
    if not isinstance(subject, str):
        recipe = subject.subject if isinstance(subject, Varied) else subject
        row |= {"kind": "merge", "seconds": evaluation.swap_seconds, "recipe": recipe.to_dict()}
    try:
        responses = evaluation.answers()
    except Merge3Error as error:
        warnings.warn(f"{name} has no answers: {error}", Merge3Warning, stacklevel=2)
        return row | {"error": str(error)}, None
    return row | measured(responses, asking.items), responses
