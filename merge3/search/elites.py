"""The elites of a round that is over: its best candidate, and those that differ in what they can do (niches.py).

Candidates answered different items, so elites are chosen in two steps. A short list is drawn up from what the journal
has: half of it those believed to be best, half those whose shared fitness is largest, estimated from the items that
each happened to be asked. Both are of the better half of all, for what has collapsed and guesses solves some items that
nobody else solves. These contenders then answer the same items, drawn at random from all search items by a stream of
their own, whoever contends (stage `elites` of the journal), unless everybody was asked everything anyway. The first
elite is the one believed to be best, search and these answers together; the others are those that add most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from merge3.recipe import Recipe
from merge3.search.asking import Asking
from merge3.search.context import Progress, Search
from merge3.search.journal import Candidate, Journal
from merge3.search.niches import complementary, item_weights, shared_fitness
from merge3.search.race import Contender, Ranked, together
from merge3.tasks import Item, places_by_task

FOLDER = "elites"  # in the run's directory
_CONTENDERS = 4  # of each elite, on the short list


class Elite(NamedTuple):
    """name: of the endpoint, and the folder of its checkpoint once it is exported; recipe: what it is; value, stderr:
    what is believed of it; gain, shared, together: see niches.Chosen; tasks: accuracy on the items that all contenders
    answered."""

    name: str
    recipe: Recipe
    candidate: Candidate
    value: float
    stderr: float
    gain: float
    shared: float
    together: float
    tasks: dict[str, float]


@dataclass(frozen=True)
class Over:
    """A round that is over. number: from 1; first, last: its generations; answers: of its candidates; contenders: of
    whom elites were chosen; items: that those answered."""

    number: int
    first: int
    last: int
    candidates: int
    answers: int
    contenders: int
    items: int
    elites: tuple[Elite, ...]

    @property
    def best(self) -> Candidate:
        """Who races for it at the end: its first elite."""
        return self.elites[0].candidate

    @property
    def recipe(self) -> Recipe:
        """Of its best."""
        return self.elites[0].recipe


def close(asking: Asking, ranked: Sequence[Ranked], candidates: Sequence[Candidate]) -> Over | None:
    """Choose the elites of a round. candidates: all of its; ranked: best first, no recipe twice. None if stopped."""
    search, count = asking.search, asking.search.config.optimizer.elites
    answered = _journalled(asking, [r.candidate for r in ranked])
    listed = _short_list(search, ranked, answered, len(candidates))
    contenders = [ranked[at] for at in listed]
    answers, positions, asked = answered[listed], list(range(answered.shape[1])), False
    if np.isnan(answers).any():
        positions, asked = _common(search, len(contenders), candidates), True
        answers = _asked(search, contenders, positions)
        if answers is None:
            return None
    items = [search.questions.search[i] for i in positions]
    scores = [_score(r, row if asked else row[:0], items, search.weights) for r, row in zip(contenders, answers)]
    leader = max(range(len(contenders)), key=lambda i: (scores[i][0], -i))
    chosen = complementary(answers, item_weights(items, search.weights), leader, count)
    elites = []
    for number, one in enumerate(chosen, 1):
        candidate, name = contenders[one.index].candidate, name_of(search.journal, search.round + 1, number)
        recipe, tasks = search.space.recipe(candidate.genome), {}
        for task, at in places_by_task(items).items():
            tasks[task] = float(answers[one.index][at].mean())
        elites.append(Elite(name, recipe, candidate, *scores[one.index], one.gain, one.shared, one.together, tasks))
    generations = candidates[0].generation, candidates[-1].generation
    told = search.round + 1, *generations, len(candidates), _spent(candidates), len(contenders), len(items)
    return Over(*told, tuple(elites))


def _short_list(search: Search, ranked: Sequence[Ranked], answered: np.ndarray, candidates: int) -> list[int]:
    """Places of those who contend, best believed first: as many as `race.share` of the round's answers pays for when
    each answers as many items again, but no fewer than elites, and no more than a few for each of these."""
    elites = search.config.optimizer.elites
    most = min(_CONTENDERS * elites, max(elites, int(search.config.race.share * candidates)), len(ranked))
    best, better = list(range((most + 1) // 2)), max(most, len(ranked) // 2)
    shared = shared_fitness(answered, item_weights(search.questions.search, search.weights))
    others = sorted(range(len(best), better), key=lambda i: (-shared[i].round(12), i))
    return sorted(best + others[: most - len(best)])


def _journalled(asking: Asking, candidates: Sequence[Candidate]) -> np.ndarray:
    """What the journal has of candidates' answers to the search items, float64 [C, items], NaN where not asked."""
    items = asking.search.questions.search
    place = {id(item): i for i, item in enumerate(items)}
    table = np.full((len(candidates), len(items)), np.nan)
    for row, candidate in zip(table, candidates):
        subset = asking.asked.get(candidate.generation, ())
        if candidate.responses is not None and len(subset) == len(candidate.responses):
            row[[place[id(item)] for item in subset]] = candidate.responses
    return table


def _common(search: Search, contenders: int, candidates: Sequence[Candidate]) -> list[int]:
    """Random positions that all contenders are asked: as many of every task as a candidate is, or more where
    `race.share` of the round's answers pays for them."""
    items, rng = search.questions.search, np.random.default_rng(search.seed("elites", search.round))
    tasks, share = places_by_task(items), int(search.config.race.share * _spent(candidates))
    size = max(search.config.extract.size, share // (contenders * len(tasks)))
    positions: list[int] = []
    for at in tasks.values():
        positions += sorted(rng.permutation(at)[:size].tolist())
    return positions


def _asked(search: Search, contenders: Sequence[Ranked], positions: list[int]) -> np.ndarray | None:
    """Their answers, float64 [contenders, items]. None if stopped."""
    items, rows = [search.questions.search[i] for i in positions], []
    for number, (candidate, *_) in enumerate(contenders, 1):
        ask = lambda one=candidate: search.solved(search.space.recipe(one.genome), items)
        name = f"{candidate.generation}-{candidate.position}"
        rows.append(search.journal.remember(FOLDER, name, positions, ask))
        search.report(Progress(stage=FOLDER, done=number, budget=len(contenders)))
        if search.stop():
            return None
    return np.array(rows)


def _score(ranked: Ranked, answers: np.ndarray, items: list[Item], weights) -> tuple[float, float]:
    """What is believed of a contender, with answers that the search has not seen, if there are any."""
    found = together(Contender("", ranked.value, ranked.stderr), answers, items, weights)
    return float(found.value), float(found.stderr)


def _spent(candidates: Sequence[Candidate]) -> int:
    return sum(len(c.responses) for c in candidates if c.responses is not None)


def name_of(journal: Journal, number: int, place: int) -> str:
    """Of an elite, both from 1."""
    return str(journal.directory.resolve() / FOLDER / f"{number}-{place}")
