"""Random search: what everything else must beat."""

from __future__ import annotations

import numpy as np


class RandomSearch:
    """Uniform samples within the bounds (normal ones around the start where there are none)."""

    def __init__(self, initial, low, high, sigma: float, population: int, seed: int):
        self.population, self._rng = population, np.random.default_rng(seed)
        self._initial, self._low, self._high, self._sigma = initial, low, high, sigma

    def ask(self) -> list[np.ndarray]:
        """See Optimizer."""
        shape = (self.population, len(self._initial))
        if np.isfinite(self._high - self._low).all():
            return list(self._rng.uniform(self._low, self._high, shape))
        return list(self._initial + self._sigma * self._rng.standard_normal(shape))

    def tell(self, genomes: list[np.ndarray], fitness: list[float], stderrs: list[float]) -> None:
        """See Optimizer. Nothing is learnt."""

    def tell_arrived(
        self, genomes: list[np.ndarray], fitness: list[float], stderrs: list[float], ages: list[int]
    ) -> None:
        """See SteadyOptimizer. As little."""

    def favorite(self) -> None:
        """Random search has none."""
        return None

    def beliefs(self, genomes: list[np.ndarray]) -> None:
        """None: it learns nothing."""
        return None
