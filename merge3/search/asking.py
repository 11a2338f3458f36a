"""What each candidate is asked and how its answers become fitness; checked, and renewed, during the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from merge3.fitness import estimates
from merge3.irt.estimation import Estimator
from merge3.registration import ACCURACY, Registration
from merge3.search.calibration import Calibration, choose
from merge3.search.context import Search
from merge3.search.gathering import calibrated
from merge3.search.journal import Candidate
from merge3.search.questions import per_task
from merge3.tasks import Item, LogitsError, by_task


class SpotCheck(NamedTuple):
    """A candidate's estimate of an objective beside what further answers make it, each with its standard error."""

    generation: int
    estimate: float
    stderr: float
    mean: float
    mean_stderr: float
    objective: str = ACCURACY

    def squared(self) -> float:
        """Their difference, in standard errors, squared."""
        return (self.estimate - self.mean) ** 2 / max(self.stderr**2 + self.mean_stderr**2, 1e-9)


@dataclass
class Asking:
    """subset: what the next candidates answer; estimators: of each task's accuracy, none for the plain mean.

    draws: how many subsets there were before this one. drifted: generations whose check asked for another subset.
    asked: generation -> the subset that its candidates answer.
    """

    search: Search
    subset: list[Item]
    estimators: dict[str, Estimator] = field(default_factory=dict)
    calibration: Calibration | None = None
    draws: int = 0
    checks: list[SpotCheck] = field(default_factory=list)
    drifted: list[int] = field(default_factory=list)
    asked: dict[int, list[Item]] = field(default_factory=dict)

    def registration(self) -> Registration:
        """What the engine is asked of the next candidates."""
        return self.search.asks(self.subset, self.estimators)

    def unseen(self) -> list[int]:
        """Positions among the search items that the current subset leaves out."""
        asked = {id(item) for item in self.subset}
        return [i for i, item in enumerate(self.search.questions.search) if id(item) not in asked]

    @property
    def answers(self) -> int:
        """What the calibration cost."""
        return self.calibration.answers if self.calibration else 0


def prepare(search: Search) -> Asking | None:
    """Calibrate where the estimator needs it, and choose the first subset. None if stopped."""
    questions, extract = search.questions, search.config.extract
    if questions.policy.estimate == "mean":
        return Asking(search, questions.subset)
    calibration = calibrated(search)
    if calibration is None:
        return None
    chosen, estimators = _chosen(search, calibration, draws=0, anywhere=bool(extract.renew))
    return Asking(search, chosen, estimators, calibration)


def renew(asking: Asking) -> None:
    """Draw the next subset."""
    search = asking.search
    asking.draws += 1
    if asking.calibration is not None:
        asking.subset, asking.estimators = _chosen(search, asking.calibration, asking.draws, anywhere=True)
        return
    rng = np.random.default_rng(search.seed("subset", asking.draws))
    asking.subset = per_task(search.questions.search, search.config.extract.size, rng)


def due(asking: Asking, generation: int, genomes: Sequence[np.ndarray], answered: dict[int, Candidate]) -> bool:
    """Whether the next generation is asked other items: by schedule, or because a spot check of the generation just
    answered says so."""
    config, drifted = asking.search.config, False
    every, renewed = config.estimate.check_every, config.extract.renew
    if asking.estimators and every and generation % every == 0:
        drifted = check(asking, generation - 1, genomes, answered)
    scheduled = asking.search.questions.policy.subset and renewed and generation % renewed == 0
    return drifted or bool(scheduled)


def check(asking: Asking, generation: int, genomes: Sequence[np.ndarray], answered: dict[int, Candidate]) -> bool:
    """Spot check: a random candidate of the generation answers as many items again that it was not asked.

    Returns whether the last three checks together are further from the estimates than the estimates' own
    standard errors allow (mean z² above 4, over all objectives): then it is time for another subset.
    """
    search = asking.search
    rng = np.random.default_rng(search.seed("spot check", generation))
    known = [p for p in range(len(genomes)) if not np.isnan(answered[p].value)]
    candidate = answered[known[int(rng.integers(len(known)))]]
    positions = _further(asking, rng)
    if not positions:
        return False
    asked = [search.questions.search[i] for i in positions]
    recipe = search.space.recipe(candidate.genome)
    try:
        answers = search.journal.remember("check", f"{generation}", positions, lambda: search.answered(recipe, asked))
    except LogitsError:  # it has no answer to these items: nothing to compare its estimate with
        return False
    means = estimates(search.asks(asked), search.read(answers, len(asked), recipe))
    for name, *pair in zip(candidate.objectives, candidate.values, candidate.stderrs, *means):
        asking.checks.append(SpotCheck(generation, *map(float, pair), name))
    since, three = asking.drifted[-1] if asking.drifted else -1, 3 * len(candidate.objectives)
    last = [c for c in asking.checks if c.generation > since][-three:]
    if len(last) < three or np.mean([c.squared() for c in last]) <= 4:
        return False
    asking.drifted.append(generation)
    return True


def _further(asking: Asking, rng: np.random.Generator) -> list[int]:
    """Random positions that the subset leaves out, as many of every task as it asks."""
    items, positions, unseen = asking.search.questions.search, [], asking.unseen()
    for task in by_task(items):
        own = [i for i in unseen if items[i].task == task]
        positions += sorted(rng.permutation(own)[: asking.search.config.extract.size].tolist())
    return positions


def _chosen(
    search: Search, calibration: Calibration, draws: int, anywhere: bool
) -> tuple[list[Item], dict[str, Estimator]]:
    policy, items, size = search.questions.policy, search.questions.search, search.config.extract.size
    seed = search.seed("subset", draws)
    return choose(calibration, items, policy.extract, size, policy.estimate, seed, anywhere)
