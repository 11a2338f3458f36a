"""What is taken for granted of a search's genes before anything is asked (`optimizer.prior`).

`norms`: a gene whose task vector is long, relative to the weights it changes, moves the model further; so its first
steps are shorter, and a surrogate sees less far along it. What a step does is then about the same along every gene, as
with a covariance near the inverse Hessian (Hansen, The CMA evolution strategy: a tutorial, section 1.3). AP-BMM
(arXiv:2512.09972) sets a Gaussian process's length scales by such a score of layers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from merge3.errors import ConfigError
from merge3.search.context import Search
from merge3.search.start import kept

NORMS = "norms"
FURTHEST = 2.0  # by which a prior lengthens or shortens steps at most: it is a guess


def with_prior(search: Search) -> Search:
    """The search with the steps that `optimizer.prior` says; as it is without one. A run that has begun keeps its own.

    Raises ConfigError where the models' task vectors are all of length 0.
    """
    if search.config.optimizer.prior != NORMS:
        return search
    known = search.journal.identity()
    if search.journal.begun and known.get("config") == search.config.hash() and "steps" in known:
        return replace(search, steps=kept(search.journal, "steps", known["steps"], search.space.size))
    return replace(search, steps=steps_of(search.engine.relative_norms(search.space.definition)))


def steps_of(norms: np.ndarray) -> np.ndarray:
    """How much longer or shorter than usual every gene's steps are, float64 [genes], 1 for the median one.

    norms: ‖τ‖ / ‖θ‖ of what each gene governs, NaN for one that governs nothing; see space.norms.
    """
    moving = norms[np.nan_to_num(norms) > 0]
    if not len(moving):
        raise ConfigError("optimizer.prior", "norms, and no model differs from the others", "models that do")
    with np.errstate(divide="ignore"):
        steps = np.median(moving) / norms
    return np.clip(np.where(np.isnan(steps), 1.0, steps), 1 / FURTHEST, FURTHEST)
