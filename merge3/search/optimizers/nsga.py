"""NSGA-II and NSGA-III by pymoo, alone and on what surrogates make of noisy estimates."""

from __future__ import annotations

import numpy as np

from merge3.search.optimizers.several import Surrogates, around, box, losses
from merge3.search.pareto import best_first

POOL = 100  # genomes of an assisted population, of which few are asked
ROUNDS = 1  # generations of it on the surrogates' values between two that are asked


def _algorithm(name: str, start, sampling: np.ndarray, seed: int):
    """pymoo's, to be asked and told. sampling: its first generation, float64 [population, d]. Every draw comes from a
    generator of its own, made from the seed."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.algorithms.moo.nsga3 import NSGA3
    from pymoo.core.problem import Problem
    from pymoo.core.termination import NoTermination

    low, high = box(start)
    problem = Problem(n_var=len(low), n_obj=start.objectives, xl=low, xu=high)
    size = len(sampling)
    if name == "nsga2":
        algorithm = NSGA2(pop_size=size, sampling=sampling)
    else:
        algorithm = NSGA3(_directions(start.objectives, size), pop_size=size, sampling=sampling)
    algorithm.setup(problem, termination=NoTermination(), seed=seed, verbose=False)
    return algorithm


def _directions(objectives: int, size: int) -> np.ndarray:
    """As many reference directions as a population of `size` can follow, float64 [n, objectives] (Das, Dennis 1998)."""
    from pymoo.util.ref_dirs import get_reference_directions

    parts = 1
    while len(get_reference_directions("das-dennis", objectives, n_partitions=parts + 1)) <= size:
        parts += 1
    return get_reference_directions("das-dennis", objectives, n_partitions=parts)


class NSGA:
    """NSGA-II (Deb et al. 2002) or NSGA-III (Deb and Jain 2014). See Optimizer; a generation cut short is left out."""

    def __init__(self, start, name: str):
        self.population = start.population
        sampling = around(start, self.population, np.random.default_rng(start.seed))
        self._algorithm = _algorithm(name, start, sampling, start.seed)

    def ask(self) -> list[np.ndarray]:
        """See Optimizer."""
        self._asked = self._algorithm.ask()
        return [np.array(x, dtype=np.float64) for x in self._asked.get("X")]

    def tell(self, genomes: list[np.ndarray], fitness: np.ndarray, stderrs: np.ndarray) -> None:
        """See Optimizer."""
        if len(genomes) == len(self._asked):
            self._asked.set("F", losses(np.asarray(fitness)))
            self._algorithm.tell(infills=self._asked)

    def favorite(self) -> None:
        """None: a front has no one best."""
        return None

    def beliefs(self, genomes: list[np.ndarray]) -> None:
        """None: it compares, it does not estimate."""
        return None


class AssistedNSGA:
    """NSGA on what surrogates of each objective make of noisy estimates.

    Between two generations that are asked a large population moves on by the surrogates' values, which costs no
    answers, and of what it comes to the best are asked, every other one a step away. It begins anew from its genomes
    each time: what was believed of them before does not count. Tried on made-up fronts (24 genes, nine answers a
    candidate), and no better: more rounds, which follow the surrogates' errors; asking by what is believed plus a
    standard error, which asks for corners that nothing is known of; minus one; parents averaged.
    """

    def __init__(self, start, name: str):
        self.population, self._start, self._name = start.population, start, name
        self._surrogates, self._generation = Surrogates(start), 0
        self._pool = around(start, max(POOL, self.population), np.random.default_rng(start.seed))
        self._next = list(self._pool[: self.population])

    def ask(self) -> list[np.ndarray]:
        """See Optimizer."""
        return list(self._next)

    def tell(self, genomes: list[np.ndarray], fitness: np.ndarray, stderrs: np.ndarray) -> None:
        """See Optimizer. The next generation is found here."""
        self._surrogates.add(np.array(genomes), np.asarray(fitness), np.asarray(stderrs))
        if len(genomes) < self.population:
            return  # the budget's last few: nothing is asked after them
        self._generation += 1
        algorithm = _algorithm(self._name, self._start, self._pool, self._start.seed + self._generation)
        for _ in range(1 + ROUNDS):  # the first is the population's own
            asked = algorithm.ask()
            asked.set("F", -self._surrogates.predict(asked.get("X"))[0])
            algorithm.tell(infills=asked)
        self._pool = np.array(algorithm.pop.get("X"), dtype=np.float64)
        values, _ = self._surrogates.predict(self._pool)
        best = self._pool[best_first(values)[: self.population]]
        # Half of them steps away: candidates that are all alike tell the surrogates nothing of what genes do.
        rng, (low, high) = np.random.default_rng([self._start.seed, self._generation]), box(self._start)
        scale = self._start.sigma * (high - low) * rng.uniform(0, 1.5, (len(best), 1))
        steps = rng.normal(size=best.shape) * scale * (np.arange(len(best)) % 2)[:, None]
        self._next = list(np.clip(best + steps, low, high))

    def favorite(self) -> None:
        """None: a front has no one best."""
        return None

    def beliefs(self, genomes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The surrogates'."""
        return self._surrogates.predict(np.array(genomes))
