"""A search in which no worker waits for a generation's slowest candidate: the next one is asked when one is answered.

A few more candidates than there are workers are under way at all times. When as many have come as a generation has,
whichever they are, the optimizer is told them, and what is asked next comes from what it makes of them. So what is
asked follows from the order in which candidates came, and from nothing else: the journal keeps that order, and a
resumed run repeats it. What was under way when a run ended is asked again, in the order in which it was asked.

A candidate's generation is how often the optimizer had been told when it was asked, its position its place among those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from merge3.engine import Question
from merge3.errors import ResumeMismatch
from merge3.registration import Registration
from merge3.search.asking import Asking, due, renew
from merge3.search.context import Progress, Search, under_way
from merge3.search.journal import Candidate
from merge3.search.loop import Told, candidate_of, fitness_of, make_optimizer, not_asked
from merge3.search.optimizers import OPTIMIZERS, SteadyOptimizer

WORKERS = "workers"  # what the journal calls them


def in_flight(search: Search) -> int | None:
    """How many candidates are under way at once; None: it goes a generation at a time. The fewer, the more is known
    when the next is asked."""
    settings = search.config.optimizer
    if settings.asking == "generations" or not OPTIMIZERS[settings.name].steady:
        return None
    if settings.asking == "auto" and search.workers < 2:
        return None
    return under_way(search.workers)


def begun_with(search: Search) -> Search:
    """The search with the workers that its run counts on: its engine's when it began, wherever it goes on."""
    known, journal = search.journal.identity(), search.journal
    if not journal.begun or known.get("config") != search.config.hash():
        return replace(search, workers=search.engine.info().workers)
    if not known.get(WORKERS, "1").isdecimal():
        raise ResumeMismatch(journal.directory, f"{WORKERS} is {known[WORKERS]!r} in its journal", "a number")
    return replace(search, workers=int(known.get(WORKERS, "1")))


def steady_identity(search: Search) -> dict[str, str]:
    """What of a run's identity it is that it asks steadily; nothing where it does not."""
    stages = [search.config.of_stage(number) for number in range(len(search.config.stages) or 1)]
    found = [in_flight(replace(search, config=config)) for config in stages]
    if not any(found):
        return {}
    return {WORKERS: str(search.workers), "in flight": ", ".join(str(count or "a generation") for count in found)}


def search_steadily(asking: Asking, first: int = 0) -> SteadyOptimizer | None:
    """Spend the budget; see search_generations, whose errors it raises."""
    search, course = asking.search, _Course(asking, first)
    many, host = in_flight(search), search.engine.info().host
    search.report(Progress(stage="steady", budget=course.budget))
    waiting = {asked.at: asked for asked in islice(course.questions(), many)}
    for candidate in search.journal.arrived(first)[: course.budget]:
        asked = waiting.pop((candidate.generation, candidate.position), None)
        if asked is None or not np.array_equal(asked.genome, candidate.genome):
            raise not_asked(search.journal, candidate)
        course.came(asked, candidate, replayed=True)
        waiting |= {asked.at: asked for asked in islice(course.questions(), 1)}
    sent: list[_Asked] = []

    def questions() -> Iterator[Question]:
        for asked in chain(waiting.values(), course.questions()):
            sent.append(asked)
            yield asked.registration, asked.genome

    with closing(search.engine.evaluate_each(questions(), many)) as evaluations:
        for evaluation in evaluations:
            asked = sent[evaluation.index]
            candidate = candidate_of(*asked.at, asked.genome, evaluation, host)
            search.journal.append(candidate)
            course.came(asked, candidate)
            if search.stop():
                return None
    course.end()
    return course.optimizer


class _Asked(NamedTuple):
    """A candidate under way. at: generation and position; sample: what the optimizer asked, which is not always what is
    evaluated."""

    at: tuple[int, int]
    sample: np.ndarray
    genome: np.ndarray
    registration: Registration


class _Course:
    """What is asked next, and what the optimizer is told: the same for the same order of arrival."""

    def __init__(self, asking: Asking, first: int):
        self.asking, self.search = asking, asking.search
        self.optimizer: SteadyOptimizer = make_optimizer(self.search)
        self.budget = self.search.config.optimizer.budget
        full = self.budget * len(self.search.questions.search)
        progress = Progress(budget=self.budget, item_answers=asking.answers, full_answers=full)
        self._told = Told(self.search, progress)
        self._first = self._generation = first
        self._registration = asking.registration()
        asking.asked[first] = asking.subset
        self._samples: list[np.ndarray] = []  # that the optimizer gave and nobody was asked yet
        self._size, self._position, self._count = 0, 0, 0
        self._came: list[tuple[_Asked, Candidate]] = []  # since it was told

    def questions(self) -> Iterator[_Asked]:
        """What is asked now, then after the next arrival, and so on to the end of the budget."""
        while self._count < self.budget:
            yield self._next()

    def _next(self) -> _Asked:
        if not self._samples:
            self._samples = self.optimizer.ask()
            self._size = len(self._samples)
        sample = genome = self._samples.pop(0)
        self._count += 1
        if self._count == self.budget and (favorite := self.optimizer.favorite()) is not None:
            sample = genome = favorite  # the search's last word
        if self._count == 1 and self.search.start is not None:  # as it was given, whatever the optimizer makes of it
            genome = self.search.start
        self._position += 1
        return _Asked((self._generation, self._position - 1), sample, genome, self._registration)

    def came(self, asked: _Asked, candidate: Candidate, replayed: bool = False) -> None:
        """The next arrival."""
        self._told.of(candidate, replayed)
        self._came.append((asked, candidate))
        if len(self._came) == self._size and self._count < self.budget:
            self._tell()
            self._renew()
            self._came = []

    def end(self) -> None:
        """All have come: tell the last ones, if any of them is known."""
        if any(not np.isnan(c.values).any() for _, c in self._came) or self._generation == self._first:
            self._tell()

    def _tell(self) -> None:
        answered = dict(enumerate(candidate for _, candidate in self._came))
        fitness, stderrs = fitness_of(self._generation, answered, len(answered), self.search.signs)
        ages = [self._generation - asked.at[0] for asked, _ in self._came]
        self.optimizer.tell_arrived([asked.sample for asked, _ in self._came], fitness, stderrs, ages)
        self._told.progress.mean = float(np.nanmean([c.value for c in answered.values()]))
        self._generation, self._position, self._samples = self._generation + 1, 0, []

    def _renew(self) -> None:
        """As many as a generation have come: the items of the next may be others. Those under way keep theirs."""
        now = [c for a, c in self._came if a.registration is self._registration and not np.isnan(c.value)]
        checked = now or [candidate for _, candidate in self._came]
        if due(self.asking, self._generation, [c.genome for c in checked], dict(enumerate(checked))):
            renew(self.asking)
            self._registration = self.asking.registration()
        self.asking.asked[self._generation] = self.asking.subset
