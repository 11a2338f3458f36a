"""CMA-ES, alone and on what a surrogate makes of noisy estimates."""

from __future__ import annotations

import contextlib
import math
import warnings

import numpy as np

from merge3.search.surrogate import Surrogate

POOL = 200  # genomes of an assisted generation, of which few are asked


class CMA:
    """CMA-ES by pycma (Hansen & Ostermeier 2001). Maximises; a NaN fitness counts as the worst."""

    def __init__(self, initial, low, high, sigma: float, population: int, seed: int, given: bool = False, steps=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it misses matplotlib, which nobody here asks for
            import cma
        self.population = population
        finite = np.isfinite(high - low)
        scale = np.where(finite, np.where(finite, high - low, 1.0), 1.0)
        if steps is not None:
            scale = scale * steps
        options = {
            "popsize": population,
            "bounds": [np.where(finite, low, -np.inf).tolist(), np.where(finite, high, np.inf).tolist()]
            if finite.any()
            else [None, None],
            "CMA_stds": scale.tolist(),
            "seed": seed + 1,  # pycma takes 0 for the time of day
            "verbose": -9,
            "verb_log": 0,
            "verb_disp": 0,
            "signals_filename": "",
            # The budget is ours: a plateau of equal fitness must not end a run.
            "tolfun": 0,
            "tolfunhist": 0,
            "tolflatfitness": np.inf,
            "tolstagnation": np.inf,
            "tolx": 0,
            "maxiter": np.inf,
        }
        # pycma draws from numpy's global generator; this keeps its stream apart from everyone else's.
        self._state = np.random.RandomState(seed + 1).get_state()
        with self._own_random(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._strategy = cma.CMAEvolutionStrategy(list(initial), sigma, options)
            # The start is a candidate like any other, so a run never ends below the uniform merge.
            # A given one in the strategy's own coordinates, which are bent near bounds; the others stay what they
            # were, for the sake of runs that have begun.
            self._strategy.inject([self._strategy.mean.copy() if given else list(initial)], force=True)

    def ask(self) -> list[np.ndarray]:
        """See Optimizer."""
        with self._own_random():
            return [np.asarray(x, dtype=np.float64) for x in self._strategy.ask()]

    def tell(self, genomes: list[np.ndarray], fitness: list[float], stderrs: list[float]) -> None:
        """See Optimizer. A generation cut short is left out."""
        if len(genomes) != self.population:
            return  # the budget's last few: nothing is asked after them
        known = [f for f in fitness if not math.isnan(f)]
        worst = min(known, default=0.0) - 1.0
        losses = [-(worst if math.isnan(f) else f) for f in fitness]
        with self._own_random(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._strategy.tell(genomes, losses)

    def tell_arrived(
        self, genomes: list[np.ndarray], fitness: list[float], stderrs: list[float], ages: list[int]
    ) -> None:
        """See SteadyOptimizer. pycma knows by itself which are of an earlier distribution: they count as if they lay no
        further from the mean than this one's samples do (Hansen 2011, Injecting external solutions into CMA-ES)."""
        self.tell(genomes, fitness, stderrs)

    def favorite(self) -> np.ndarray:
        """The mean of the distribution: under noise better than its best sample (Hansen, The CMA evolution
        strategy: a tutorial, section B.3)."""
        return np.asarray(self._strategy.result.xfavorite, dtype=np.float64)

    def beliefs(self, genomes: list[np.ndarray]) -> None:
        """None: it compares, it does not estimate."""
        return None

    @contextlib.contextmanager
    def _own_random(self):
        outside = np.random.get_state()
        np.random.set_state(self._state)
        try:
            yield
        finally:
            self._state = np.random.get_state()
            np.random.set_state(outside)


class AssistedCMA(CMA):
    """CMA-ES on what a surrogate makes of noisy estimates.

    Of each generation's many genomes few are asked; the strategy is told the surrogate's values of all. So
    selection sees what all generations have in common rather than one candidate's luck, and a large
    population, which noise calls for (Arnold and Beyer 2002), costs no answers.
    """

    def __init__(self, initial, low, high, sigma: float, population: int, seed: int, given: bool = False, steps=None):
        super().__init__(initial, low, high, sigma, max(POOL, population), seed, given, steps)
        self._asked = population
        self._surrogate, self._told = Surrogate(low, high, sigma, steps), 0

    def ask(self) -> list[np.ndarray]:
        """See Optimizer. As many of the strategy's generation as are to be asked."""
        self._pool = super().ask()
        return self._pool[: self._asked]

    def tell(self, genomes: list[np.ndarray], fitness: list[float], stderrs: list[float]) -> None:
        """See Optimizer. The strategy is told what the surrogate makes of its whole generation."""
        self._surrogate.add(np.array(genomes), np.array(fitness), np.array(stderrs))
        values = self._surrogate.predict(np.array(self._pool))[0]
        values[: len(genomes)][np.isnan(fitness)] = np.nan
        super().tell(self._pool, values.tolist(), [])

    def tell_arrived(
        self, genomes: list[np.ndarray], fitness: list[float], stderrs: list[float], ages: list[int]
    ) -> None:
        """See SteadyOptimizer. Only the surrogate is told them: what the strategy is told is its own generation, in
        which nobody is late."""
        asked_in = self._told - np.array(ages)  # those had their items in common
        self._surrogate.add(np.array(genomes), np.array(fitness), np.array(stderrs), generations=asked_in)
        self._told += 1
        values = self._surrogate.predict(np.array(self._pool))[0]
        failed = {genome.tobytes() for genome, value in zip(genomes, fitness) if math.isnan(value)}
        values[[genome.tobytes() in failed for genome in self._pool]] = np.nan
        super().tell(self._pool, values.tolist(), [])

    def beliefs(self, genomes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The surrogate's."""
        return self._surrogate.predict(np.array(genomes))
