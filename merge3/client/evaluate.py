"""Answer items with one model: a checkpoint as it is, or a recipe merged in memory."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from merge3.engine import LocalEngine
from merge3.errors import ItemsError, Merge3Warning
from merge3.files import write_atomically
from merge3.fitness import mean_over_tasks
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.tasks import Item, fit_to_model, read_items
from merge3.tasks.items import place


def evaluate_files(
    what: Path,
    files: list[Path],
    seed: int = 0,
    device: str = "cpu",
    responses_file: Path | None = None,
    memory_budget: str | None = None,
    skip_too_long: bool = False,
) -> dict[str, Any]:
    """{"accuracy", "stderr", "tasks": {task: {accuracy, stderr, items}}, "skipped": {task: items}, "seconds"}.

    skip_too_long: leave out what the model has no positions for, say so, and count it in `skipped`.
    """
    items = [item for file in files for item in read_items(file)]
    seen: set[tuple[str, str]] = set()
    for item in items:
        if (item.task, item.id) in seen:
            raise ItemsError(place(item), "this id is in another file too", "unique ids within a task")
        seen.add((item.task, item.id))
    if what.is_dir() or what.suffix not in (".yaml", ".yml"):
        pool, dtype = Pool.open(str(what), [], device, memory_budget=memory_budget), None
        subject = pool.base
    else:
        subject = Recipe.from_yaml(what)
        models = subject.models()
        pool = Pool.open(models[0], models[1:], device, memory_budget=memory_budget, tower=subject.tower)
        dtype = subject.out_dtype or subject.dtype
    for line in pool.warnings:
        warnings.warn(line, Merge3Warning, stacklevel=2)
    for note in pool.notes:
        print(note, file=sys.stderr)
    fitted = fit_to_model(items, pool.base_checkpoint.path, "skip" if skip_too_long else "error")
    items = fitted.items
    for note in fitted.notes:
        print(note, file=sys.stderr)
    engine = LocalEngine(pool, getattr(torch, dtype) if dtype else None)
    start = time.perf_counter()
    (evaluation,) = engine.evaluate(Registration(tuple(items), seed=seed), [subject])
    responses, seconds = evaluation.answers(), time.perf_counter() - start
    value, stderr = mean_over_tasks(responses, items)
    tasks = {}
    for task in dict.fromkeys(item.task for item in items):
        at = [i for i, item in enumerate(items) if item.task == task]
        accuracy, error = mean_over_tasks(responses[at], [items[i] for i in at])
        tasks[task] = {"accuracy": accuracy, "stderr": error, "items": len(at)}
    if responses_file is not None:
        lines = [json.dumps(_row(str(what), item, score)) for item, score in zip(items, responses.tolist())]
        write_atomically(responses_file, "\n".join(lines) + "\n")
    return {"accuracy": value, "stderr": stderr, "tasks": tasks, "skipped": fitted.skipped, "seconds": seconds}


def _row(model: str, item: Item, score: float) -> dict[str, Any]:
    """One answer, with what its item carries beside our keys; `extra_` comes before a name that is a row's own."""
    row: dict[str, Any] = {"model": model, "item": item.id, "task": item.task, "score": score}
    for key, value in item.extra:
        row[f"extra_{key}" if key in row else key] = value
    return row
