"""BYOM-LoRA (2310.01886): every task's LoRA adapter, cut to its largest singular triples.

    scale · B·A = U Σ Vᵀ;  base + U_q Σ_q V_qᵀ is served

The singular values come from thin QR decompositions of the factors, so that no matrix of a weight's size is made:
B = Q₁R₁, Aᵀ = Q₂R₂, and an SVD of the small R₁R₂ᵀ. What is lost is the tail of singular values (Eckart–Young).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from merge3.checkpoint.factors import Factors, read_factors
from merge3.errors import CheckpointError
from merge3.methods import Job, Unpacked
from merge3.pool import Pool
from merge3.program import Program
from merge3.variants.source import Parts, Source


def pack(source: Source) -> Parts:
    """Parts per task and matrix that its adapter changes: `left` [m, q] and `right` [q, d], in the model's dtype; q is
    the rank that is asked, or the adapter's where that is smaller."""
    rank = source.settings["rank"]
    found = adapters(source.program, source.pool)
    specs: dict[str, Any] = {}
    varied: dict[str, list[str]] = {task: [] for task in source.tasks}
    for job in source.jobs:
        for task, factors in found.items():
            if job.name in factors:
                (m, own), (_, d) = factors[job.name].b.shape, factors[job.name].a.shape
                q = min(rank, own, m, d)
                varied[task].append(job.name)
                specs[f"{task}/left/{job.name}"] = source.dtype(job), (m, q)
                specs[f"{task}/right/{job.name}"] = source.dtype(job), (q, d)
    told = {task: {"rank": rank, "lost": 0.0} for task in source.tasks}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        whole, lost = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0.0)
        for job in source.jobs:
            for task, factors in found.items():
                if job.name not in factors:
                    continue
                if not (factors[job.name].b.isfinite().all() and factors[job.name].a.isfinite().all()):
                    at = f"NaN or infinity in the adapter's factors of {job.name!r}"
                    raise CheckpointError(source.program.tasks[task], at, "finite weights")
                left, right, values = cut(factors[job.name], rank)
                whole[task] += float(values.square().sum())
                lost[task] += float(values[rank:].square().sum())
                yield f"{task}/left/{job.name}", left.to(source.dtype(job))
                yield f"{task}/right/{job.name}", right.to(source.dtype(job))
        for task, told_of in told.items():
            told_of["lost"] = (lost[task] / whole[task]) ** 0.5 if whole[task] else 0.0

    return Parts(specs, tensors, lambda: told, varied)


def cut(factors: Factors, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U_q √Σ_q [m, q], √Σ_q V_qᵀ [q, d], all singular values), float32."""
    b, a = factors.b.double() * factors.scale, factors.a.double()
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    root = values[:rank].sqrt()
    kept = left @ (u[:, :rank] * root), (right @ (v[:rank].T * root)).T
    return kept[0].float(), kept[1].float().contiguous(), values


def most(job: Job, itemsize: int, tasks: int, settings: Mapping[str, Any]) -> int:
    """As if every adapter changed every matrix."""
    return tasks * settings["rank"] * sum(job.shape) * itemsize if len(job.shape) == 2 else 0


def step(get, common, name: str, task: str, about: Mapping[str, Any], before: str | None) -> Unpacked:
    """base + left · right"""
    return Unpacked("factors", (common, get(f"{task}/left/{name}"), get(f"{task}/right/{name}")))


def adapters(program: Program, pool: Pool) -> dict[str, Mapping[str, Factors]]:
    """Task -> name of a tensor of the model -> what the task's adapter adds to it; reads no weights. Raises
    CheckpointError."""
    shapes, found = {job.name: job.shape for job in program.varied}, {}
    for task, model in program.tasks.items():
        folder = pool.endpoints[model].adapter
        if folder is None:
            raise CheckpointError(model, "a whole model", "a LoRA adapter on the base: `base+adapter`")
        found[task] = read_factors(folder, shapes)
    return found
