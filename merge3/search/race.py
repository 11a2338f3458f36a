"""After a search: its top candidates answer more items until it is clear who is best.

The best of many noisy estimates is partly the luckiest. So the best few answer further random items,
the same for all; whoever falls two standard errors of the paired difference behind leaves, the search's
own estimates counted in; the number of items doubles from round to round (successive halving: Jamieson
and Talwalkar 2016), and the last round takes what the budget leaves. Where the search began at a merge that is known to
be good (`race.defend`), that one is the result unless the best of the others is two standard errors ahead of it in the
race alone: of many neighbours some have seemed better in the search by luck.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from merge3.fitness import Estimate, mean_over_tasks
from merge3.search.asking import Asking
from merge3.search.context import Search
from merge3.search.journal import Candidate
from merge3.tasks import Item, LogitsError, by_task


@dataclass(frozen=True)
class Contender:
    """name: in the journal. value, stderr: the search's estimate."""

    name: str
    value: float
    stderr: float


@dataclass(frozen=True)
class Race:
    """winner: index of the contender. answers: spent. rounds: how many still ran after each. settled: the
    last one standing, rather than the best when items or budget ran out. value, stderr: the winner's,
    from the search and the race together."""

    winner: int
    answers: int
    rounds: tuple[int, ...]
    settled: bool
    value: float
    stderr: float


class Ranked(NamedTuple):
    """A candidate with what is believed of it: the optimizer's value where it has any, else its own estimate."""

    candidate: Candidate
    value: float
    stderr: float


def settle(
    asking: Asking, ranked: Sequence[Ranked], answers: int, favorite: bool
) -> tuple[Candidate, Race | None] | None:
    """The best candidates race on items that the last subset leaves out; no race where all were asked all, or none is
    wanted, and a start that is defended is compared by what it has answered. None where there is nothing to settle.

    ranked: best first; answers: of the search, of which the race may cost a share; favorite: whether the search's last
    candidate is its optimizer's favorite.
    """
    search, settings = asking.search, asking.search.config.race
    top = list(ranked[: settings.candidates])
    last = max(ranked, key=lambda r: (r.candidate.generation, r.candidate.position))
    start = _start(search, ranked) if settings.defend else None
    sure = [last] if favorite else []  # they race whatever their values
    if start is not None and start not in sure:
        sure.append(start)
    if missing := [one for one in sure if one not in top]:
        others = [one for one in top if one not in sure]
        top = [one for one in top if one in sure or one in others[: max(1, len(others) - len(missing))]] + missing
    unseen = asking.unseen()
    if len(top) < 2 or settings.candidates < 2 or not unseen:
        return None if start is None else (_unraced(asking, start.candidate, ranked[0].candidate), None)
    every = search.questions.search
    contenders = [Contender(f"{r.candidate.generation}-{r.candidate.position}", r.value, r.stderr) for r in top]

    def ask(contender: int, positions: list[int]) -> np.ndarray:
        places = [unseen[i] for i in positions]
        name = f"{contenders[contender].name} from item {places[0]}"
        return search.journal.remember("race", name, places, lambda: answers_of(contender, places))

    def answers_of(contender: int, places: list[int]) -> np.ndarray:
        recipe = search.space.recipe(top[contender].candidate.genome)
        try:
            return search.answers(recipe, [every[i] for i in places])
        except LogitsError:  # it answered all it was asked before; what it cannot answer now it has not solved
            return np.zeros(len(places))

    items, budget = [every[i] for i in unseen], int(settings.share * answers)
    how = search.config.extract.size, budget, search.weights, search.seed("race"), search.stop
    found = race(contenders, items, ask, *how, top.index(start) if start in top else None)
    return top[found.winner].candidate, found


def _start(search: Search, ranked: Sequence[Ranked]) -> Ranked | None:
    """Where the search began, if a start was given and it has been answered."""
    if search.start is None:
        return None
    return next((one for one in ranked if np.array_equal(one.candidate.genome, search.start)), None)


def _unraced(asking: Asking, start: Candidate, best: Candidate) -> Candidate:
    """Where nothing races: the best one, if all have answered the same and the start is beaten."""
    search = asking.search
    if asking.unseen() or best is start:
        return start
    ahead = search.read(best.responses, len(asking.subset)), search.read(start.responses, len(asking.subset))
    return best if _beaten(ahead[0].responses - ahead[1].responses, asking.subset, search.weights) else start


