"""What the stages of a search share: one value, made once, instead of arguments carried from function to function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from merge3.engine import Engine, Subject, Taken
from merge3.fitness import Answered, lengths_needed, signs
from merge3.irt.estimation import Estimator
from merge3.recipe import Recipe
from merge3.registration import ACCURACY, Registration
from merge3.search.config import EvolveConfig
from merge3.search.journal import Journal
from merge3.search.questions import Questions
from merge3.search.seeds import Seed, seed_of
from merge3.space import Space, cost_of
from merge3.tasks import Item, LogitsError


@dataclass
class Progress:
    """Told to `report` after every candidate. best, best_stderr, mean: of the first objective. round, rounds: of a
    search in rounds, which one this is of; later: candidates of those to come."""

    generation: int = 0
    done: int = 0
    budget: int = 0
    best: float = float("nan")
    best_stderr: float = float("nan")
    mean: float = float("nan")
    item_answers: int = 0
    full_answers: int = 0
    failed: int = 0
    seconds: float = 0.0
    replayed: int = 0
    stage: str = "search"
    round: int = 1
    rounds: int = 1
    later: int = 0


def under_way(workers: int) -> int:
    """How many questions keep as many workers busy: one for each, and some that are there already when one is done."""
    return workers + max(1, workers // 4)


@dataclass(frozen=True)
class Search:
    """A run under way. report: told of progress; stop: asked whether to leave early (the journal has it all).
    start: the genome that `genome.start` comes to, see start.py; None for the space's own. steps: how much longer every
    gene's are, float64 [genes], see prior.py; None: alike. workers: that the run counts on, see steady.py. round: from
    0."""

    config: EvolveConfig
    questions: Questions
    engine: Engine
    space: Space
    journal: Journal
    report: Callable[[Progress], None] = lambda progress: None
    stop: Callable[[], bool] = lambda: False
    start: np.ndarray | None = None
    steps: np.ndarray | None = None
    workers: int = 1
    round: int = 0

    @property
    def initial(self) -> np.ndarray:
        """The genome that a search without random_init begins at."""
        return self.space.initial() if self.start is None else self.start

    @property
    def weights(self) -> Mapping[str, float]:
        """Task -> its weight in the accuracy."""
        return self.questions.weights

    @property
    def objectives(self) -> tuple[str, ...]:
        """Their names."""
        return self.config.names

    @property
    def fronts(self) -> bool:
        """Whether the run ends with a front, rather than with the merge that is most accurate."""
        return self.objectives != (ACCURACY,)

    @property
    def signs(self) -> np.ndarray:
        """What makes more the better of every objective's values, float64 [objectives]."""
        return signs(self.objectives)

    def seed(self, stream: str, *at: int) -> Seed:
        """Of a random stream; see seeds.py."""
        return seed_of(stream, self.config.optimizer.seed, *at)

    def asks(self, items: Iterable[Item], estimators: Mapping[str, Estimator] | None = None) -> Registration:
        """The run's question with these items. estimators: none for the plain mean."""
        asked = self.questions
        return Registration(
            tuple(items),
            self.space.definition,
            asked.heads,
            asked.weights,
            estimators or {},
            self.config.names,
            self.config.optimizer.seed,
            asked.chat,
            asked.judges,
        )

    def exported(self, subject: Subject) -> Subject:
        """A subject as it is measured at the end of a run: a recipe of experts as their files have them, however the
        pool holds them, since that is what its export reads."""
        compacted = self.engine.info().experts != "full"
        return Taken(subject, True) if compacted and isinstance(subject, Recipe) else subject

    def answers(self, subject: Subject, items: Iterable[Item]) -> np.ndarray:
        """One subject's responses to any items, float64 [items]. Raises BadInput (LogitsError) where it has none."""
        (evaluation,) = self.engine.evaluate(self.asks(items), [subject])
        return evaluation.answers()

    def solved(self, subject: Subject, items: Iterable[Item]) -> np.ndarray:
        """`answers` of a candidate that answered all it was asked before: what it cannot answer it has not solved."""
        items = list(items)
        try:
            return self.answers(subject, items)
        except LogitsError:
            return np.zeros(len(items))

    def answered(self, subject: Subject, items: Iterable[Item]) -> np.ndarray:
        """The same with what else objectives are made of, as the journal holds it and `Search.read` reads it:
        responses, and where an objective needs them lengths, float64 [items] or [2, items]."""
        asked = self.asks(items)
        (evaluation,) = self.engine.evaluate(asked, [subject])
        responses = evaluation.answers()
        return np.stack([responses, evaluation.lengths]) if lengths_needed(asked) else responses

    def read(self, answers: np.ndarray, count: int, subject: Subject | None = None) -> Answered:
        """What the subject `answered` to that many items. None: one that costs as much as the base."""
        rows = answers.reshape(-1, count)
        recipe = subject.subject if isinstance(subject, Taken) else subject
        cost = cost_of(self.space, recipe) if isinstance(recipe, Recipe) else 1.0
        return Answered(rows[0], rows[1] if len(rows) > 1 else None, cost)
