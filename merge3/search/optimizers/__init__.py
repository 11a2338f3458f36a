"""Optimizers behind one ask/tell interface. Each is rebuilt from its seed and told the same results to
resume, so nothing but the journal is ever stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from merge3.search.optimizers.catcma import CatCMA
from merge3.search.optimizers.cma import CMA, AssistedCMA
from merge3.search.optimizers.random import RandomSearch


class Optimizer(Protocol):
    """Maximises, generation by generation. population: genomes of one."""

    population: int

    def ask(self) -> list[np.ndarray]:
        """The next generation: float64 [d] each."""

    def tell(self, genomes: list[np.ndarray], fitness: list[float], stderrs: list[float]) -> None:
        """Their fitness (NaN: failed) and its standard errors, in one order; the last generation may be shorter."""

    def favorite(self) -> np.ndarray | None:
        """The genome it believes in most; None where it believes in none."""

    def beliefs(self, genomes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
        """(value, stderr) of any genomes, each [C]; None where it only ranks."""


@dataclass(frozen=True)
class Start:
    """What every optimizer is made from. initial, low, high: float64 [d]; sigma: the first step, a share of each gene's
    range; population: of a generation; assisted: whether estimates are noisy enough for a surrogate to pay; given:
    whether somebody chose `initial`, which is then the first candidate, close to a bound too. bits: which genes are on
    above one half and else off, bool [d]; None: none."""

    initial: np.ndarray
    low: np.ndarray
    high: np.ndarray
    sigma: float
    population: int
    seed: int
    assisted: bool = False
    given: bool = False
    bits: np.ndarray | None = None


def _cma(start: Start) -> Optimizer:
    kind = AssistedCMA if start.assisted else CMA
    return kind(start.initial, start.low, start.high, start.sigma, start.population, start.seed, start.given)


def _random(start: Start) -> Optimizer:
    return RandomSearch(start.initial, start.low, start.high, start.sigma, start.population, start.seed)


OPTIMIZERS: dict[str, Callable[[Start], Optimizer]] = {"cma": _cma, "random": _random, "catcma": CatCMA}
# Packages whose version is part of what a run is.
PACKAGES = {"catcma": ("cmaes",)}


def make(
    name: str,
    initial: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    sigma: float,
    population: int | None,
    seed: int,
    assisted: bool = False,
    given: bool = False,
    bits: np.ndarray | None = None,
) -> Optimizer:
    """An optimizer by its name in OPTIMIZERS. population: None for 4 + 3 ln d (Hansen, The CMA evolution strategy: a
    tutorial, equation 48). The others: see Start."""
    count = population or 4 + int(3 * math.log(len(initial)))
    return OPTIMIZERS[name](Start(initial, low, high, sigma, count, seed, assisted, given, bits))
