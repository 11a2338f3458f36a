"""From a subject's responses to its fitness: for every objective an estimated value and its standard error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from merge3.errors import BadInput
from merge3.irt.estimation import Estimator
from merge3.irt.estimation import estimate as estimate_task
from merge3.registration import ACCURACY, Registration
from merge3.tasks import Item
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


def accuracy(asked: Registration, responses: np.ndarray) -> Estimate:
    """The weighted mean of the tasks' accuracies, estimated where there are estimators."""
    if asked.estimators:
        return estimated_over_tasks(responses, asked.items, asked.estimators, asked.weights)
    return mean_over_tasks(responses, asked.items, asked.weights)


def of_task(asked: Registration, responses: np.ndarray, task: str) -> Estimate:
    """One task's accuracy."""
    at = asked.tasks()[task]
    estimators = {task: asked.estimators[task]} if asked.estimators else {}
    alone = replace(asked, items=tuple(asked.items[i] for i in at), estimators=estimators, weights={})
    return accuracy(alone, responses[at])


# name -> (registration, responses float64 [items]) -> its value; every task is an objective besides.
OBJECTIVES: dict[str, Callable[[Registration, np.ndarray], Estimate]] = {ACCURACY: accuracy}


def check_objectives(registration: Registration) -> None:
    """Raises BadInput for an objective that is neither one of OBJECTIVES nor a task, or that is named twice."""
    known = [*OBJECTIVES, *registration.tasks()]
    for i, name in enumerate(registration.objectives):
        if name not in known:
            raise BadInput("objectives", f"found {name!r}", ", ".join(known))
        if name in registration.objectives[:i]:
            raise BadInput("objectives", f"{name!r} twice", "different names")
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


def estimates(registration: Registration, responses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, standard errors) of a registration's objectives, each float64 [objectives].

    responses: float64 [items].
    """
    found = []
    for name in registration.objectives:
        objective = OBJECTIVES.get(name)
        found.append(objective(registration, responses) if objective else of_task(registration, responses, name))
    return np.array([e.value for e in found]), np.array([e.stderr for e in found])
