"""One task's model as an ordinary checkpoint, of a recipe that makes one for each, or of a folder that was packed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from merge3.checkpoint import CheckpointWriter, check_free
from merge3.checkpoint.architecture import loading
from merge3.checkpoint.write import SHARD_SIZE
from merge3.errors import BadInput, CheckpointError, RecipeError
from merge3.export import check_values, merge_to_disk
from merge3.files import folder_beside
from merge3.methods import VARIANTS
from merge3.methods.variants import tasks_of
from merge3.packaging import Specs, check_written
from merge3.pool import Pool
from merge3.recipe import Recipe, nearest
from merge3.variants import Variants


def merge_task(
    recipe: Recipe,
    task: str,
    directory: str | Path,
    pool: Pool | None = None,
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
    where: str = "recipe",
    drop: Iterable[str] = (),
) -> dict:
    """One task's model of a recipe that makes one for each: packed beside `directory`, and written from there. The
    arguments are as of merge_to_disk."""
    directory = Path(directory)
    place = check_free(directory)
    check_task(recipe, task, where)
    with folder_beside(place) as folder:
        packed = Path(folder) / "packed"
        told = merge_to_disk(recipe, packed, pool, seed, shard_size, progress, where, drop)
        written = write_task(packed, task, directory, shard_size)
    return written | {key: told[key] for key in ("kept", "left_out", "notes")}


def check_task(recipe: Recipe, task: str, where: str = "recipe") -> None:
    """Raises RecipeError for a recipe that makes one model for all tasks, BadInput for a task without a variant."""
    if recipe.method not in VARIANTS:
        found = f"{recipe.method}, which makes one model for all tasks"
        raise RecipeError(f"{where}: merge_method", found, f"with a task one of {', '.join(VARIANTS)}")
    known = tasks_of(recipe, where)
    if task not in known:
        raise BadInput("task", f"no variant {task!r}", ", ".join(known), nearest(task, known))


def check_router(recipe: Recipe, where: str = "recipe") -> None:
    """Raises RecipeError for a recipe whose router would not be fitted where only weights are written."""
    if recipe.router:
        expected = "a recipe without, or `merge3-client merge`, which fits a router to what it has packed"
        raise RecipeError(f"{where}: router", "to be fitted to the common model", expected)


def write_task(packed: Path, task: str, directory: Path, shard_size: int = SHARD_SIZE) -> dict:
    """One task's model of a packed folder as an ordinary checkpoint, atomically. Returns as merge_to_disk.

    Raises BadInput for a task without a variant, CheckpointError or ResourceError; nothing is left then.
    """
    directory, variants = Path(directory), Variants.open(packed)
    variants.check(task, "--task")
    check_free(directory)
    config, varied = variants.config(task), variants.tasks[task]["varied"]
    specs: Specs = {name: variants.spec(name) for name in variants.common.tensors}
    specs |= {name: (info.dtype, info.shape) for name, info in variants.own_head(task).items()}
    _check_whole(config, specs, variants, task)
    with CheckpointWriter(directory, specs, shard_size) as writer:
        for name in specs:
            tensor = variants.tensor(name, task)
            if name in varied:  # others were checked when they were merged, and a mask may well hold infinities
                check_values(name, tensor)
            writer.put(name, tensor)
            if name in variants.common.tensors:
                variants.common.release(name)
        writer.write_text("config.json", json.dumps(config, indent=2))
        writer.copy_as(variants.side_files())
        writer.finish()
        check_written(writer.temporary, specs, config)
    parameters = sum(torch.Size(specs[name][1]).numel() for name in varied)
    told = {"kept": {}, "left_out": {}, "notes": []}
    return {"path": str(directory), "tensors": len(specs), "parameters": parameters, **told}


def _check_whole(config: Mapping[str, Any], specs: Specs, variants: Variants, task: str) -> None:
    """Refuse a head that the common model's configuration does not describe: transformers would make numbers up."""
    head = variants.own_head(task)
    if not head:
        return
    said = loading(dict(config), {name: shape for name, (_, shape) in specs.items()})
    if said is None:
        return
    odd = [*said.missing, *(name for name, *_ in said.mismatched), *(name for name in said.unexpected if name in head)]
    if odd:
        found = f"the head of {task!r} does not fit {said.architecture}: {odd[0]!r}"
        raise CheckpointError(variants.folder, found, "a head as the common model's, but for its labels")
