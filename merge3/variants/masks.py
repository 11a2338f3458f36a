"""EMR-Merging (Huang et al. 2024, Section 3): of the unified task vector a mask for each task, and a scale.

    σ = sign(Σ τ_t);  u = σ · max |τ_t| over those of that sign;  M_t = [τ_t · u > 0];  τ̂_t = λ_t · M_t ⊙ u

The common model is base + u. Every element of it is some expert's own, or the base's: in the experts' dtype nothing is
lost. λ_t makes the L1 norms equal: of the whole model (`paper`, eq. 4 and 5), or of the means of its tensors
(`code`: what the authors' scripts over dictionaries compute).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from merge3 import kernels
from merge3.methods import Job, Unpacked
from merge3.variants.source import Parts, Source


def pack(source: Source) -> Parts:
    """Parts `base` (each tensor), and per task `mask`: int32 [ceil(numel / 32)], the lowest bit of a word first."""
    code = source.settings["rescale"] == "code"
    specs: dict[str, Any] = {}
    sums = torch.zeros(len(source.tasks), 2, dtype=torch.float64)  # Σ|τ_t|, Σ|M_t ⊙ u|; or of means
    for job in source.jobs:
        specs[f"/base/{job.name}"] = source.dtype(job), job.shape
        for task in source.tasks:
            specs[f"{task}/mask/{job.name}"] = torch.int32, ((job.numel + 31) // 32,)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        sums.zero_()
        for job in source.jobs:
            base = source.base(job)
            experts = [source.expert(job, task) for task in source.tasks]
            masks, found = kernels.pack([base], experts, 1, [source.shared(job)])
            source.check(job, found[0, :, 0])
            sums.add_(found[0], alpha=1 / max(1, job.numel) if code else 1.0)
            yield f"/base/{job.name}", base
            for task, mask in zip(source.tasks, masks):
                yield f"{task}/mask/{job.name}", mask
            source.done(job)

    def about() -> dict[str, dict[str, float]]:
        found = {}
        for task, (of_task, of_unified) in zip(source.tasks, sums.tolist()):
            found[task] = {"rescale": of_task / of_unified if of_unified > 0 else 1.0}  # an expert that is the base
        return found

    names = [job.name for job in source.jobs]
    return Parts(specs, tensors, about, {task: names for task in source.tasks})


def most(job: Job, itemsize: int, tasks: int, settings: Mapping[str, Any]) -> int:
    """The base's tensor, and a bit per element and task."""
    return job.numel * itemsize + tasks * 4 * ((job.numel + 31) // 32)


def step(get, common, name: str, task: str, about: Mapping[str, Any], before: str | None) -> Unpacked:
    """base + λ · mask · (common − base)"""
    return Unpacked("mask", (get(f"/base/{name}"), common, get(f"{task}/mask/{name}")), about["rescale"])
