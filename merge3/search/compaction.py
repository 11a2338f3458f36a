"""A search over compacted experts: what they lose is measured before it begins, and its winner as it is exported.

The largest parts of a task vector need not be those that matter. So each expert is asked search items of its own task,
once as its files have it and once as the pool holds it, and a loss beyond two standard errors is said.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from merge3.engine import PoolInfo, Taken
from merge3.errors import Merge3Warning
from merge3.experts import ExpertLoss
from merge3.recipe import Recipe
from merge3.search.context import Search
from merge3.search.journal import Candidate
from merge3.search.measure import Measured, measured, name_of, remembered
from merge3.search.questions import per_task
from merge3.tasks import Item, LogitsError, places_by_task

ITEMS = 100  # of every task, at most
STAGE = "experts"  # in the journal


@dataclass(frozen=True)
class Held:
    """An expert on its own task's items: the task on which its files' weights gain most over the base. stored, held:
    accuracy with those and with the pool's; loss, stderr: of their paired difference."""

    model: str
    task: str
    items: int
    stored: float
    held: float
    loss: float
    stderr: float

    @property
    def loses(self) -> bool:
        """Whether more is lost than chance explains."""
        return self.loss > 2 * self.stderr

    def describe(self, experts: str) -> str:
        """One line."""
        asked = f"{self.held:.3f} of {self.items} search items of {self.task}, {self.stored:.3f} as its files have it"
        return f"{self.model} as {experts}: {asked}: {self.loss:+.3f} lost, standard error {self.stderr:.3f}"


class Compaction(NamedTuple):
    """What a run's result says of it. info: of the pool; checks: of experts that lose anything, and how many answers
    they took; searched: held-out accuracy of the winner as it was searched, where that is another merge than the
    exported."""

    info: PoolInfo
    checks: Sequence[Held]
    answers: int
    searched: Measured | None = None

    def told(self) -> dict[str, Any]:
        """For result.json."""
        return {
            "option": self.info.experts,
            "loss": [loss._asdict() for loss in self.info.losses],
            "endpoints": [asdict(check) for check in self.checks],
            "answers": self.answers,
            "searched_heldout": self.searched,
        }


def check_held(search: Search) -> list[Held]:
    """Ask every expert that loses anything, both ways; the journal's answers where it has them. A Merge3Warning for
    each that loses more than two standard errors, or has no answers any more."""
    info, found = search.engine.info(), []
    losing = [loss.model for loss in info.losses if loss.error > 0]
    if not losing:
        return found
    every = search.questions.search
    rng = np.random.default_rng(search.seed("experts"))
    items = per_task(every, ITEMS, rng)
    places = {id(item): place for place, item in enumerate(every)}
    positions = [places[id(item)] for item in items]

    def ask(model: str, stored: bool) -> np.ndarray:
        name = f"{info.endpoints.index(model)} {'stored' if stored else 'held'}"
        subject = Taken(model, stored)
        return search.journal.remember(STAGE, name, positions, lambda: search.answers(subject, items))

    base = ask(info.endpoints[0], True)
    for model in losing:
        if search.stop():
            break
        try:
            check = _held(model, items, base, ask(model, True), ask(model, False))
        except LogitsError as error:
            warnings.warn(f"{model} as {info.experts} has no answers: {error}", Merge3Warning, stacklevel=2)
            continue
        found.append(check)
        if check.loses:
            hint = "a higher density, int8 or full loses less"
            said = f"{check.describe(info.experts)}: more than two standard errors; {hint}"
            warnings.warn(said, Merge3Warning, stacklevel=2)
    return found


def compaction(
    search: Search, checks: Sequence[Held], best: Candidate, recipe: Recipe, items: Sequence[Item]
) -> Compaction | None:
    """What there is to say at the end; None where experts are held as they are. best, recipe: the winner."""
    info = search.engine.info()
    if info.experts == "full":
        return None
    searched = None
    if any(loss.error > 0 for loss in info.losses):
        answers = remembered(search, f"{name_of(best)} as searched", recipe, items)
        searched = measured(search.read(answers, len(items)).responses, items, search.weights)
    return Compaction(info, checks, search.journal.answers(STAGE), searched)


def told_of_experts(result: Mapping[str, Any]) -> list[str]:
    """What a result says of experts that were compacted, a line each; none where they were held as they are."""
    said = result.get("experts")
    if said is None:
        return []
    if said["searched_heldout"] is None:
        return [f"searched with experts as {said['option']}, of which nothing is lost"]
    found, exported = said["searched_heldout"]["accuracy"], result["heldout_detail"]["accuracy"]
    first = f"searched with experts as {said['option']}: the merge that was searched answers {found:.3f} of these items"
    lines = [f"{first}, the exported one, of the full checkpoints, {exported:.3f}: the table has the latter"]
    lines += [ExpertLoss(**loss).describe(said["option"]) for loss in said["loss"]]
    return lines + [Held(**check).describe(said["option"]) for check in said["endpoints"]]


def _held(model: str, items: Sequence[Item], base: np.ndarray, stored: np.ndarray, held: np.ndarray) -> Held:
    tasks = places_by_task(items)
    task = max(tasks, key=lambda name: float((stored - base)[tasks[name]].mean()))
    own = tasks[task]
    lost = (stored - held)[own]
    stderr = float(lost.std(ddof=1)) / math.sqrt(len(own)) if len(own) > 1 else 0.0
    return Held(model, task, len(own), float(stored[own].mean()), float(held[own].mean()), float(lost.mean()), stderr)
