"""1bit-Merging (2502.10743): of a task vector its signs, and per tensor the scale that is best in the L2 sense.

    τ_t ≈ α · sign(τ_t),  α = mean |τ_t|     (Liu et al. 2024, BitDelta, eq. 1 to 4)

Tensors that are binarised have the base's weights in the common model, so nothing of the base is stored twice; the
others are merged, and the same for all tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from merge3 import kernels
from merge3.methods import Job, Unpacked
from merge3.variants.source import Parts, Source


def pack(source: Source) -> Parts:
    """Parts per task: `signs`, int32 [ceil(numel / 32)], a bit for τ ≥ 0; and `scale`, float32 [1]."""
    specs: dict[str, Any] = {}
    for job in source.jobs:
        for task in source.tasks:
            specs[f"{task}/signs/{job.name}"] = torch.int32, ((job.numel + 31) // 32,)
            specs[f"{task}/scale/{job.name}"] = torch.float32, (1,)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for job in source.jobs:
            experts = [source.expert(job, task) for task in source.tasks]
            masks, sums = kernels.pack([source.base(job)], experts, 1)
            source.check(job, sums[0, :, 0])
            for task, mask, total in zip(source.tasks, masks, sums[0, :, 0]):
                yield f"{task}/signs/{job.name}", mask
                yield f"{task}/scale/{job.name}", (total / max(1, job.numel)).float()[None]
            source.done(job)

    names = [job.name for job in source.jobs]
    return Parts(specs, tensors, lambda: {task: {} for task in source.tasks}, {task: names for task in source.tasks})


def most(job: Job, itemsize: int, tasks: int, settings: Mapping[str, Any]) -> int:
    """A bit per element and task, and a scale."""
    return tasks * 4 * ((job.numel + 31) // 32 + 1)


def step(get, common, name: str, task: str, about: Mapping[str, Any], before: str | None) -> Unpacked:
    """base + α · sign"""
    return Unpacked("signs", (common, get(f"{task}/signs/{name}")), float(get(f"{task}/scale/{name}")))
