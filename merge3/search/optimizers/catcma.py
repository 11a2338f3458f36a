"""CatCMA with margin (Hamano et al. 2025), by `cmaes`: bits as probabilities, numbers as CMA-ES has them."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from merge3.errors import Unavailable

if TYPE_CHECKING:
    from merge3.search.optimizers import Start


class CatCMA:
    """See Optimizer. A bit is on as often at first as CMA-ES with a threshold at one half would have it on; it is given
    as 0 or 1. Without bits this is CMA-ES."""

    def __init__(self, start: Start):
        try:
            from cmaes import CatCMAwM
        except ImportError:
            hint = "pip install 'merge3-gpu[pareto]'"
            raise Unavailable("optimizer: catcma", "cmaes is not installed", "the extra `pareto`", hint) from None
        self.population = start.population
        self._bits = np.zeros(len(start.initial), dtype=bool) if start.bits is None else start.bits
        settings: dict = {"population_size": start.population, "seed": start.seed}
        if self._bits.any():
            on = [NormalDist(0.5, start.sigma).cdf(value) for value in start.initial[self._bits].tolist()]
            least = 1 / len(on) / 4  # nothing is sure before anything is known
            on = np.clip(on, least, 1 - least)
            settings |= {"c_space": [2] * len(on), "cat_param": np.stack([1 - on, on], axis=1)}
        if not self._bits.all():
            low, high = start.low[~self._bits], start.high[~self._bits]
            span = np.where(np.isfinite(high - low), high - low, 1.0)
            settings |= {
                "x_space": np.stack([low, high], axis=1),
                "mean": start.initial[~self._bits].copy(),
                "cov": np.diag(span**2),
                "sigma": start.sigma,
            }
        self._start, self._strategy = start, CatCMAwM(**settings)
        self._asked: list = []
        self._sent: dict[bytes, Any] = {}  # genome -> the sample it is

    def ask(self) -> list[np.ndarray]:
        """See Optimizer. The start is a candidate like any other, so a run never ends below it."""
        begun = bool(self._asked)
        self._asked = [self._strategy.ask() for _ in range(self.population)]
        if not begun:
            on = self._start.initial[self._bits] > 0.5
            numbers = self._start.initial[~self._bits] if not self._bits.all() else None
            bits = np.stack([~on, on], axis=1) if self._bits.any() else None
            self._asked[0] = replace(self._asked[0], x=numbers, c=bits, _v_raw=numbers)
        genomes = [self._genome(s.x, None if s.c is None else s.c[:, 1]) for s in self._asked]
        self._sent |= {genome.tobytes(): sample for genome, sample in zip(genomes, self._asked)}
        return genomes

    def tell(self, genomes: list[np.ndarray], fitness: list[float], stderrs: list[float]) -> None:
        """See Optimizer. A generation cut short is left out. Only the order of candidates counts, of equals that of the
        generation."""
        self._tell(self._asked, fitness)
        self._sent.clear()

    def tell_arrived(
        self, genomes: list[np.ndarray], fitness: list[float], stderrs: list[float], ages: list[int]
    ) -> None:
        """See SteadyOptimizer. A late one's numbers count as if they lay no further from the mean than samples do; see
        CMA.tell_arrived."""
        samples = [self._sent.get(genome.tobytes()) for genome in genomes]
        if None in samples:
            return  # the search's last word is no sample, and nothing is asked after it
        self._tell([self._near(one) if age else one for one, age in zip(samples, ages)], fitness)

    def _tell(self, samples: list, fitness: list[float]) -> None:
        if len(fitness) != self.population:
            return
        losses = [math.inf if math.isnan(f) else -f for f in fitness]
        ranks = np.empty(len(losses))
        ranks[np.argsort(losses, kind="stable")] = np.arange(len(losses))
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            self._strategy.tell(list(zip(samples, ranks.tolist())))

    def _near(self, sample: Any) -> Any:
        """The sample, its numbers drawn towards the mean where they lie far from it, as pycma has it."""
        if sample._v_raw is None:
            return sample
        B, D = self._strategy._eigen_decomposition()
        step = sample._v_raw - self._strategy._mean
        length = float(np.linalg.norm(B.T @ step / D)) / self._strategy._sigma
        most = math.sqrt(len(step)) + 2 * len(step) / (len(step) + 2)
        return sample if length <= most else replace(sample, _v_raw=self._strategy._mean + step * most / length)

    def favorite(self) -> np.ndarray:
        """The mean of its numbers, and every bit as it mostly is."""
        numbers = bits = None  # cmaes has no public name for either
        if not self._bits.all():
            numbers = np.clip(self._strategy._mean, self._start.low[~self._bits], self._start.high[~self._bits])
        if self._bits.any():
            bits = self._strategy._q[:, 1] > 0.5
        return self._genome(numbers, bits)

    def beliefs(self, genomes: list[np.ndarray]) -> None:
        """None: it compares, it does not estimate."""
        return None

    def _genome(self, numbers: np.ndarray | None, bits: np.ndarray | None) -> np.ndarray:
        genome = np.empty(len(self._bits))
        if bits is not None:
            genome[self._bits] = bits
        if numbers is not None:
            genome[~self._bits] = numbers
        return genome
