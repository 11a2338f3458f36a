"""From a candidate's responses to its fitness: an estimated accuracy and that estimate's standard error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from merge3.irt import estimation as irt
from merge3.tasks import Item

# (responses, items, task weights) -> (estimated accuracy, its standard error)
EstimateOf = Callable[[np.ndarray, Sequence[Item], dict[str, float] | None], tuple[float, float]]


def mean_over_tasks(
    responses: np.ndarray, items: Sequence[Item], weights: dict[str, float] | None = None
) -> tuple[float, float]:
    """(mean over tasks of their mean response, its standard error). weights: of tasks, default equal."""
    values, variances, total = 0.0, 0.0, 0.0
    for task in dict.fromkeys(item.task for item in items):
        own = responses[[i for i, item in enumerate(items) if item.task == task]]
        w = (weights or {}).get(task, 1.0)
        values += w * own.mean()
        variances += w**2 * own.var() / len(own)
        total += w
    return float(values / total), float(variances**0.5 / total)


class TaskEstimator:
    """Responses to a subset of every task's items -> (weighted mean of the tasks' accuracies, its
    standard error). Tasks' errors are independent: they share no item."""

    def __init__(self, estimators: dict[str, irt.Estimator]):
        self.estimators = estimators

    def __call__(self, responses: np.ndarray, items: Sequence[Item], weights: dict[str, float] | None = None) -> tuple[float, float]:
        value, variance, total = 0.0, 0.0, 0.0
        tasks = np.array([item.task for item in items])
        for task, estimator in self.estimators.items():
            w = (weights or {}).get(task, 1.0)
            found = irt.estimate(estimator, responses[None, tasks == task])
            value += w * found.value[0]
            variance += (w * found.stderr[0]) ** 2
            total += w
        return float(value / total), float(variance**0.5 / total)