def race(
    contenders: Sequence[Contender],
    items: Sequence[Item],
    ask: Callable[[int, list[int]], np.ndarray],
    size: int,
    budget: int,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    halt: Callable[[], bool] = lambda: False,
    defender: int | None = None,
) -> Race:
    """Race them. items: what the search's last subset leaves out (earlier ones may overlap: then a few
    answers count twice); ask(contender, positions) -> responses.

    size: items per task in the first round; budget: answers at most; defender: the contender who stays to the end, and
    wins unless it is beaten.
    """

    def left(running: list[int], answers: dict[int, np.ndarray], own: list[Item]) -> list[int]:
        stay = _still_running(contenders, running, answers, own, weights)
        return [c for c in running if c in stay or c == defender]

    found = in_rounds(len(contenders), items, ask, size, budget, left, seed, halt)
    running = found.running
    final = {c: together(contenders[c], found.answers[c], found.items, weights) for c in running}
    others = [c for c in running if c != defender]
    winner = max(others or running, key=lambda c: (final[c].value, -c))
    if defender is not None and winner != defender:
        ahead = found.answers[winner] - found.answers[defender]
        winner = winner if _beaten(ahead, found.items, weights) else defender
    return Race(winner, found.spent, found.rounds, len(running) == 1, *final[winner])


class Rounds(NamedTuple):
    """How a race went. running: who is left; answers: of each contender, as `ask` gave them, joined; items: those that
    all who are left were asked; spent: answers; rounds: how many still ran after each."""

    running: list[int]
    answers: dict[int, np.ndarray]
    items: list[Item]
    spent: int
    rounds: tuple[int, ...]


def in_rounds(
    count: int,
    items: Sequence[Item],
    ask: Callable[[int, list[int]], np.ndarray],
    size: int,
    budget: int,
    left: Callable[[list[int], dict[int, np.ndarray], list[Item]], list[int]],
    seed: int = 0,
    halt: Callable[[], bool] = lambda: False,
) -> Rounds:
    """Ask `count` contenders more and more items. ask(contender, positions) -> what it answered, [.., items];
    left(running, answers so far, the items they are to) -> who runs on; the others: see race."""
    rng = np.random.default_rng(seed)
    order = {}
    for task in by_task(items):
        order[task] = list(rng.permutation([i for i, item in enumerate(items) if item.task == task]))
    running, asked, spent, rounds = list(range(count)), [], 0, []
    answers: dict[int, np.ndarray] = {c: np.zeros(0) for c in running}
    while len(running) > 1 and not halt():
        size = min(size, (budget - spent) // (len(running) * len(order)))
        batch = []
        for positions in order.values():
            batch += [int(i) for i in positions[:size]]
        if not batch:
            break
        order = {task: positions[size:] for task, positions in order.items()}
        for c in running:
            more = ask(c, batch)
            answers[c] = np.concatenate([answers[c], more], axis=-1) if asked else more
        spent += len(batch) * len(running)
        asked += batch
        size *= 2
        running = left(running, answers, [items[i] for i in asked])
        rounds.append(len(running))
    return Rounds(running, answers, [items[i] for i in asked], spent, tuple(rounds))


def _still_running(
    contenders, running: list[int], answers: dict[int, np.ndarray], items: list[Item], weights
) -> list[int]:
    """Those that are not two standard errors of the paired difference behind the leader."""
    score = {c: together(contenders[c], answers[c], items, weights).value for c in running}
    leader = max(running, key=lambda c: (score[c], -c))
    kept = []
    for c in running:
        gap = _gap(contenders[leader], contenders[c])
        behind = together(gap, answers[leader] - answers[c], items, weights)
        if c == leader or behind.value <= 2 * behind.stderr:
            kept.append(c)
    return kept


def _beaten(ahead: np.ndarray, items: list[Item], weights: Mapping[str, float] | None) -> bool:
    """Whether paired differences of responses, float64 [items], are two standard errors above zero: as if of each task
    one more item had spoken for either, so that a few that happen to agree are no proof."""
    if not items:
        return False
    tasks = list(dict.fromkeys(item.task for item in items))
    either = [next(item for item in items if item.task == task) for task in tasks for _ in range(2)]
    mean, error = mean_over_tasks(np.concatenate([ahead, [1.0, -1.0] * len(tasks)]), [*items, *either], weights)
    return mean > 2 * error


def _gap(a: Contender, b: Contender) -> Contender:
    return Contender("", a.value - b.value, float(np.hypot(a.stderr, b.stderr)))


def together(
    contender: Contender, answers: np.ndarray, items: list[Item], weights: Mapping[str, float] | None
) -> Estimate:
    """The search's estimate and the race's mean, weighted by their precision."""
    if not len(answers):
        return Estimate(contender.value, contender.stderr)
    mean, error = mean_over_tasks(answers, items, weights)
    p, q = 1 / max(error, 1e-3) ** 2, 1 / max(contender.stderr, 1e-3) ** 2
    if not np.isfinite(q):
        return Estimate(mean, error)
    return Estimate((p * mean + q * contender.value) / (p + q), (p + q) ** -0.5)
