"""How far the weights that each gene governs change with it: what a search may know before anything is asked.

An expert's task vector is long in some layers and short in others, and a gene of a short one hardly matters. AP-BMM
(arXiv:2512.09972, section 4) takes such a score per layer as a prior; here it is one number for every gene.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from merge3.program import jobs_of_experts
from merge3.recipe import ModelRef
from merge3.space.parameters import ParameterSpace
from merge3.space.projection import governed


def relative_norms(space: ParameterSpace, pool: Any) -> np.ndarray:
    """‖τ‖ / ‖θ‖ of the tensors that each gene governs, float64 [size]; NaN for a gene that governs none.

    τ: the model's difference from the base, or, where a method has none, from the models' mean, which then is θ. A gene
    that all models share has their root mean square. pool: of the models; see Pool.
    """
    jobs = [job for job in jobs_of_experts(space.uniform_recipe(), pool) if job.sources]
    pool.statistics.prefetch_gram((job.base, tuple(job.sources)) for job in jobs)
    models = {str(ModelRef.parse(model)): i for i, model in enumerate(space.definition.models)}
    whole, changed = np.zeros(len(jobs)), np.zeros((len(jobs), len(models)))
    for i, job in enumerate(jobs):
        whole[i], found = _squares(pool.statistics.gram(job.base, tuple(job.sources)), job.base is not None)
        for source, square in zip(job.sources, found):
            if source.model in models:
                changed[i, models[source.model]] = square
    shares = governed(space, [job.name for job in jobs]) ** 2  # [tensors, groups, filter sets]
    below = np.einsum("tgf,t->gf", shares, whole)[:, None]
    squares = np.einsum("tgf,tm->gmf", shares, changed)
    with np.errstate(invalid="ignore", divide="ignore"):
        own = np.sqrt(squares / below)  # [groups, models, filter sets]
        shared = np.sqrt(squares.sum((1, 2)) / below.sum((1, 2)) / len(models))
    parts = [np.repeat(own[..., None], len(space.own), axis=-1).ravel(), np.repeat(shared, len(space.shared))]
    return np.concatenate(parts)


def _squares(gram: np.ndarray, based: bool) -> tuple[float, np.ndarray]:
    """(‖θ‖², ‖τ‖² of every source) from a tensor's Gram matrix, float64 [sources + 1, sources + 1]."""
    if based:
        return gram[0, 0], np.diag(gram)[1:]
    among = gram[1:, 1:]
    mean = among.mean()
    return mean, np.maximum(np.diag(among) - 2 * among.mean(0) + mean, 0.0)
