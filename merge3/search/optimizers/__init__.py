"""Optimizers behind one ask/tell interface. Each is rebuilt from its seed and told the same results to
resume, so nothing but the journal is ever stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import numpy as np

from merge3.errors import Unavailable
from merge3.search.optimizers.catcma import CatCMA
from merge3.search.optimizers.cma import CMA, AssistedCMA
from merge3.search.optimizers.como import Como
from merge3.search.optimizers.nsga import NSGA, AssistedNSGA
from merge3.search.optimizers.random import RandomSearch


class Optimizer(Protocol):
    """Maximises, generation by generation. population: genomes of one.

    Of several objectives, fitness and standard errors are float64 [C, objectives], all to be maximised.
    """

    population: int

    def ask(self) -> list[np.ndarray]:
        """The next generation: float64 [d] each."""

    def tell(self, genomes: list[np.ndarray], fitness: list[float], stderrs: list[float]) -> None:
        """Their fitness (NaN: failed) and its standard errors, in one order; the last generation may be shorter."""

    def favorite(self) -> np.ndarray | None:
        """The genome it believes in most; None where it believes in none."""

    def beliefs(self, genomes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
        """(value, stderr) of any genomes, each [C], or [C, objectives]; None where it only ranks."""


class SteadyOptimizer(Optimizer, Protocol):
    """One that may be asked for more before it is told, and is then told whatever has come."""

    def tell_arrived(
        self, genomes: list[np.ndarray], fitness: list[float], stderrs: list[float], ages: list[int]
    ) -> None:
        """As many as a generation has, in the order in which they came. ages: how often it was told anything since each
        was asked, 0 for those of the last `ask`. Another number of them: the last ones, nothing is asked after them."""


@dataclass(frozen=True)
class Start:
    """What every optimizer is made from. initial, low, high: float64 [d]; sigma: the first step, a share of each gene's
    range; population: of a generation; assisted: whether estimates are noisy enough for a surrogate to pay; given:
    whether somebody chose `initial`, which is then the first candidate, close to a bound too. bits: which genes are on
    above one half and else off, bool [d]; None: none. objectives: how many. steps: how much longer each gene's first
    ones are, float64 [d]; None: alike."""

    initial: np.ndarray
    low: np.ndarray
    high: np.ndarray
    sigma: float
    population: int
    seed: int
    assisted: bool = False
    given: bool = False
    bits: np.ndarray | None = None
    objectives: int = 1
    steps: np.ndarray | None = None


@dataclass(frozen=True)
class Kind:
    """make: from a start. least, most: objectives that it takes, None for any number. packages: what it needs of the
    extra `pareto`; their versions are part of what a run is. steps: whether it takes some that differ by gene; steady:
    whether it makes a SteadyOptimizer."""

    make: Callable[[Start], Optimizer]
    least: int = 1
    most: int | None = 1
    packages: tuple[str, ...] = ()
    steps: bool = False
    steady: bool = False

    def takes(self) -> str:
        """How many objectives, in words."""
        if self.most is None:
            return "any number of objectives" if self.least < 2 else f"{self.least} objectives or more"
        return "one objective" if self.most == 1 else f"{self.most} objectives"


def _cma(start: Start) -> Optimizer:
    kind = AssistedCMA if start.assisted else CMA
    how = start.sigma, start.population, start.seed, start.given, start.steps
    return kind(start.initial, start.low, start.high, *how)


def _random(start: Start) -> Optimizer:
    return RandomSearch(start.initial, start.low, start.high, start.sigma, start.population, start.seed)


def _nsga(name: str) -> Callable[[Start], Optimizer]:
    return lambda start: (AssistedNSGA if start.assisted else NSGA)(start, name)


OPTIMIZERS: dict[str, Kind] = {
    "cma": Kind(_cma, steps=True, steady=True),
    "random": Kind(_random, most=None, steady=True),
    "catcma": Kind(CatCMA, packages=("cmaes",), steady=True),
    "nsga2": Kind(_nsga("nsga2"), least=2, most=None, packages=("pymoo",)),
    "nsga3": Kind(_nsga("nsga3"), least=2, most=None, packages=("pymoo",)),
    "como": Kind(Como, least=2, most=2, packages=("cmaes",)),
}


def check_installed(name: str) -> None:
    """Raises Unavailable for an optimizer whose packages are not there."""
    for package in OPTIMIZERS[name].packages:
        if find_spec(package) is None:
            hint = "pip install 'merge3-gpu[pareto]'"
            raise Unavailable(f"optimizer {name}", f"{package} is not installed", "the extra `pareto`", hint)


def usual_population(size: int) -> int:
    """4 + 3 ln d (Hansen, The CMA evolution strategy: a tutorial, equation 48)."""
    return 4 + int(3 * math.log(size))


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
    objectives: int = 1,
    steps: np.ndarray | None = None,
) -> Optimizer:
    """An optimizer by its name in OPTIMIZERS. population: None for the usual one. The others: see Start."""
    count = population or usual_population(len(initial))
    start = Start(initial, low, high, sigma, count, seed, assisted, given, bits, objectives, steps)
    return OPTIMIZERS[name].make(start)
