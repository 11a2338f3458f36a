"""Methods that average: linear (Wortsman et al. 2022), model_stock (Jang et al. 2024), sce (Wan et al.
2024), and passthrough, the average of one."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from merge3.errors import RecipeError
from merge3.kernels import Modes
from merge3.methods.base import (
    WEIGHT_OF_MODEL,
    ByHand,
    Copy,
    Elementwise,
    Fused,
    Gene,
    Job,
    Method,
    Parameter,
    Step,
    neutral,
)
from merge3.statistics import Statistics

AS_IT_IS = "passthrough"  # the method of a recipe that is one model, unchanged


def methods() -> list[Method]:
    """linear, model_stock, sce and passthrough."""
    return [
        Method(
            "linear",
            "weighted average of the models themselves",
            "https://arxiv.org/abs/2203.05482",
            {
                "weight": Parameter(float, "source", help="a model's share", gene=WEIGHT_OF_MODEL),
                "normalize": Parameter(bool, "shared", True, help="divide by the sum of weights"),
            },
            _linear,
            base="source",
            searched=("weight",),
            evolve_normalizes=True,
            by_hand={"uniform_linear": ByHand({"weight": 1.0})},
        ),
        Method(
            "model_stock",
            "towards the experts' mean, as far as their angles allow",
            "https://arxiv.org/abs/2403.19522",
            {"filter_wise": Parameter(bool, "shared", False, help="one angle per row instead of per tensor")},
            _model_stock,
            experts=(2, 8),
            prefetch=_prefetch_gram,
        ),
        Method(
            "sce",
            "select by variance, weight by energy, erase minority signs",
            "https://arxiv.org/abs/2408.07990",
            {
                "select_topk": Parameter(
                    float,
                    "shared",
                    1.0,
                    0.0,
                    1.0,
                    help="share of elements, by variance, merged",
                    gene=Gene(0.05, 1.0, start=1.0, steps=256),
                ),
                "int8_mask": Parameter(bool, "shared", False, help="accepted; changes nothing", idle=True),
            },
            _sce,
            prefetch=_prefetch_sce,
            searched=("select_topk",),
        ),
        Method(
            AS_IT_IS,
            "one model's tensors, optionally scaled",
            "",
            {"scale": Parameter(float, "source", None, help="factor", gene=Gene(0.0, 2.0, start=1.0))},
            _passthrough,
            base="source",
            experts=(1, 1),
        ),
    ]


def _linear(job: Job, statistics: Statistics) -> Fused:
    weights = [own["weight"] for own in job.per_source]
    if job.shared["normalize"] and sum(weights) == 0:
        raise RecipeError(f"{job.name}: weight", "weights that sum to 0", "another sum, or normalize: false")
    return Fused(Modes(normalize=job.shared["normalize"]), None, job.sources, neutral(weights))


def _prefetch_gram(jobs: list[Job], statistics: Statistics) -> None:
    statistics.prefetch_gram((j.base, j.sources) for j in jobs if not j.shared["filter_wise"])


def _model_stock(job: Job, statistics: Statistics) -> Fused:
    count = len(job.sources)
    if job.shared["filter_wise"]:
        grams = statistics.gram_of_rows(job.base, job.sources)
    else:
        grams = statistics.gram(job.base, job.sources)[None]
    tau = grams[:, 1:, 1:]
    norms = np.sqrt(np.maximum(np.einsum("rkk->rk", tau), 0))
    cosines = [
        np.clip(tau[:, a, b] / np.maximum(norms[:, a] * norms[:, b], 1e-6), -1, 1)
        for a, b in itertools.combinations(range(count), 2)
    ]
    cosine = np.mean(cosines, axis=0)
    denominator = 1 + (count - 1) * cosine
    singular = np.abs(denominator) < 1e-6  # opposing experts: stay at the base
    t = np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, denominator))
    weights = np.full((len(t), count), 1 / count)
    if not job.shared["filter_wise"]:
        return Fused(Modes(), job.base, job.sources, neutral(weights[0]), float(t[0]))
    return Fused(Modes(), job.base, job.sources, neutral(weights), t)


def _prefetch_sce(jobs: list[Job], statistics: Statistics) -> None:
    jobs = [j for j in jobs if j.numel]
    statistics.prefetch_gram((j.base, j.sources) for j in jobs if j.shared["select_topk"] >= 1)
    jobs = [j for j in jobs if j.shared["select_topk"] < 1]
    statistics.prefetch_variance((j.base, j.sources, 1) for j in jobs)  # for the non-zero count
    ranks = (int(statistics.variance_order(j.base, j.sources, 1).nonzero * j.shared["select_topk"]) for j in jobs)
    statistics.prefetch_variance((j.base, j.sources, rank) for j, rank in zip(jobs, ranks) if rank)


def _sce(job: Job, statistics: Statistics) -> Step:
    topk = job.shared["select_topk"]
    threshold = 0.0
    if topk < 1 and job.numel:
        nonzero = statistics.variance_order(job.base, job.sources, 1).nonzero
        k = int(nonzero * topk)
        threshold = statistics.variance_order(job.base, job.sources, k).value if k else float("inf")
    energy = statistics.memo(("sce", job.base, job.sources, threshold), lambda: _energy(job, statistics, threshold))
    total = sum(energy)
    weights = [e / total for e in energy] if total >= 1e-6 else [1 / len(energy)] * len(energy)
    return Elementwise("sce", job.base, job.sources, threshold, np.array(weights))


def _energy(job: Job, statistics: Statistics, threshold: float) -> list[float]:
    """Mean square of each task vector where the variance reaches the threshold."""
    if threshold == 0:
        return [g / max(1, job.numel) for g in statistics.gram(job.base, job.sources).diagonal()[1:]]
    theta = statistics.get(job.base).float()
    tau = torch.stack([statistics.get(s).float() - theta for s in job.sources])
    # The kernel's operations in the kernel's order, so that both select the very same elements.
    mean = sum(tau.unbind(0)) / len(tau)
    selected = sum((x - mean) * (x - mean) for x in tau) / len(tau) >= threshold
    return (tau * selected).square().flatten(1).mean(1).tolist()


def _passthrough(job: Job, statistics: Statistics) -> Step:
    scale = job.per_source[0]["scale"]
    if scale is None:
        return Copy(job.sources[0])
    return Fused(Modes(), None, job.sources, neutral([scale]))
