"""Merge a recipe to disk, tensor by tensor, and describe the result.

Streams: a batch of tensors is read, merged, written and released before the next, so memory holds a
batch and not a model. The bytes are those a slot would hold for the same recipe and dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from merge3.alignment import check_finite
from merge3.checkpoint import CheckpointWriter, check_free
from merge3.checkpoint.card import model_card
from merge3.checkpoint.layout import Ref
from merge3.checkpoint.write import SHARD_SIZE
from merge3.errors import RecipeError
from merge3.methods import execute, method_named, plan, steps_for
from merge3.methods.base import Job
from merge3.methods.plan import Plan
from merge3.pool import Pool
from merge3.recipe import Recipe

BATCH = 24_000_000  # elements merged at once
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*",
    "spiece.model", "generation_config.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def merge_to_disk(
    recipe: Recipe,
    directory: str | Path,
    pool: Pool | None = None,
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
    where: str = "recipe",
) -> dict:
    """Write the merged checkpoint, atomically. Returns {"path", "tensors", "parameters", "kept"}.

    progress(elements done, elements in all) is called after each batch.
    Raises RecipeError, CheckpointError or ResourceError; nothing is left under `directory` then.
    """
    directory = Path(directory)
    check_free(directory)
    method = method_named(recipe.method, f"{where}: merge_method")
    if recipe.tokenizer_source == "union":
        raise RecipeError(f"{where}: tokenizer_source", "`union` is not supported yet", "base, or one of the models")
    streaming = pool is None
    if pool is None:
        models = recipe.models()
        pool = Pool.open(models[0], models[1:])
    planned = plan(recipe, method, pool, where)
    donor = _tokenizer_donor(recipe, pool, where)
    specs = output_specs(recipe, planned, pool)
    total = sum(job.numel for job in planned.jobs) or 1
    done = 0
    with CheckpointWriter(directory, specs, shard_size) as writer:
        queue = {job.name: job for job in planned.jobs}
        for batch in _batches(specs, queue):
            merged = _merge_batch([queue[n] for n in batch if n in queue], method, specs, pool, seed)
            for name in batch:
                source = planned.copies.get(name)
                writer.put(name, merged.pop(name) if source is None else pool.get(source).cpu().to(specs[name][0]))
            if streaming:
                pool.release(ref for n in batch if n in queue for ref in _refs(queue[n]))
            done += sum(queue[n].numel for n in batch if n in queue)
            progress(done, total)
        writer.write_text("config.json", json.dumps(_config(recipe, planned, specs, pool), indent=2))
        writer.write_text("README.md", model_card(recipe, [str(m) for m in recipe.models()], planned.copies, seed))
        writer.write_text("mergekit_config.yml", recipe.to_yaml())
        writer.copy(sorted({f for pattern in TOKENIZER_FILES for f in donor.glob(pattern)}))
        if recipe.chat_template and recipe.chat_template not in ("auto",):
            writer.write_text("chat_template.jinja", recipe.chat_template)
    parameters = sum(job.numel for job in planned.jobs)
    return {"path": str(directory), "tensors": len(specs), "parameters": parameters, "kept": kept(planned, pool)}


def output_dtype(recipe: Recipe, pool: Pool, ref: Ref) -> torch.dtype:
    """out_dtype, else dtype, else what the endpoints' dtypes promote to."""
    name = recipe.out_dtype or recipe.dtype
    return getattr(torch, name) if name else pool.common_dtype(ref.tensor)


def output_specs(recipe: Recipe, planned: Plan, pool: Pool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every output tensor, in the order of the model."""
    specs = {}
    for job in planned.jobs:
        ref = job.base or job.sources[0]
        specs[job.name] = (output_dtype(recipe, pool, ref), job.shape)
    for name, ref in planned.copies.items():
        stored = pool.stored_dtype(ref)
        specs[name] = (output_dtype(recipe, pool, ref) if stored.is_floating_point else stored, pool.shape(ref))
    return specs


def kept(planned: Plan, pool: Pool) -> dict[str, str]:
    """Tensors that were not merged, with the reason."""
    return {n: pool.kept.get(r.tensor, "not in every model") for n, r in planned.copies.items()}


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


def _merge_batch(jobs: list[Job], method, specs, pool: Pool, seed: int) -> dict[str, torch.Tensor]:
    pool.statistics.prefetch_gram((job.base, job.sources) for job in jobs)
    for job in jobs:
        gram = pool.statistics.gram(job.base, job.sources)
        check_finite(gram if job.base is not None else gram[1:, 1:], *_split(job))
    steps = steps_for(method, jobs, pool.statistics)
    outputs = [(j.name, s, torch.empty(j.shape, dtype=specs[j.name][0], device=pool.device)) for j, s in zip(jobs, steps)]
    execute(outputs, pool.get, seed)
    return {name: out for name, _, out in outputs}


def _split(job: Job) -> tuple[Ref, list[Ref]]:
    refs = _refs(job)
    return refs[0], refs[1:]


def _refs(job: Job) -> list[Ref]:
    return ([job.base] if job.base is not None else []) + list(job.sources)


def _config(recipe: Recipe, planned: Plan, specs, pool: Pool) -> dict:
    lead = str(recipe.slices[0].sources[0].model) if recipe.base_model is None else str(recipe.base_model)
    config = json.loads(json.dumps(pool.endpoints[lead].config))
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        if key in inner:
            inner[key] = planned.layers
    if isinstance(inner.get("layer_types"), list) and len(inner["layer_types"]) != planned.layers:
        inner["layer_types"] = (inner["layer_types"] * planned.layers)[: planned.layers]
    dtype = next((d for d, _ in specs.values() if d.is_floating_point), None)
    for key in ("dtype", "torch_dtype"):
        if dtype is not None and key in config:
            config[key] = str(dtype).removeprefix("torch.")
    return config


def _tokenizer_donor(recipe: Recipe, pool: Pool, where: str) -> Path:
    lead = str(recipe.base_model or recipe.slices[0].sources[0].model)
    source = recipe.tokenizer_source
    name = lead if source in (None, "base") else source
    if name not in pool.endpoints:
        raise RecipeError(f"{where}: tokenizer_source", f"found {source!r}", "base, or one of " + ", ".join(pool.endpoints))
    donor = pool.endpoints[name].path
    if source is not None:
        reference = donor / "tokenizer.json"
        for other, checkpoint in pool.endpoints.items():
            file = checkpoint.path / "tokenizer.json"
            if reference.exists() and file.exists() and file.read_bytes() != reference.read_bytes():
                raise RecipeError(
                    f"{where}: tokenizer_source", f"the tokenizer of {other} differs from that of {name}",
                    "one vocabulary (rows are not remapped yet)",
                )  # fmt: skip
    return donor
