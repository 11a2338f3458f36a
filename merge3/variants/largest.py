"""BYOM-FFT (2310.01886): of what an expert has and the merge has not, the largest elements of the whole model.

    u_t = θ_t − θ*;  û_t = u_t where |u_t| is among the largest m;  θ* + û_t is served

θ* + u_t is the expert's own weight, so the expert's elements are kept, in its dtype and exact, and their places:
indices, or a mask of one bit per element, whichever is smaller for the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from merge3.errors import RecipeError
from merge3.largest import kth_largest
from merge3.methods import Job, Unpacked
from merge3.packed import words_of
from merge3.variants.source import Parts, Source

_INDEXED = 2**31  # elements from which on an index does not fit in int32


def pack(source: Source) -> Parts:
    """Parts per task: `values` [count] in the model's dtype, and `index`, int32 [count], or `mask`, int32
    [ceil(numel / 32)]. Exactly round(share · elements) are kept of each task, fewer only where the rest is equal: of
    equally large ones those that come first. Reads the models four times."""
    share, total = source.settings["share"], sum(job.numel for job in source.jobs)
    choices = {task: _Choice(source, task, share) for task in source.tasks}
    specs: dict[str, Any] = {}
    varied: dict[str, list[str]] = {task: [] for task in source.tasks}
    for job in source.jobs:
        for task, choice in choices.items():
            kept = choice.kept[job.name]
            if kept == 0:
                continue
            varied[task].append(job.name)
            specs[f"{task}/values/{job.name}"] = source.dtype(job), (kept,)
            words = (job.numel + 31) // 32
            indexed = kept < words and job.numel < _INDEXED
            specs[f"{task}/{'index' if indexed else 'mask'}/{job.name}"] = torch.int32, (kept if indexed else words,)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for job in source.jobs:
            for task, choice in choices.items():
                if choice.kept[job.name] == 0:
                    continue
                chosen = choice.of(job)
                yield f"{task}/values/{job.name}", source.expert(job, task).flatten()[chosen]
                if f"{task}/index/{job.name}" in specs:
                    yield f"{task}/index/{job.name}", chosen.nonzero()[:, 0].int()
                else:
                    yield f"{task}/mask/{job.name}", words_of(chosen)
            source.done(job)

    def about() -> dict[str, dict[str, int]]:
        return {task: {"kept": sum(choice.kept.values()), "of": total} for task, choice in choices.items()}

    return Parts(specs, tensors, about, varied)


def most(job: Job, itemsize: int, tasks: int, settings: Mapping[str, Any]) -> int:
    """As if every tensor kept its share: a mask where indices would take more, so never more than a mask."""
    return tasks * (int(settings["share"] * job.numel + 1) * itemsize + 4 * ((job.numel + 31) // 32))


def step(get, common, name: str, task: str, about: Mapping[str, Any], before: str | None) -> Unpacked:
    """The common tensor with the expert's elements in their places. Where both tasks' are few enough to have an index
    only these are touched; to find many by their bits takes longer than to write the whole tensor."""
    values, index = get(f"{task}/values/{name}"), get(f"{task}/index/{name}", None)
    if index is None:
        return Unpacked("bits", (common, get(f"{task}/mask/{name}"), values))
    old = get(f"{before}/index/{name}", None) if before is not None else None
    return Unpacked("places", (common, old, index, values), whole=before is not None and old is None)


class _Choice:
    """Which elements a task keeps. kept: tensor -> how many."""

    def __init__(self, source: Source, task: str, share: float):
        self.source, self.task = source, task
        ((self.threshold, equal),) = kth_largest(self._all, lambda count: max(1, round(share * count))).values()
        self.kept: dict[str, int] = {}
        self._equal: dict[str, int] = {}  # tensor -> how many of those at the threshold are its
        for job in source.jobs:
            size = self._sizes(job)
            at = int((size == self.threshold).sum()) if self.threshold > 0 else 0
            self._equal[job.name] = min(at, equal)
            equal -= self._equal[job.name]
            self.kept[job.name] = int((size > self.threshold).sum()) + self._equal[job.name]
            source.done(job)

    def of(self, job: Job) -> torch.Tensor:
        """bool [numel]"""
        size = self._sizes(job)
        chosen = size > self.threshold
        if self._equal[job.name]:
            at = (size == self.threshold).nonzero()[:, 0]
            chosen[at[: self._equal[job.name]]] = True
        return chosen

    def _all(self) -> Iterator[tuple[str, torch.Tensor]]:
        for job in self.source.jobs:
            yield self.task, self._sizes(job)
            self.source.done(job)

    def _sizes(self, job: Job) -> torch.Tensor:
        """|θ_t − θ*|, float32 [numel]. Raises RecipeError where it is not finite."""
        size = (self.source.expert(job, self.task).float() - self.source.shared(job).float()).abs().flatten()
        if not size.isfinite().all():
            found = f"NaN or infinity in tensor {job.name!r} of {self.source.program.tasks[self.task]} or the merge"
            raise RecipeError(self.source.where, found, "finite weights")
        return size
