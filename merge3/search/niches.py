"""Which merges differ in what they can do: M2N2's competition and attraction (Abrantes, Lange, Tang 2025, 2508.16204;
as in `update_archive` and `sample_parents` of the code they published) over tables of answers.

An item is a resource that is shared by all who solve it: who solves what many solve gets little of it, who solves what
nobody else does gets all. So the fitness of candidate c in a population P is

    f_c = Σ_i w_i s_ci / (Σ_{p in P} s_pi)^α                                                        (competition)

with s_ci its answer to item i, in [0, 1]. What b adds to a is

    g(b | a) = Σ_i w_i max(0, s_bi − s_ai) / (Σ_{p in P} s_pi)^α                                    (attraction)

M2N2 draws pairs of parents by these. A round of ours wants a few elites, so the second is taken from one partner to a
set S of chosen ones, who together do on each item what the best of them does: max over S of s_ai in the place of s_ai.

What is compared must have been asked the same. In a full table it was, and differences are paired. In a table with
gaps (NaN), where each was asked a random part of the items, `shared_fitness` estimates f_c: the sum over P is P times
the mean of those asked, the sum over items that of those asked, divided by their share of the weight. Where few were
asked an item it is low, for all of them alike. It is good enough to draw up a short list, and no more is made of it;
`complementary` wants no gaps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from merge3.tasks import Item

ALPHA = 1.0  # as in their experiments: a resource is divided among those who share it


class Chosen(NamedTuple):
    """index: of the candidate's row; gain: what it adds to those chosen before, in shared fitness; shared: its own;
    together: accuracy where on every item the best of those chosen so far answers."""

    index: int
    gain: float
    shared: float
    together: float


def item_weights(items: Sequence[Item], weights: Mapping[str, float] | None = None) -> np.ndarray:
    """What each item counts for in the mean over tasks, float64 [items], together 1. weights: of tasks, default 1."""
    counts = Counter(item.task for item in items)
    of_task = {task: (weights or {}).get(task, 1.0) for task in counts}
    each = np.array([of_task[item.task] / counts[item.task] for item in items])
    return each / sum(of_task.values())


def shared_fitness(answers: np.ndarray, weights: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """f_c of every row, float64 [C]. answers: float64 [C, items], NaN where a candidate was not asked; weights: of
    items. A row without answers has 0."""
    asked = ~np.isnan(answers)
    share = _shares(answers, weights, alpha)
    heard = asked @ weights
    return np.where(heard > 0, np.nansum(share, axis=1) * weights.sum() / np.maximum(heard, 1e-300), 0.0)


def complementary(
    answers: np.ndarray, weights: np.ndarray, first: int, count: int, alpha: float = ALPHA
) -> list[Chosen]:
    """Rows that together can do most, `first` at their head: then, one by one, who adds most to those chosen. Of equals
    the one whose shared fitness is largest, then the earlier one, so that where nobody adds anything the fittest
    follow. answers: without gaps; rows in the order of what is believed of them. At most `count`, fewer of fewer rows.

    The gain of each is an unbiased estimate of what it would add on all items as long as the items were drawn without
    a look at who solves them; the largest of several is biased upwards, which changes who is chosen only among those
    that the answers cannot tell apart.
    """
    share, shared = _shares(answers, weights, alpha), shared_fitness(answers, weights, alpha)
    best, able, left = np.zeros(answers.shape[1]), np.zeros(answers.shape[1]), list(range(len(answers)))
    found: list[Chosen] = []
    while left and len(found) < count:
        gains = np.maximum(0.0, share[left] - best).sum(axis=1)
        place = max(range(len(left)), key=lambda i: (gains[i].round(12), shared[left[i]].round(12), -i))
        at = left[place] if found else first
        gain = float(gains[left.index(at)])
        best, able = np.maximum(best, share[at]), np.maximum(able, answers[at])
        found.append(Chosen(at, gain, float(shared[at]), float(weights @ able / weights.sum())))
        left.remove(at)
    return found


def _shares(answers: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """What each gets of every item, [C, items]; NaN where it was not asked. Of what nobody solves nobody gets any."""
    asked = (~np.isnan(answers)).sum(axis=0)
    solved = np.nansum(answers, axis=0) * len(answers) / np.maximum(asked, 1)
    return weights * answers / np.where(solved > 0, solved, 1.0) ** alpha
