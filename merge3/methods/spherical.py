"""Methods on the sphere: slerp, nuslerp, multislerp, karcher.

Each result is a linear combination of its inputs whose coefficients depend on their norms and angles
alone, so the Gram matrix of a tensor (or of its rows) is all they read; the fused sum does the rest.
"""

from __future__ import annotations

import math

import numpy as np

from merge3.errors import RecipeError
from merge3.kernels import Modes
from merge3.methods.base import WEIGHT_OF_MODEL, Copy, Fused, Gene, Job, Method, Parameter, Step, neutral
from merge3.statistics import Statistics

_SLERP = "https://en.wikipedia.org/wiki/Slerp"


def methods() -> list[Method]:
    """slerp, nuslerp, multislerp and karcher."""
    return [
        Method(
            "slerp",
            "along the arc from the base to the other model",
            _SLERP,
            {
                "t": Parameter(
                    float, "shared", help="0: the base, 1: the other model", gene=Gene(0.0, 1.0, start=0.5, weighs=True)
                )
            },
            _slerp,
            experts=(1, 1),
            prefetch=_prefetch_with_base,
            searched=("t",),
        ),
        Method(
            "nuslerp",
            "along the arc between two models or task vectors",
            _SLERP,
            {
                "weight": Parameter(float, "expert", help="t is the second weight's share", gene=WEIGHT_OF_MODEL),
                "nuslerp_flatten": Parameter(bool, "shared", True, help="one angle per tensor instead of per row"),
                "nuslerp_row_wise": Parameter(bool, "shared", False, help="angles along the first dimension"),
            },
            _nuslerp,
            base="optional",
            experts=(2, 2),
            searched=("weight",),
        ),
        Method(
            "multislerp",
            "weighted mean on the sphere, projected from the tangent space",
            "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
            {
                "weight": Parameter(float, "expert", help="a model's share", gene=WEIGHT_OF_MODEL),
                "normalize_weights": Parameter(bool, "shared", True, help="make the weights sum to 1"),
                "eps": Parameter(float, "shared", 1e-8, 0.0, help="guards divisions"),
            },
            _multislerp,
            base="optional",
            searched=("weight",),
        ),
        Method(
            "karcher",
            "mean on the sphere that minimises squared angles",
            "https://arxiv.org/abs/2603.04972",
            {
                "max_iter": Parameter(int, "shared", 10, 1, help="most iterations"),
                "tol": Parameter(float, "shared", 1e-5, 0.0, help="stop below this step"),
            },
            _karcher,
            base="source",
        ),
    ]


def _prefetch_with_base(jobs: list[Job], statistics: Statistics) -> None:
    statistics.prefetch_gram((j.base, j.sources) for j in jobs)


def _slerp(job: Job, statistics: Statistics) -> Fused:
    gram = statistics.gram(job.base, job.sources)
    t = job.shared["t"]
    # From [θ, τ] to [θ, e]: e = θ + τ.
    dot = gram[0, 0] + gram[0, 1]
    norms = [math.sqrt(max(g, 0)) for g in (gram[0, 0], gram[0, 0] + 2 * gram[0, 1] + gram[1, 1])]
    norms = [n if n > 1e-8 else 1.0 for n in norms]
    cosine = min(1.0, max(-1.0, dot / (norms[0] * norms[1])))
    weights = (1 - t, t)
    if abs(cosine) <= 0.9995:
        angle = math.acos(cosine)
        weights = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
    return Fused(Modes(), None, (job.base, *job.sources), neutral(weights))


