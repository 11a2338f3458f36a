"""Merge a recipe to disk, tensor by tensor, and describe the result.

Streams: a batch of tensors is read, merged, written and released before the next, so memory holds a
batch and not a model. The bytes are those a slot would hold for the same recipe and dtype.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merge3.alignment import check_finite
from merge3.checkpoint import CheckpointWriter, check_free
from merge3.checkpoint.card import model_card
from merge3.checkpoint.modules import check_modules, module_files
from merge3.checkpoint.write import SHARD_SIZE
from merge3.errors import BadInput, Merge3Warning, RecipeError
from merge3.methods import VARIANTS, Job, execute, method_named
from merge3.methods.filters import check_filters
from merge3.packaging import (
    Specs,
    chat_template,
    check_output,
    check_written,
    lead,
    output_config,
    output_specs,
    side_files,
)
from merge3.pool import Pool
from merge3.program import BATCH, Program, compile
from merge3.recipe import Recipe
from merge3.variants import Variants, check_parts, write_parts


@dataclass(frozen=True)
class Prepared:
    """A merge that nothing but the disk can still refuse."""

    program: Program
    specs: Specs
    config: dict[str, Any]
    parts: int = 0  # bytes that tasks' parts take beside, or more


def prepare(recipe: Recipe, pool: Pool, where: str = "recipe") -> Prepared:
    """Compile a merge and plan everything around it, without reading or writing weights.

    Raises RecipeError or CheckpointError for whatever would be refused at the end, but for what only the architecture
    can say; that is `check_output`. A filter that fits no tensor is a Merge3Warning.
    """
    program = compile(recipe, pool, where)
    check_filters(recipe, pool.layouts.values(), where)
    specs = output_specs(recipe, program, pool)
    first = lead(recipe)  # whose files the output has
    others = [str(model) for model in recipe.models() if str(model) != first]
    check_modules({model: pool.endpoints[model].path for model in (first, *others)})
    parts = check_parts(recipe, program, pool, specs, where) if program.tasks else 0
    return Prepared(program, specs, output_config(recipe, program, specs, pool), parts)


def check_recipe(recipe: Recipe, pool: Pool, where: str = "recipe") -> None:
    """A dry run of the export: raises whatever `merge_to_disk` would, but for a full disk or an overflow, and but for
    a vocabulary that a pool of the recipe's own models would not have: that may be measured, and not exported."""
    prepared = prepare(recipe, pool, where)
    check_output(prepared.config, prepared.specs, prepared.program.origins, recipe, pool, where)


def merge_to_disk(
    recipe: Recipe,
    directory: str | Path,
    pool: Pool | None = None,
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
    where: str = "recipe",
    drop: Iterable[str] = (),
) -> dict:
    """Write the merged checkpoint, atomically.

    Returns {"path", "tensors", "parameters", "kept": {tensor: reason}, "left_out": {"model: tensor": reason}, "notes":
    what became of language models that were merged into a model with eyes or ears, one line each; of a method with a
    result per task "variants" too: what their parts take, in bytes}.
    progress(elements done, elements in all) is called after each batch. drop: patterns of tensors that models have and
    the base lacks, which may be left out. What seems wrong but can be merged is a Merge3Warning.
    Raises RecipeError, CheckpointError or ResourceError; nothing is left under `directory` then.
    """
    directory = Path(directory)
    check_free(directory)
    streaming = pool is None
    if pool is None:
        models = recipe.models()
        if recipe.method not in VARIANTS:
            method_named(recipe.method, f"{where}: merge_method")
        try:
            pool = Pool.open(models[0], models[1:], drop=drop, tokenizer=recipe.tokenizer, tower=recipe.tower)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error.where}", error.found, error.expected, error.hint) from None
        for line in pool.warnings:
            warnings.warn(line, Merge3Warning, stacklevel=2)
    pool = pool.whole  # however a pool holds its experts, what is written is of their files
    _check_words(recipe, pool, where)
    ready = prepare(recipe, pool, where)

    def merge(jobs: list[Job]) -> dict[str, torch.Tensor]:
        try:
            merged = _merge_batch(jobs, ready, pool, seed)
        except RecipeError as error:  # what only values show, such as weights that sum to 0
            raise RecipeError(f"{where}: {error.where}", error.found, error.expected, error.hint) from None
        for job in jobs if streaming else ():
            pool.release(job.refs)
        return merged

    def pack(folder: Path) -> None:
        if ready.program.tasks:
            write_parts(folder, recipe, ready.program, pool, where)

    write_checkpoint(ready, recipe, pool, directory, merge, seed, shard_size, progress, where, pack)
    left_out = {f"{ref.model}: {ref.tensor}": reason for ref, reason in pool.left_out.items()}
    for model, count in (pool.vocabulary.unused if pool.vocabulary is not None else {}).items():
        left_out[f"{model}: {count:,} rows of embeddings"] = "no token of its tokenizer has them"
    result = {
        "path": str(directory),
        "tensors": len(ready.specs),
        "parameters": sum(job.numel for job in ready.program.jobs),
        "kept": ready.program.kept,
        "left_out": left_out,
        "notes": list(pool.notes),
    }
    return result | {"variants": Variants.open(directory).sizes()} if ready.program.tasks else result


