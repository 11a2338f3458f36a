"""From a subject's responses to its fitness: for every objective an estimated value and its standard error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from merge3.errors import BadInput
from merge3.irt.estimation import Estimator
from merge3.irt.estimation import estimate as estimate_task
from merge3.registration import ACCURACY, Registration
from merge3.space import SPACES
from merge3.tasks import Item
from merge3.tasks.kinds import writes
from merge3.tasks.score import Answers


class Estimate(NamedTuple):
    """An objective's value and its standard error."""

    value: float
    stderr: float


def mean_over_tasks(
    responses: np.ndarray, items: Sequence[Item], weights: Mapping[str, float] | None = None
) -> Estimate:
    """The mean over tasks of their mean response. responses: float64 [items]; weights: of tasks, default equal."""
    values, variances, total = 0.0, 0.0, 0.0
    for task in dict.fromkeys(item.task for item in items):
        own = responses[[i for i, item in enumerate(items) if item.task == task]]
        w = (weights or {}).get(task, 1.0)
        values += w * own.mean()
        variances += w**2 * own.var() / len(own)
        total += w
    return Estimate(float(values / total), float(variances**0.5 / total))


def estimated_over_tasks(
    responses: np.ndarray,
    items: Sequence[Item],
    estimators: Mapping[str, Estimator],
    weights: Mapping[str, float] | None = None,
) -> Estimate:
    """The mean over tasks of their estimated accuracies, from answers to a subset of every task's items. Tasks' errors
    are independent: they share no item."""
    value, variance, total = 0.0, 0.0, 0.0
    tasks = np.array([item.task for item in items])
    for task in dict.fromkeys(tasks.tolist()):
        w = (weights or {}).get(task, 1.0)
        found = estimate_task(estimators[task], responses[None, tasks == task])
        value += w * found.value[0]
        variance += (w * found.stderr[0]) ** 2
        total += w
    return Estimate(float(value / total), float(variance**0.5 / total))


class Answered(NamedTuple):
    """What objectives are made of. responses: float64 [items]; lengths: tokens written for each, float64 [items], NaN
    where an item asks for no text, None where nobody counted; cost: what the subject takes, in base models."""

    responses: np.ndarray
    lengths: np.ndarray | None = None
    cost: float = 1.0

    def at(self, positions: Sequence[int]) -> Answered:
        """Of some items."""
        return Answered(self.responses[positions], None if self.lengths is None else self.lengths[positions], self.cost)


@dataclass(frozen=True)
class Objective:
    """what: its values in words. value: (registration, answered) -> Estimate. lower: whether less is better. needs: of
    NEEDS, without which no candidate has such a value, or all have the same. exact: whether no items are needed to know
    it."""

    what: str
    value: Callable[[Registration, Answered], Estimate]
    lower: bool = False
    needs: str = ""
    exact: bool = False


def accuracy(asked: Registration, answered: Answered) -> Estimate:
    """The weighted mean of the tasks' accuracies, estimated where there are estimators."""
    if asked.estimators:
        return estimated_over_tasks(answered.responses, asked.items, asked.estimators, asked.weights)
    return mean_over_tasks(answered.responses, asked.items, asked.weights)


def of_task(asked: Registration, answered: Answered, task: str) -> Estimate:
    """One task's accuracy."""
    at = asked.tasks()[task]
    estimators = {task: asked.estimators[task]} if asked.estimators else {}
    alone = replace(asked, items=tuple(asked.items[i] for i in at), estimators=estimators, weights={})
    return accuracy(alone, answered.at(at))


def length(asked: Registration, answered: Answered) -> Estimate:
    """Tokens of a written answer: the weighted mean over the tasks that ask for texts. Where items were chosen, each
    counts for those that it was chosen for."""
    value, variance, total = 0.0, 0.0, 0.0
    for task, at in asked.tasks().items():
        tokens = answered.lengths[at]
        shares = asked.estimators[task].subset.weights if asked.estimators else np.ones(len(at))
        shares = np.where(np.isnan(tokens), 0.0, shares)
        if not shares.sum():
            continue
        shares, tokens, w = shares / shares.sum(), np.nan_to_num(tokens), asked.weights.get(task, 1.0)
        mean = shares @ tokens
        value += w * mean
        variance += w**2 * (shares**2).sum() * (shares @ (tokens - mean) ** 2)
        total += w
    return Estimate(value / total, variance**0.5 / total) if total else Estimate(np.nan, np.nan)


def cost(asked: Registration, answered: Answered) -> Estimate:
    """What a forward through the merge takes, in those of the base: the space says it, without error."""
    return Estimate(answered.cost, 0.0)


# what an objective needs -> (registration -> whether it is there, what a refusal says, what it expects)
NEEDS: dict[str, tuple[Callable[[Registration], bool], str, str]] = {
    "texts": (
        lambda asked: any(map(writes, asked.items)),
        "objectives: {} without an item that asks for a text",
        "items that are answered with a text",
    ),
    "paths": (
        lambda asked: asked.space is None or hasattr(SPACES[asked.space.kind], "cost"),
        "objectives that no candidate can differ in: {}",
        "a space whose merges take more or less than each other",
    ),
}

# Every task is an objective besides.
OBJECTIVES: dict[str, Objective] = {
    ACCURACY: Objective("accuracy, the mean over tasks", accuracy),
    "length": Objective("tokens of a written answer", length, lower=True, needs="texts"),
    "cost": Objective("forwards of the base", cost, lower=True, needs="paths", exact=True),
}


def objective(name: str) -> Objective:
    """The row of that name, else that of a task."""
    return OBJECTIVES.get(name) or Objective(f"accuracy of {name}", partial(of_task, task=name))


def signs(names: Sequence[str]) -> np.ndarray:
    """What makes more the better of every objective's values: 1 or -1, float64 [objectives]."""
    return np.array([-1.0 if objective(name).lower else 1.0 for name in names])


def lengths_needed(registration: Registration) -> bool:
    """Whether an objective is made of what was written."""
    return any(objective(name).needs == "texts" for name in registration.objectives)


def check_objectives(registration: Registration) -> None:
    """Raises BadInput for an objective that is neither one of OBJECTIVES nor a task, that is named twice, or whose need
    is not met."""
    known = [*OBJECTIVES, *registration.tasks()]
    for i, name in enumerate(registration.objectives):
        if name not in known:
            raise BadInput("objectives", f"found {name!r}", ", ".join(known))
        if name in registration.objectives[:i]:
            raise BadInput("objectives", f"{name!r} twice", "different names")
        there, said, expected = NEEDS.get(objective(name).needs, (None, "", ""))
        if there is not None and not there(registration):
            raise BadInput(said.format(name), expected=expected)
    if not registration.objectives:
        raise BadInput("objectives", "none", ", ".join(known))


def judged(registration: Registration, answers: Answers) -> np.ndarray | None:
    """Responses with those that only judges can tell: float64 [items]. None where a task's judge is elsewhere.

    Raises ItemsError where a judge finds no response.
    """
    responses = answers.responses.copy()
    for position, raw in answers.raw.items():
        item = registration.items[position]
        if item.task not in registration.judges:
            return None
        responses[position] = registration.judges[item.task](item, raw)
    return responses


def estimates(registration: Registration, answered: Answered) -> tuple[np.ndarray, np.ndarray]:
    """(values, standard errors) of a registration's objectives, each float64 [objectives]."""
    found = [objective(name).value(registration, answered) for name in registration.objectives]
    return np.array([e.value for e in found]), np.array([e.stderr for e in found])
