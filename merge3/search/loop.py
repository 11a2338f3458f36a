"""The generations of a search: ask, evaluate, journal, tell.

Resume is replay: the optimizer is rebuilt from its seed and told the journal's fitness again, and
candidates of an unfinished generation that are already answered are not asked twice. Nothing here
knows whether the engine is in this process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from merge3.engine import Evaluation
from merge3.errors import ConfigError, ResumeMismatch
from merge3.search import optimizers
from merge3.search.asking import Asking, due, renew
from merge3.search.context import Progress, Search
from merge3.search.journal import Candidate, Journal


def search_generations(asking: Asking, first: int = 0) -> optimizers.Optimizer | None:
    """Spend the budget; the optimizer as it was left. None if stopped. first: the number of its first generation in
    the journal.

    Raises ConfigError for a generation of which no candidate can be evaluated.
    """
    search = asking.search
    budget, full = search.config.optimizer.budget, search.config.optimizer.budget * len(search.questions.search)
    optimizer, registration, host = make_optimizer(search), asking.registration(), search.engine.info().host
    told = Told(search, Progress(budget=budget, item_answers=asking.answers, full_answers=full))
    generation = first
    while told.progress.done < budget:
        genomes = asked = _asked(optimizer, budget - told.progress.done)
        if generation == first and search.start is not None:  # as it was given, whatever the optimizer makes of it
            genomes = [search.start, *asked[1:]]
        asking.asked[generation], answered = asking.subset, search.journal.generation(generation)
        _check_replay(search.journal, answered, genomes, generation)
        for position in sorted(answered):
            told.of(answered[position], replayed=True)
        pending = [p for p in range(len(genomes)) if p not in answered]
        if pending:  # a replayed generation asks nothing
            for evaluation in search.engine.evaluate(registration, [genomes[p] for p in pending]):
                position = pending[evaluation.index]
                candidate = candidate_of(generation, position, genomes[position], evaluation, host)
                search.journal.append(candidate)
                answered[position] = candidate
                told.of(candidate)
                if search.stop():
                    return None
        fitness, stderrs = fitness_of(generation, answered, len(genomes), search.signs)
        told.progress.mean = float(np.nanmean([answered[p].value for p in range(len(genomes))]))
        optimizer.tell(asked, fitness, stderrs)
        generation += 1
        if told.progress.done < budget and due(asking, generation, genomes, answered):
            renew(asking)
            registration = asking.registration()
    return optimizer


def make_optimizer(search: Search) -> optimizers.Optimizer:
    """The configuration's, at the search's start (a random one with random_init)."""
    settings, (low, high) = search.config.optimizer, search.space.bounds()
    start = search.initial
    if search.config.random_init:
        lowest, highest = np.where(np.isfinite(low), low, 0), np.where(np.isfinite(high), high, 1)
        start = np.random.default_rng(search.seed("start")).uniform(lowest, highest)
    assisted = search.questions.policy.subset if settings.surrogate == "auto" else settings.surrogate
    seed, given = search.seed("optimizer", search.round), search.start is not None
    bits, objectives = getattr(search.space, "bits", None), len(search.objectives)
    how = settings.sigma, settings.population, seed, assisted, given, bits, objectives, search.steps
    return optimizers.make(settings.name, start, low, high, *how)


def _asked(optimizer: optimizers.Optimizer, left: int) -> list[np.ndarray]:
    """The next generation, cut to the budget; the search's last word is its distribution's mean."""
    genomes = optimizer.ask()[:left]
    if len(genomes) == left and (favorite := optimizer.favorite()) is not None:
        genomes[-1] = favorite
    return genomes


def candidate_of(generation: int, position: int, genome: np.ndarray, found: Evaluation, host: str) -> Candidate:
    """What the journal holds of an evaluation."""
    return Candidate(
        generation,
        position,
        genome,
        found.recipe_hash,
        found.responses,
        found.objectives,
        found.values,
        found.stderrs,
        found.seconds,
        found.swap_seconds,
        host,
        str(found.error) if found.error else None,
    )


def fitness_of(generation: int, answered: dict[int, Candidate], count: int, signs: np.ndarray):
    """What the optimizer is told: (fitness, NaN for a candidate that failed; standard errors), lists of numbers, or of
    several objectives float64 [count, objectives]."""
    values = np.array([answered[p].values for p in range(count)]) * signs
    stderrs = np.array([answered[p].stderrs for p in range(count)])
    if np.isnan(values).any(1).all():
        found = f"every candidate failed ({answered[0].error})"
        raise ConfigError(f"generation {generation}", found, "at least one that can be evaluated")
    return (values[:, 0].tolist(), stderrs[:, 0].tolist()) if len(signs) == 1 else (values, stderrs)


def _check_replay(
    journal: Journal, answered: dict[int, Candidate], genomes: Sequence[np.ndarray], generation: int
) -> None:
    for position, candidate in answered.items():
        if position >= len(genomes) or not np.array_equal(candidate.genome, genomes[position]):
            raise not_asked(journal, candidate)


def not_asked(journal: Journal, candidate: Candidate) -> ResumeMismatch:
    """Of one in the journal that the optimizer, rebuilt, does not ask."""
    found = f"candidate {candidate.position} of generation {candidate.generation} is not what the optimizer asks now"
    return ResumeMismatch(journal.directory, found, "the libraries (cma, numpy) the run began with")


class Told:
    """Progress as it grows, told after every candidate that was not in the journal."""

    def __init__(self, search: Search, progress: Progress):
        self.search, self.progress, self.began = search, progress, time.perf_counter()
        self.best: Candidate | None = None

    def of(self, candidate: Candidate, replayed: bool = False) -> None:
        """Another candidate."""
        progress = self.progress
        progress.done += 1
        progress.replayed += replayed
        progress.item_answers += 0 if candidate.responses is None else len(candidate.responses)
        progress.failed += candidate.error is not None
        # Ties go to the earlier candidate, so that a resumed run has the same winner.
        sign = self.search.signs[0]
        if not math.isnan(candidate.value) and (self.best is None or sign * candidate.value > sign * self.best.value):
            self.best = candidate
            progress.best, progress.best_stderr = candidate.value, candidate.stderr
        if not replayed:
            progress.generation = max(progress.generation, candidate.generation)
            progress.seconds = time.perf_counter() - self.began
            self.search.report(progress)
