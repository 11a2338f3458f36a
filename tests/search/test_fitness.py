"""From responses to values: vectors with names, of the accuracy and of single tasks."""

import numpy as np
import pytest

from merge3 import irt
from merge3.errors import BadInput
from merge3.fitness import Answered, check_objectives, estimates, mean_over_tasks
from merge3.irt.bank import sigmoid
from merge3.registration import Registration
from merge3.tasks import Item


def items(task, count):
    return [Item(f"{task}{i}", task, "generate", "p", ("x",)) for i in range(count)]


def test_the_accuracy_and_each_task():
    asked = Registration(tuple(items("a", 8) + items("b", 2)), objectives=("b", "accuracy", "a"), weights={"a": 3.0})
    responses = np.array([1.0] * 2 + [0.0] * 6 + [1.0, 0.0])
    values, stderrs = estimates(asked, Answered(responses))
    assert values.tolist() == [0.5, (3 * 0.25 + 0.5) / 4, 0.25]
    assert tuple(values[1:2]) + tuple(stderrs[1:2]) == tuple(mean_over_tasks(responses, asked.items, asked.weights))
    assert stderrs[0] == pytest.approx((0.25 / 2) ** 0.5) and stderrs[2] == pytest.approx((0.1875 / 8) ** 0.5)


def test_calibrated_estimates_are_taken_task_by_task():
    g = np.random.default_rng(0)
    estimators, chosen, answers = {}, [], []
    for task in ("a", "b"):
        theta, b = g.normal(size=12), g.normal(size=40)
        right = (g.random((12, 40)) < sigmoid(theta[:, None] - b)).astype(float)
        responses = irt.Responses(tuple(f"m{i}" for i in range(12)), tuple(f"{task}/{i}" for i in range(40)), right)
        bank = irt.fit(responses, seed=0)
        subset = irt.extract(bank, responses, "irt", 8)
        estimators[task] = irt.prepare(bank, responses, subset, "gmp-irt")
        chosen += [items(task, 40)[i] for i in subset.index]
        answers.append(right[0, subset.index])
    asked = Registration(tuple(chosen), estimators=estimators, objectives=("accuracy", "a", "b"))
    values, stderrs = estimates(asked, Answered(np.concatenate(answers)))
    alone = [irt.estimate(estimators[t], a[None]) for t, a in zip("ab", answers)]
    assert values[1:].tolist() == [found.value[0] for found in alone]
    assert stderrs[1:].tolist() == [found.stderr[0] for found in alone]
    assert (
        values[0] == (alone[0].value[0] + alone[1].value[0]) / 2
        and values[0] != mean_over_tasks(np.concatenate(answers), chosen)[0]
    )


@pytest.mark.parametrize(
    "objectives,said",
    [
        (("accuracy", "c"), "objectives: found 'c'; expected accuracy, length, cost, a"),
        (("a", "a"), "objectives: 'a' twice"),
        ((), "objectives: none"),
    ],
)
def test_what_is_no_objective_is_refused(objectives, said):
    with pytest.raises(BadInput, match=said):
        check_objectives(Registration(tuple(items("a", 2)), objectives=objectives))
