"""AdaMerging++: every expert's task vector with the elements that TIES would keep of it, still one for each expert.

Of each task vector the largest elements of the whole model are kept (Yadav et al. 2023, trimming); the sign of an
element is that of the experts' sum; an expert keeps what agrees with it. Elements whose sum is 0 take the sign that
most of the model has. AdaMerging's authors compute it so (ties_merging_split).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from merge3.checkpoint.layout import Ref
from merge3.errors import RecipeError
from merge3.export import Prepared, prepare, write_checkpoint
from merge3.largest import kept_from
from merge3.learn.fit import experts_of, merged_with, of_experts
from merge3.methods import Job
from merge3.methods.learned import learned_named
from merge3.pool import Pool
from merge3.recipe import ModelRef, Recipe, Slice

_OF_HEADS = ("id2label", "label2id", "num_labels", "problem_type")  # what a configuration says of them


def write_survivors(recipe: Recipe, pool: Pool, share: float, folder: Path) -> Recipe:
    """The recipe over experts that hold survivors alone, float32 checkpoints in `folder`, named as the experts are.

    What is there already is not made anew. share: of each task vector's elements that trimming keeps. Reads the pool
    four times. Raises RecipeError where two experts have one name.
    """
    experts = experts_of(recipe)
    names = [_folder(expert) for expert in experts]
    if len(set(names)) < len(names):
        raise RecipeError("models", f"two end in {next(n for n in names if names.count(n) > 1)!r}", "names that differ")
    missing = [k for k, name in enumerate(names) if not (folder / name).exists()]
    if missing:
        jobs = prepare(_whole(recipe, experts), pool).program.jobs
        kept = kept_from(lambda: _magnitudes(jobs, pool, len(experts)), share)
        thresholds = [kept[k] for k in range(len(experts))]
        majority = _majority(jobs, pool, thresholds)
        for k in missing:
            _write(_whole(recipe, [experts[k]]), pool, jobs, thresholds, majority, k, folder / names[k])
    sources = []
    for source in recipe.slices[0].sources:
        if source.model != recipe.base_model:
            place = ModelRef.parse(str((folder / _folder(str(source.model))).resolve()), "models")
            sources.append(replace(source, model=place))
    going_on = learned_named(recipe.method).survivors
    return replace(recipe, method=going_on or recipe.method, slices=(Slice(tuple(sources)),))


def _folder(expert: str) -> str:
    """A folder's name that recipes read as nothing but a path."""
    return re.sub(r"[+@]", "-", Path(expert).name)


def survivors(vectors: Sequence[torch.Tensor], thresholds: Sequence[float], majority: float) -> list[torch.Tensor]:
    """Of task vectors of one tensor, float32, what each keeps. thresholds: the smallest magnitude that trimming keeps
    of each; majority: the sign of elements whose kept values sum to 0."""
    kept, total = _trimmed(vectors, thresholds)
    signs = total.sign()
    signs = torch.where(signs == 0, majority, signs)
    return [torch.where(vector * signs > 0, vector, 0.0) for vector in kept]


def _magnitudes(jobs: Sequence[Job], pool: Pool, experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    for job in jobs:
        for k, vector in enumerate(_vectors(job, pool, range(experts))):
            yield k, vector.abs()
        pool.give_back(job.refs)


def _vectors(job: Job, pool: Pool, which: Sequence[int]) -> list[torch.Tensor]:
    base = pool.get(job.base).float()
    return [pool.get(job.sources[k]).float() - base for k in which]


def _trimmed(vectors: Sequence[torch.Tensor], thresholds: Sequence[float]) -> tuple[list[torch.Tensor], torch.Tensor]:
    kept = [torch.where(v.abs() >= threshold, v, 0.0) for v, threshold in zip(vectors, thresholds)]
    return kept, torch.stack(kept).sum(0)


def _majority(jobs: Sequence[Job], pool: Pool, thresholds: Sequence[float]) -> float:
    """The sign that most elements of the trimmed sum have."""
    balance = 0
    for job in jobs:
        _, total = _trimmed(_vectors(job, pool, range(len(thresholds))), thresholds)
        balance += int(total.sign().long().sum())
        pool.give_back(job.refs)
    return float((balance > 0) - (balance < 0))


def _whole(recipe: Recipe, experts: Sequence[str]) -> Recipe:
    """One or more experts in full, float32."""
    narrowed = of_experts(recipe, experts)
    return replace(merged_with(narrowed, dict.fromkeys(experts, 1.0)), dtype="float32", out_dtype=None, surgery={})


def _write(recipe: Recipe, pool: Pool, jobs: Sequence[Job], thresholds, majority: float, k: int, folder: Path) -> None:
    whole = {job.name: job for job in jobs}

    def merge(own: list[Job]) -> dict[str, torch.Tensor]:
        merged = {}
        for job in own:
            vectors = _vectors(whole[job.name], pool, range(len(thresholds)))
            merged[job.name] = (pool.get(job.base).float() + survivors(vectors, thresholds, majority)[k]).cpu()
            pool.give_back(whole[job.name].refs)
        return merged

    write_checkpoint(_with_head(prepare(recipe, pool), pool, experts_of(recipe)[0]), recipe, pool, folder, merge)


def _with_head(ready: Prepared, pool: Pool, expert: str) -> Prepared:
    """The same with the expert's own head and labels, where no merge takes heads."""
    own = [name for name in pool.heads.get(expert, ()) if name in pool.fixed]
    if not own:
        return ready
    copies = ready.program.copies | {name: Ref(expert, name) for name in own}
    specs = ready.specs | {name: (torch.float32, pool.shape(Ref(expert, name))) for name in own}
    config = ready.config | {key: v for key, v in pool.endpoints[expert].config.items() if key in _OF_HEADS}
    return Prepared(replace(ready.program, copies=copies), specs, config)
