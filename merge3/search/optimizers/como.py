"""COMO-CatCMA with margin for two objectives, by cmaes (Hamano et al., arXiv 2504.07884): several CMA-ES, each of which
adds what the others' means leave uncovered of the hypervolume."""

from __future__ import annotations

import numpy as np

from merge3.search.optimizers.several import Surrogates, around, losses

KERNELS = 5  # each a CMA-ES whose mean is one point of the front


class Como:
    """See Optimizer. A generation is what one CMA-ES samples, and means that have moved; the first one has all means.

    Noisy estimates are told as surrogates see them.
    """

    def __init__(self, start):
        from cmaes import CatCMAwM, COMOCatCMAwM

        self.population, self._start = start.population, start
        space = np.stack([start.low, start.high], 1)
        span = start.high - start.low
        step = start.sigma * np.where(np.isfinite(span), span, 1.0)

        def strategy(means: np.ndarray):
            how = {"x_space": space, "cov": np.diag(step**2), "population_size": start.population}
            return COMOCatCMAwM(x_space=space, kernels=[CatCMAwM(mean=mean, **how) for mean in means], seed=start.seed)

        means = around(start, KERNELS, np.random.default_rng(start.seed))
        self._strategy = strategy(means)
        if self._strategy.current_kernel_id == 0:  # whose mean is not asked at first: let the start be another's
            self._strategy = strategy(np.roll(means, 1, axis=0))
        self._surrogates = Surrogates(start) if start.assisted else None
        self._scale: np.ndarray | None = None

    def ask(self) -> list[np.ndarray]:
        """See Optimizer. The start is the first."""
        self._asked = sorted(self._strategy.ask_iter(), key=lambda one: not np.array_equal(one.x, self._start.initial))
        low, high = self._start.low, self._start.high
        return [np.clip(np.array(one.x, dtype=np.float64), low, high) for one in self._asked]

    def tell(self, genomes: list[np.ndarray], fitness: np.ndarray, stderrs: np.ndarray) -> None:
        """See Optimizer."""
        fitness = np.asarray(fitness)
        if self._surrogates is not None:
            self._surrogates.add(np.array(genomes), fitness, np.asarray(stderrs))
            believed = self._surrogates.predict(np.array(genomes))[0]
            fitness = np.where(np.isnan(fitness), np.nan, believed)
        if len(genomes) < len(self._asked):
            return  # the budget's last few: nothing is asked after them
        found = losses(fitness)
        if self._scale is None:  # distances between fronts count, so objectives must be of a size
            self._scale = np.maximum(np.ptp(found, axis=0), 1e-6)
        self._strategy.tell([(one, (row / self._scale).tolist()) for one, row in zip(self._asked, found)])

    def favorite(self) -> None:
        """None: a front has no one best."""
        return None

    def beliefs(self, genomes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
        """The surrogates', where there are any."""
        return None if self._surrogates is None else self._surrogates.predict(np.array(genomes))
