"""After a search for several objectives: the members of its front answer more items, and who is dominated leaves.

As in race.py the same further items are asked of all, twice as many in every round. Differences are paired, and the
search's own beliefs are counted in. A member leaves only when it is settled that another one is at least as good in
every objective and better in one: two standard errors of every difference beyond doubt. Who is not settled stays. Those
who race from behind the front join it if at the end nobody is believed to dominate them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from merge3.fitness import estimates, lengths_needed, objective
from merge3.recipe import Recipe
from merge3.search.asking import Asking
from merge3.search.context import Search
from merge3.search.journal import Candidate
from merge3.search.pareto import best_first, ranks, spread_out
from merge3.search.race import in_rounds
from merge3.tasks import Item, LogitsError, by_task
from merge3.tasks.kinds import writes

ROUNDS = 3  # of the first round's items, that the budget lets every contender answer
SURE = 2.0  # standard errors of a difference that settle it
TIED = 30  # items that two members answered exactly alike, in an objective, count as no difference in it
_LEAST = 1e-3  # a standard error below this counts as this: answers that are all alike are no surer than others


class Believed(NamedTuple):
    """A candidate with what is believed of it: float64 [objectives] each, more always the better."""

    candidate: Candidate
    values: np.ndarray
    stderrs: np.ndarray


@dataclass(frozen=True)
class FrontRace:
    """answers: spent. rounds: contenders left after each, the first entry before any. items: that all who are left
    answered."""

    answers: int
    rounds: tuple[int, ...]
    items: int


def settle_front(asking: Asking, known: Sequence[Believed], answers: int) -> tuple[list[Believed], FrontRace | None]:
    """(the front's members with what is believed of them after the race, the race, None where there was none).

    known: every candidate once; answers: of the search, of which the race may cost a share.
    """
    search, settings = asking.search, asking.search.config.race
    unseen, most = asking.unseen(), max(settings.candidates, 1) * len(search.objectives)
    racing, budget = bool(unseen) and settings.candidates > 1, int(settings.share * answers)
    if racing:  # fewer who answer more, where the budget is small
        least = ROUNDS * search.config.extract.size * len(by_task(search.questions.search))
        most = min(most, max(budget // least, 2 * len(search.objectives)))
    values = np.array([one.values for one in known])
    top, front = [known[i] for i in contenders(values, most, only_front=not racing)], ranks(values) == 0
    if not racing or len(top) < 2:
        return top, None
    items = [search.questions.search[i] for i in unseen]

    def ask(at: int, positions: list[int]) -> np.ndarray:
        candidate, places = top[at].candidate, [unseen[i] for i in positions]
        name = f"{candidate.generation}-{candidate.position} from item {places[0]}"
        found = search.journal.remember("race", name, places, lambda: _answers(search, candidate, places))
        return found.reshape(-1, len(places))

    def left(running: list[int], answered: dict[int, np.ndarray], own: list[Item]) -> list[int]:
        return still_running(search, top, running, answered, own)

    found = in_rounds(len(top), items, ask, search.config.extract.size, budget, left, search.seed("race"), search.stop)
    members = []
    for at in found.running:
        candidate, values, stderrs = top[at]
        if found.items:
            means = _estimates(search, found.answers[at], found.items, search.space.recipe(candidate.genome))
            values, stderrs = together((values, stderrs), means)
        members.append(Believed(candidate, values, stderrs))
    ahead = {id(one.candidate) for one, first in zip(known, front) if first}
    ahead |= {id(members[i].candidate) for i in np.flatnonzero(ranks(np.array([one.values for one in members])) == 0)}
    members = [one for one in members if id(one.candidate) in ahead]
    return members, FrontRace(found.spent, (len(top), *found.rounds), len(found.items))


def contenders(values: np.ndarray, most: int, only_front: bool) -> np.ndarray:
    """Indices of who may be on the front, `most` at most: the front, spread out where it is larger; where it is smaller
    and `only_front` does not forbid it, those behind it too. values: float64 [C, objectives]."""
    front = np.flatnonzero(ranks(values) == 0)
    if len(front) >= most or only_front:
        return front[spread_out(values[front], most)]
    return best_first(values)[:most]


def still_running(
    search: Search,
    top: Sequence[Believed],
    running: list[int],
    answered: dict[int, np.ndarray],
    items: Sequence[Item],
) -> list[int]:
    """Those whom no other one settles to be dominated. answered: [.., items] of each."""
    recipes = {c: search.space.recipe(top[c].candidate.genome) for c in running}
    values = {c: _estimates(search, answered[c], items, recipes[c])[0] for c in running}

    def beaten(c: int, other: int) -> bool:
        believed, found = top[other].values - top[c].values, values[other] - values[c]
        if ((believed < 0) & (found < 0)).any():
            return False
        errors = _estimates(search, answered[other] - answered[c], items)[1]  # what both share does not count
        gap, error = together((believed, np.hypot(top[other].stderrs, top[c].stderrs)), (found, errors))
        tied = (found == 0) & (errors == 0) & (len(items) >= TIED)
        return settled(np.where(tied, 0.0, gap), np.where(tied, 0.0, error))

    return [c for c in running if not any(beaten(c, other) for other in running if other != c)]


def dominated(
    search: Search, recipes: Sequence[Recipe], answered: Sequence[np.ndarray], items: Sequence[Item]
) -> list[bool]:
    """Of each member, whether these answers alone, [.., items] each, settle that another one dominates it. Fewer than
    TIED items that all differ alike, or not at all, settle nothing."""
    values = [_estimates(search, answers, items, recipe)[0] for answers, recipe in zip(answered, recipes)]
    asked = np.array([not objective(name).exact for name in search.objectives])

    def beaten(c: int, other: int) -> bool:
        gap, errors = values[other] - values[c], _estimates(search, answered[other] - answered[c], items)[1]
        if (gap < 0).any() or (len(items) < TIED and (errors[asked] == 0).any()):
            return False
        return settled(gap, errors)

    return [any(beaten(c, other) for other in range(len(values)) if other != c) for c in range(len(values))]


def settled(gap: np.ndarray, stderrs: np.ndarray) -> bool:
    """Whether a gap [objectives] says beyond doubt: as good in all, better in one."""
    sure = gap - SURE * stderrs
    return bool((sure >= 0).all() and (sure > 0).any())


def together(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Two estimates as one, weighted by their precision. Each: (values, standard errors), float64 [objectives]."""
    p, q = (1 / np.maximum(one[1], _LEAST) ** 2 for one in (a, b))
    p = np.where(np.isfinite(p), p, 0.0)  # what nothing is known of counts for nothing
    return (p * np.where(p > 0, a[0], 0.0) + q * b[0]) / (p + q), (p + q) ** -0.5


def _estimates(
    search: Search, answers: np.ndarray, items: Sequence[Item], recipe: Recipe | None = None
) -> tuple[np.ndarray, np.ndarray]:
    values, stderrs = estimates(search.asks(items), search.read(answers, len(items), recipe))
    return search.signs * values, stderrs


def _answers(search: Search, candidate: Candidate, places: list[int]) -> np.ndarray:
    items = [search.questions.search[i] for i in places]
    try:
        return search.answered(search.space.recipe(candidate.genome), items)
    except LogitsError:  # it answered all it was asked before; what it cannot answer now it has not solved
        return unanswered(search, items)


def unanswered(search: Search, items: Sequence[Item]) -> np.ndarray:
    """What a merge without answers has `answered`: nothing solved, as much written as was allowed."""
    responses = np.zeros(len(items))
    if not lengths_needed(search.asks(items)):
        return responses
    longest = [item.max_tokens if writes(item) else np.nan for item in items]
    return np.stack([responses, longest])
