"""What optimizers of several objectives share: bounds, the first generation, a surrogate for each objective."""

from __future__ import annotations

import numpy as np

from merge3.search.surrogate import Surrogate

FAR = 3.0  # how far from the start a gene without bounds may go


def box(start) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), each [d], all finite: genes without bounds get some around the start. start: a Start."""
    finite = np.isfinite(start.high - start.low)
    low = np.where(finite, start.low, start.initial - FAR)
    return low, np.where(finite, start.high, start.initial + FAR)


def around(start, count: int, rng: np.random.Generator) -> np.ndarray:
    """The start, and genomes around it up to two and a half first steps away: float64 [count, d]."""
    low, high = box(start)
    steps = rng.normal(size=(count, len(low))) * (high - low) * start.sigma * rng.uniform(0, 2.5, (count, 1))
    steps[0] = 0.0
    return np.clip(start.initial + steps, low, high)


def losses(fitness: np.ndarray) -> np.ndarray:
    """What minimisers are told, float64 [C, objectives]: a failed candidate (NaN) is worse than all in everything."""
    failed = np.isnan(fitness).any(1)
    known = fitness[~failed]
    spread = np.ptp(known, axis=0) + 1.0 if len(known) else np.ones(fitness.shape[1])
    worst = known.min(0) - spread if len(known) else -spread
    return -np.where(failed[:, None], worst, fitness)


class Surrogates:
    """A surrogate for every objective, each told values in a unit of its own: accuracies as they are, others (tokens)
    in the largest of the first generation, since the surrogate's priors are those of accuracies."""

    def __init__(self, start):
        self._each = [Surrogate(start.low, start.high, start.sigma) for _ in range(start.objectives)]
        self._units: np.ndarray | None = None

    def add(self, genomes: np.ndarray, values: np.ndarray, stderrs: np.ndarray) -> None:
        """Another generation's estimates, each [C, objectives]; NaN: failed, left out."""
        if self._units is None and not np.isnan(values).all():
            self._units = np.maximum(np.nanmax(np.abs(values), axis=0), 1.0)
        if self._units is None:
            return
        for m, surrogate in enumerate(self._each):
            surrogate.add(genomes, values[:, m] / self._units[m], stderrs[:, m] / self._units[m])

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(values, standard errors), each [C, objectives]."""
        found = [surrogate.predict(genomes) for surrogate in self._each]
        values, stderrs = (np.stack([one[i] for one in found], 1) for i in (0, 1))
        return values * self._units, stderrs * self._units
