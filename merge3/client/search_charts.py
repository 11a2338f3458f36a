"""What a search's charts show: every candidate's estimate and its error, the best so far, the front of several
objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, combinations, islice
from typing import Any

import numpy as np

from merge3.client.charts import axis, series
from merge3.fitness import OBJECTIVES
from merge3.search.watching import Seen

MOST_FRONTS = 6  # pairs of objectives that are drawn


def search_charts(seen: Sequence[Seen], begun: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Of candidates in the order in which they came. Charts `curve`, and of several objectives `front-0`, .. begun: how
    many candidates there were when each later round began, which the curve marks."""
    if not seen:
        return []
    signs = [-1.0 if lower(name) else 1.0 for name in seen[0].objectives]
    values, errors = [c.values[0] for c in seen], [c.stderrs[0] for c in seen]
    at = running_best([v if v is None else signs[0] * v for v in values])
    best = [[None if i is None else column[i] for i in at] for column in (values, errors)]
    across = [
        axis("candidates", range(1, len(seen) + 1)),
        axis("item answers", list(accumulate(c.answers for c in seen))),
    ]
    drawn = [
        series("estimate ± se", "points", values, errors),
        series("mean of the generation", "line", generation_means(seen)),
        series("best so far", "best", *best),
    ]
    curve = {"id": "curve", "title": "The search", "y": seen[0].objectives[0], "xs": across, "series": drawn}
    if marks := [at for at in begun if at < len(seen)]:
        curve["marks"] = marks
    return [curve, *fronts(seen, signs)]


def lower(name: str) -> bool:
    """Whether less of an objective is better."""
    return bool(getattr(OBJECTIVES.get(name), "lower", False))


def running_best(values: Sequence[float | None]) -> list[int | None]:
    """Index of the highest value until each, the earlier one of equals; None before there is any."""
    found, best, highest = [], None, -math.inf
    for i, value in enumerate(values):
        if value is not None and value > highest:
            best, highest = i, value
        found.append(best)
    return found


def generation_means(seen: Sequence[Seen]) -> list[float | None]:
    """Of the first objective, at each generation's latest candidate; None elsewhere."""
    own: dict[int, list[float]] = {}
    last: dict[int, int] = {}
    for i, candidate in enumerate(seen):
        last[candidate.generation] = i
        if candidate.values[0] is not None:
            own.setdefault(candidate.generation, []).append(candidate.values[0])
    found: list[float | None] = [None] * len(seen)
    for generation, values in own.items():
        found[last[generation]] = sum(values) / len(values)
    return found


def fronts(seen: Sequence[Seen], signs: Sequence[float]) -> list[dict[str, Any]]:
    """A chart for every pair of objectives; the front's candidates, which none is estimated to be better than in all
    objectives together, stand out in each."""
    known = [c for c in seen if None not in c.values]
    names = seen[0].objectives
    if len(names) < 2 or not known:
        return []
    values, errors = np.array([c.values for c in known]), np.array([c.stderrs for c in known], float)
    on = front(values * np.array(signs))
    charts = []
    for number, (a, b) in enumerate(islice(combinations(range(len(names)), 2), MOST_FRONTS)):
        inside = np.where(on, values[:, b], np.nan)
        drawn = [
            series("candidates", "points", values[:, b], errors[:, b]),
            series("front, as estimated", "front", inside, errors[:, b]),
        ]
        across = [axis(names[a], values[:, a], errors[:, a])]
        title = f"{names[b]} and {names[a]}"
        charts.append({"id": f"front-{number}", "title": title, "y": names[b], "xs": across, "series": drawn})
    return charts


def front(values: np.ndarray) -> np.ndarray:
    """Rows that no other is at least as good as in all columns and better in one, bool [rows]. values: more is better,
    float64 [rows, objectives]; of equal rows all."""
    kept: list[int] = []
    for i, row in enumerate(values):
        others = values[kept]
        if ((others >= row).all(1) & (others > row).any(1)).any():
            continue
        beaten = (row >= others).all(1) & (row > others).any(1)
        kept = [k for k, out in zip(kept, beaten) if not out] + [i]
    found = np.zeros(len(values), bool)
    found[kept] = True
    return found