def _nuslerp(job: Job, statistics: Statistics) -> Fused:
    first, second = (own["weight"] for own in job.per_source)
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    flatten = job.shared["nuslerp_flatten"]
    if flatten:
        grams = statistics.gram(job.base, job.sources)[None]
    else:
        grams = statistics.gram_of_rows(job.base, job.sources, job.shared["nuslerp_row_wise"])
    dots = grams[:, 1:, 1:]
    norms = np.maximum(np.sqrt(np.maximum(np.einsum("rkk->rk", dots), 0)), 1e-7)
    cosine = np.clip(dots[:, 0, 1] / (norms[:, 0] * norms[:, 1]), -1, 1)
    # In float32, as mergekit: there 1 - cos² is exactly 0 for nearly parallel vectors.
    straight = 1 - np.float32(cosine) ** 2 <= 1e-16
    angle = np.arccos(np.where(straight, 0.0, cosine))
    arc = np.stack([np.sin((1 - t) * angle), np.sin(t * angle)], 1) / np.sin(angle)[:, None]
    weights = np.where(straight[:, None], [1 - t, t], arc)
    coefficients = neutral(weights[0] if flatten else weights)
    return Fused(Modes(), job.base, job.sources, coefficients, columns=not flatten and job.shared["nuslerp_row_wise"])


def _multislerp(job: Job, statistics: Statistics) -> Step:
    if len(job.sources) == 1:
        return Copy(job.sources[0])
    eps = job.shared["eps"]
    dots = statistics.gram(job.base, job.sources)[1:, 1:]
    weights = np.array([own["weight"] for own in job.per_source])
    if job.shared["normalize_weights"]:
        if weights.sum() == 0:
            raise RecipeError(f"{job.name}: weight", "weights that sum to 0", "another sum")
        weights = weights / weights.sum()
    norms = np.sqrt(np.maximum(dots.diagonal(), 0))
    share = weights / (norms + eps)  # of each input in the mean direction
    length = math.sqrt(max(share @ dots @ share, 0))
    if length < eps:
        if len(weights) != 2:
            raise RecipeError(f"{job.name}: weight", "opposed inputs whose weighted sum is zero", "other weights")
        return Fused(Modes(), job.base, job.sources, neutral(weights))
    # Projected from the tangent plane at that very mean, the weighted tangents cancel, so the
    # exponential map returns the mean direction itself.
    return Fused(Modes(), job.base, job.sources, neutral(share / length * (norms @ weights)))


def _karcher(job: Job, statistics: Statistics) -> Step:
    count = len(job.sources)
    if count == 1:
        return Copy(job.sources[0])
    tol = job.shared["tol"]
    dots = statistics.gram(None, job.sources)[1:, 1:]
    norms = np.sqrt(np.maximum(dots.diagonal(), 0))
    valid = norms > tol
    coefficients = np.zeros(count)
    if valid.any():
        index = np.flatnonzero(valid)
        unit = dots[np.ix_(index, index)] / np.outer(norms[index], norms[index])
        coefficients[index] = _karcher_mean(unit, tol, job.shared["max_iter"]) / norms[index]
    return Fused(Modes(), None, job.sources, neutral(coefficients * norms.mean()))


def _karcher_mean(unit: np.ndarray, tol: float, max_iter: int) -> np.ndarray:
    """The mean as coefficients of unit vectors with Gram matrix `unit` [n, n].

    In float64, where mergekit computes angles in float32: there arccos gives 0 or at least 3.5e-4, so of inputs that
    are nearly parallel some count as "no angle" and are left out, and the mean is pulled to the others: it is up to
    2e-4 (relative) from the mean it iterates to. These here are within `tol` of it (tests/methods/test_karcher.py).
    """
    n = len(unit)
    mean = np.full(n, 1 / n)
    length = math.sqrt(max(mean @ unit @ mean, 0))
    mean = np.eye(n)[0] if length < tol else mean / length
    for _ in range(max_iter):
        cosines = np.clip(unit @ mean, -1, 1)
        angles = np.arccos(cosines)
        step = np.where(angles < tol, 0.0, angles / np.where(angles < tol, 1.0, np.sin(angles))) / n
        tangent = step - (step @ cosines) * mean
        length = math.sqrt(max(tangent @ unit @ tangent, 0))
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) * tangent / length
        mean = mean / math.sqrt(mean @ unit @ mean)
    return mean
