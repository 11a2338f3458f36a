"""Fronts: who is dominated, who is spread best, how much a front covers. All objectives are to be maximised."""

from __future__ import annotations

import numpy as np


def dominates(values: np.ndarray) -> np.ndarray:
    """Whether i is as good as j in every objective and better in one: bool [C, C]. values: float64 [C, objectives]."""
    a, b = values[:, None], values[None]
    return (a >= b).all(-1) & (a > b).any(-1)


def ranks(values: np.ndarray) -> np.ndarray:
    """0 for the front, 1 for the front without those, and so on: int [C] (Deb et al. 2002, section III.A)."""
    over, found = dominates(values), np.full(len(values), -1)
    for rank in range(len(values)):
        left = found < 0
        front = left & ~over[left].any(0)
        if not front.any():
            break
        found[front] = rank
    return found


def crowding(values: np.ndarray) -> np.ndarray:
    """How far the neighbours of each are from each other, float64 [C]; the ends of each objective are infinitely far
    (Deb et al. 2002, section III.B)."""
    distances = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        distances[order[[0, -1]]] = np.inf
        if span > 0:
            distances[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distances


def best_first(values: np.ndarray) -> np.ndarray:
    """Indices by rank, within a rank the least crowded first; of equals the earlier: int [C]."""
    rank, apart = ranks(values), np.zeros(len(values))
    for level in range(rank.max(initial=-1) + 1):
        apart[rank == level] = crowding(values[rank == level])
    return np.lexsort((np.arange(len(values)), -apart, rank))


def spread_out(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of `count` of the front's members, ascending: the most crowded leave one by one, so that what is left is
    spread over all of it."""
    kept = np.arange(len(values))
    while len(kept) > count:
        kept = np.delete(kept, np.argmin(crowding(values[kept])))
    return kept


def hypervolume(values: np.ndarray, reference: np.ndarray) -> float:
    """The volume that the points dominate and that dominates the reference: slices along the last objective (Zitzler
    1999). values: float64 [C, objectives]; reference: [objectives]."""
    points = values[(values > reference).all(1)]
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(points.max() - reference[0])
    if points.shape[1] == 2:
        order = np.lexsort((-points[:, 1], -points[:, 0]))
        heights = np.maximum.accumulate(points[order, 1])
        steps = np.diff(np.append(points[order, 0], reference[0]))
        return float(-(steps * (heights - reference[1])).sum())
    order = np.argsort(-points[:, -1], kind="stable")
    points, volume = points[order], 0.0
    floors = np.append(points[1:, -1], reference[-1])
    for i, (ceiling, floor) in enumerate(zip(points[:, -1], floors)):
        if ceiling > floor:
            volume += (ceiling - floor) * hypervolume(points[: i + 1, :-1], reference[:-1])
    return float(volume)


def knee(values: np.ndarray) -> int:
    """The index of the member that gives up least: the largest sum of values, each in the front's own range, which for
    two objectives is the one furthest from the line between the ends (Das 1999)."""
    low, span = values.min(0), np.ptp(values, axis=0)
    return int(np.argmax(((values - low) / np.where(span > 0, span, 1.0)).sum(1)))
