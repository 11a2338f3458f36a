"""Which units of two models are one: from the correlation of what they do to a place for each.

Units are numbered 0 .. n-1 in the first model, n .. 2n-1 in the second. A matching is int64 [2, n]: the place of every
unit among the n of the result. Places are numbered by the smallest unit in them, so that a matching has one form.
ZipIt! (2305.03053), section 4; Git Re-Basin (2209.04836), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

Match = Callable[[np.ndarray], np.ndarray]  # float64 [2n, 2n], finite and symmetric -> int64 [2, n]
NEVER = -np.inf
ALPHA, BETA = 0.3, 0.125


def match_zip(correlation: np.ndarray, alpha: float = ALPHA, beta: float = BETA) -> np.ndarray:
    """Greedily: n times the two groups of the highest correlation become one, whosever they are.

    The correlations of a new group are the smaller ones of its halves, times alpha: a unit is not merged again and
    again. beta: share of the n // 2 merges that would be each model's part that may lie within that model; as in the
    authors' code a model is told to stop after such a merge, so one is allowed with 0 too, and a group counts as the
    model's whose unit is its smallest. Of equal correlations that of the smallest unit comes first, then of the
    smallest partner.
    """
    count = len(correlation) // 2
    values = np.array(correlation, dtype=np.float64)
    np.fill_diagonal(values, NEVER)
    owner = np.repeat((0, 1), count)
    group, alive = np.arange(2 * count), np.ones(2 * count, dtype=bool)
    left = [int(count // 2 * beta + 1e-4)] * 2
    best = np.full(2 * count, NEVER)  # of each group with those of larger numbers
    partner = np.zeros(2 * count, dtype=np.int64)

    def look(unit: int) -> None:
        best[unit] = NEVER
        if unit + 1 < 2 * count:
            partner[unit] = unit + 1 + int(values[unit, unit + 1 :].argmax())
            best[unit] = values[unit, partner[unit]]

    for unit in range(2 * count):
        look(unit)
    for _ in range(count):
        first = int(best.argmax())
        second = int(partner[first])
        row = np.minimum(values[first], values[second])
        values[first] = values[:, first] = np.multiply(row, alpha, out=row, where=row != NEVER)
        values[second] = values[:, second] = NEVER
        group[group == second], alive[second] = first, False
        changed = alive & ((partner == first) | (partner == second))
        mine = owner[first]
        if mine == owner[second]:
            left[mine] -= 1
            if left[mine] <= 0:
                own = np.flatnonzero(alive & (owner == mine))
                values[np.ix_(own, own)] = NEVER
                changed |= alive & (owner == mine)
        best[second] = NEVER
        changed[first] = True
        for unit in np.flatnonzero(changed):
            look(unit)
        # A group may be nearer to the new one than it was to any: halves below 0 come nearer by alpha.
        before, own = np.flatnonzero(alive[:first]), values[:first, first]
        nearer = (own[before] > best[before]) | ((own[before] == best[before]) & (first < partner[before]))
        best[before[nearer]], partner[before[nearer]] = own[before[nearer]], first
    return in_order(group)


def match_one_to_one(correlation: np.ndarray) -> np.ndarray:
    """Every unit of the second model goes to one of the first's, which stay where they are, so that the sum of
    correlations is the highest: the linear assignment of Git Re-Basin's activation matching."""
    count = len(correlation) // 2
    _, partners = linear_sum_assignment(correlation[:count, count:], maximize=True)
    places = np.tile(np.arange(count), (2, 1))
    places[1, partners] = np.arange(count)
    return places


def match_as_they_are(correlation: np.ndarray) -> np.ndarray:
    """Unit i with unit i: the plain average."""
    return np.tile(np.arange(len(correlation) // 2), (2, 1))


# Of a row of methods/zipped.py -> (alpha, beta) -> Match.
MATCHES: dict[str, Callable[[float, float], Match]] = {
    "zip": lambda alpha, beta: lambda correlation: match_zip(correlation, alpha, beta),
    "one_to_one": lambda alpha, beta: match_one_to_one,
    "as_they_are": lambda alpha, beta: match_as_they_are,
}


def in_order(group: np.ndarray) -> np.ndarray:
    """int64 [2n], equal where units are in one group -> places, int64 [2, n]."""
    _, first, inverse = np.unique(group, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return rank[inverse].reshape(2, -1)


def matched_correlation(correlation: np.ndarray, places: np.ndarray) -> float:
    """The mean correlation of two units in one place, one of each model; of units alone, none. NaN without any."""
    count = len(correlation) // 2
    together = places[0][:, None] == places[1][None]
    found = correlation[:count, count:][together]
    return float(found.mean()) if found.size else float("nan")