def write_checkpoint(
    ready: Prepared,
    recipe: Recipe,
    pool: Pool,
    directory: Path,
    merge: Callable[[list[Job]], dict[str, torch.Tensor]],
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
    where: str = "recipe",
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write what `merge` makes of the jobs, and all that a checkpoint has beside, atomically. merge: of some jobs,
    name -> tensor in the dtype and shape of `ready.specs`. beside: adds to the folder when the checkpoint is whole. The
    others are as of merge_to_disk."""
    # transformers is loaded for it, which takes seconds: meanwhile the first tensors are merged.
    with ThreadPoolExecutor(1) as aside:
        checked = aside.submit(check_output, ready.config, ready.specs, ready.program.origins, recipe, pool, where)
        with CheckpointWriter(directory, ready.specs, shard_size, ready.parts) as writer:
            _write_tensors(writer, ready, pool, merge, progress, checked)
            _write_beside(writer, ready, recipe, pool, seed)
            checked.result()
            writer.finish()
            check_written(writer.temporary, ready.specs, ready.config)
            beside(writer.temporary)


def _check_words(recipe: Recipe, pool: Pool, where: str) -> None:
    """A file has the vocabulary that its recipe says, which a pool's other models would add to, and a base's rows."""
    models, asked, found = [str(model) for model in recipe.models()], recipe.tokenizer, pool.vocabulary
    if found is not None and asked is not None and asked.base != found.tokenizer.base:
        expected = "one, as this pool has" if found.tokenizer.base else "none, as this pool was opened without"
        raise RecipeError(f"{where}: base_model", str(recipe.base_model), expected, "export from a pool of its own")
    if found is not None and models != list(pool.endpoints):
        expected = f"{', '.join(pool.endpoints)}, of whose tokens this pool's vocabulary is made"
        raise RecipeError(
            f"{where}: tokenizer", f"models {', '.join(models)}", expected, "export from a pool of its own"
        )


def _write_tensors(
    writer: CheckpointWriter,
    ready: Prepared,
    pool: Pool,
    merge: Callable[[list[Job]], dict[str, torch.Tensor]],
    progress: Callable[[int, int], None],
    checked: Future,
) -> None:
    queue, copies = {job.name: job for job in ready.program.jobs}, ready.program.copies
    total, done = sum(job.numel for job in queue.values()) or 1, 0
    for batch in _batches(ready.specs, queue):
        if checked.done():
            checked.result()
        jobs = [queue[name] for name in batch if name in queue]
        merged = merge(jobs)
        for name in batch:
            if name in copies:
                tensor = pool.get(copies[name]).cpu().to(ready.specs[name][0])
            else:
                tensor = merged.pop(name)
            if name not in pool.fixed:  # a mask may well hold infinities
                check_values(name, tensor)
            writer.put(name, tensor)
        done += sum(job.numel for job in jobs)
        progress(done, total)


def _write_beside(writer: CheckpointWriter, ready: Prepared, recipe: Recipe, pool: Pool, seed: int) -> None:
    writer.write_text("config.json", json.dumps(ready.config, indent=2))
    writer.write_text("README.md", model_card(recipe, [str(m) for m in recipe.models()], ready.program.copies, seed))
    writer.write_text("mergekit_config.yml", recipe.to_yaml())
    writer.copy_as(side_files(recipe, pool))
    writer.copy_as(module_files(pool.endpoints[lead(recipe)].path))
    if (template := chat_template(recipe, pool)) is not None:
        writer.write_text("chat_template.jinja", template)


def check_values(name: str, tensor: torch.Tensor) -> None:
    """Inputs are finite, so what is not finite here overflowed: float16 ends at 65,504. A variance is at least 0.
    Raises BadInput."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)  # both are NaN where any element is; fifty times as fast as isfinite().all()
    if name.endswith(".running_var") and low < 0:
        expected = "0 or above: outputs would be NaN"
        raise BadInput(f"tensor {name!r}", f"merged variances down to {float(low):.3g}", expected, "smaller weights")
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return
    count = int((~torch.isfinite(tensor)).sum())
    kind = str(tensor.dtype).removeprefix("torch.")
    raise BadInput(
        f"tensor {name!r}",
        f"{count:,} of {tensor.numel():,} merged values are infinite or NaN in {kind}",
        "finite weights",
        "another out_dtype (bfloat16, float32), or smaller weights",
    )


def _batches(specs, queue):
    """Names in output order, in batches of about BATCH merged elements."""
    batch, size = [], 0
    for name in specs:
        numel = queue[name].numel if name in queue else 0
        if batch and size + numel > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += numel
    if batch:
        yield batch


def _merge_batch(jobs: list[Job], ready: Prepared, pool: Pool, seed: int) -> dict[str, torch.Tensor]:
    pool.statistics.prefetch_gram((job.base, job.sources) for job in jobs)
    for job in jobs:
        gram, (first, *others) = pool.statistics.gram(job.base, job.sources), job.refs
        check_finite(gram if job.base is not None else gram[1:, 1:], first, others)
    merged = {}
    for job in jobs:
        dtype, shape = ready.specs[job.name]
        merged[job.name] = torch.empty(shape, dtype=dtype, device=pool.device)
    execute(ready.program.outputs(merged, pool.statistics), pool.get, seed)
    return merged
