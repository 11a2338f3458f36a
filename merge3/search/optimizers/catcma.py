"""CatCMA with margin (Hamano et al. 2025), by `cmaes`: bits as probabilities, numbers as CMA-ES has them."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from statistics import NormalDist
from typing import TYPE_CHECKING

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

    def ask(self) -> list[np.ndarray]:
        """See Optimizer. The start is a candidate like any other, so a run never ends below it."""
        begun = bool(self._asked)
        self._asked = [self._strategy.ask() for _ in range(self.population)]
        if not begun:
            on = self._start.initial[self._bits] > 0.5
            numbers = self._start.initial[~self._bits] if not self._bits.all() else None
            bits = np.stack([~on, on], axis=1) if self._bits.any() else None
            self._asked[0] = replace(self._asked[0], x=numbers, c=bits, _v_raw=numbers)
        return [self._genome(s.x, None if s.c is None else s.c[:, 1]) for s in self._asked]

    def tell(self, genomes: list[np.ndarray], fitness: list[float], stderrs: list[float]) -> None:
        """See Optimizer. A generation cut short is left out. Only the order of candidates counts, of equals that of the
        generation."""
        if len(genomes) < self.population:
            return
        losses = [math.inf if math.isnan(f) else -f for f in fitness]
        ranks = np.empty(len(losses))
        ranks[np.argsort(losses, kind="stable")] = np.arange(len(losses))
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            self._strategy.tell(list(zip(self._asked, ranks.tolist())))

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
