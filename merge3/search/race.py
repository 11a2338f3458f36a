"""After a search: its top candidates answer more items until it is clear who is best.

The best of many noisy estimates is partly the luckiest. So the best few answer further random items,
the same for all; whoever falls two standard errors of the paired difference behind leaves, the search's
own estimates counted in; the number of items doubles from round to round (successive halving: Jamieson
and Talwalkar 2016), and the last round takes what the budget leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from merge3.fitness import mean_over_tasks
from merge3.tasks import Item


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


def race(
    contenders: Sequence[Contender], items: Sequence[Item], ask: Callable[[int, list[int]], np.ndarray], size: int, budget: int,
    weights: dict[str, float] | None = None, seed: int = 0, halt: Callable[[], bool] = lambda: False,
) -> Race:  # fmt: skip
    """Race them. items: what the search's last subset leaves out (earlier ones may overlap: then a few
    answers count twice); ask(contender, positions) -> responses.

    size: items per task in the first round; budget: answers at most.
    """
    rng = np.random.default_rng(seed)
    order = {task: list(rng.permutation([i for i, item in enumerate(items) if item.task == task])) for task in
             dict.fromkeys(item.task for item in items)}  # fmt: skip
    running, asked, spent, rounds = list(range(len(contenders))), [], 0, []
    answers: dict[int, np.ndarray] = {c: np.zeros(0) for c in running}
    while len(running) > 1 and not halt():
        size = min(size, (budget - spent) // (len(running) * len(order)))
        batch = [int(i) for positions in order.values() for i in positions[:size]]
        if not batch:
            break
        order = {task: positions[size:] for task, positions in order.items()}
        for c in running:
            answers[c] = np.concatenate([answers[c], ask(c, batch)])
        spent += len(batch) * len(running)
        asked += batch
        size *= 2
        own = [items[i] for i in asked]
        score = {c: _together(contenders[c], answers[c], own, weights)[0] for c in running}
        leader = max(running, key=lambda c: (score[c], -c))
        kept = []
        for c in running:
            behind = _together(_gap(contenders[leader], contenders[c]), answers[leader] - answers[c], own, weights)
            if c == leader or behind[0] <= 2 * behind[1]:
                kept.append(c)
        running = kept
        rounds.append(len(running))
    own = [items[i] for i in asked]
    final = {c: _together(contenders[c], answers[c], own, weights) for c in running}
    winner = max(running, key=lambda c: (final[c][0], -c))
    return Race(winner, spent, tuple(rounds), len(running) == 1, *final[winner])


def _gap(a: Contender, b: Contender) -> Contender:
    return Contender("", a.value - b.value, float(np.hypot(a.stderr, b.stderr)))


def _together(contender: Contender, answers: np.ndarray, items: list[Item], weights) -> tuple[float, float]:
    """The search's estimate and the race's mean, weighted by their precision."""
    if not len(answers):
        return contender.value, contender.stderr
    mean, error = mean_over_tasks(answers, items, weights)
    p, q = 1 / max(error, 1e-3) ** 2, 1 / max(contender.stderr, 1e-3) ** 2
    if not np.isfinite(q):
        return mean, error
    return (p * mean + q * contender.value) / (p + q), (p + q) ** -0.5
