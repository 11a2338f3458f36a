"""From a subject's responses to its fitness: for every objective an estimated value and that estimate's standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from merge3.errors import BadInput
from merge3.irt.estimation import Estimator
from merge3.irt.estimation import estimate as estimate_task
from merge3.registration import ACCURACY, Registration
from merge3.tasks import Item


class Estimate(NamedTuple):
    """An objective's value and its standard error."""

    value: float
    stderr: float


def mean_over_tasks(responses: np.ndarray, items: Sequence[Item], weights: Mapping[str, float] | None = None) -> Estimate:
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
    responses: np.ndarray, items: Sequence[Item], estimators: Mapping[str, Estimator], weights: Mapping[str, float] | None = None
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


def check_objectives(registration: Registration) -> None:
    """Raises BadInput for an objective that is neither `accuracy` nor one of the tasks, or that is named twice."""
    known = [ACCURACY, *registration.tasks()]
    for i, name in enumerate(registration.objectives):
        if name not in known:
            raise BadInput("objectives", f"found {name!r}", ", ".join(known))
        if name in registration.objectives[:i]:
            raise BadInput("objectives", f"{name!r} twice", "different names")
    if not registration.objectives:
        raise BadInput("objectives", "none", ", ".join(known))


def estimates(registration: Registration, responses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, standard errors) of a registration's objectives, each float64 [objectives]. responses: float64 [items]."""
    found = [_objective(name, registration, responses) for name in registration.objectives]
    return np.array([e.value for e in found]), np.array([e.stderr for e in found])


def _objective(name: str, asked: Registration, responses: np.ndarray) -> Estimate:
    if name == ACCURACY:
        items, estimators = asked.items, asked.estimators
    else:  # a task: its own accuracy
        at = asked.tasks()[name]
        responses, items = responses[at], [asked.items[i] for i in at]
        estimators = {name: asked.estimators[name]} if asked.estimators else {}
    if estimators:
        return estimated_over_tasks(responses, items, estimators, asked.weights)
    return mean_over_tasks(responses, items, asked.weights)
