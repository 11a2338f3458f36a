"""Learning from a registration's items, for an engine: what was prepared for the last fit is remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from merge3.errors import BadInput
from merge3.learn.fit import Fit, FitStep, prepare, steps
from merge3.learn.fitting import Fitting, State
from merge3.learn.lessons import TaskToLearn
from merge3.learn.surgery import Operation, Surgery, operate
from merge3.live.slot import Slot
from merge3.memory import enough_memory
from merge3.packaging import chat_template
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.rounds import Rounds


class Learning:
    """Fits and operations on a slot. last: what was fitted last, and what was prepared for it."""

    def __init__(self, slot: Slot, rounds: Rounds):
        self.slot, self.pool, self._rounds = slot, slot.pool, rounds
        self.last: tuple[tuple[Registration, Fit] | None, Fitting | None] = None, None

    @property
    def prepared(self) -> bool:
        """Whether room is kept for a fit that may go on."""
        return self.last[1] is not None

    def fit(
        self,
        registration: Registration,
        fit: Fit,
        state: State | None,
        told: Callable[[str], None],
        seconds: float,
    ) -> Iterator[FitStep]:
        """See LocalEngine."""
        fitting = self._fitting(registration, fit)
        told(fitting.room.describe())
        yield from steps(fit, fitting, state, seconds)

    def forget(self) -> None:
        """Give up what was prepared for a fit, and the room it took."""
        self.last = None, None
        self.pool.reserve(0)

    def operate(self, registration: Registration, recipe: Recipe, surgery: Surgery) -> Operation:
        """See Engine."""
        tasks, folder = self.lessons(registration, recipe, surgery.experts)
        with enough_memory(self.pool.device):
            return operate(self.slot, recipe, tasks, surgery.settings, folder)

    def lessons(
        self, asked: Registration, recipe: Recipe, experts: Mapping[str, str]
    ) -> tuple[list[TaskToLearn], Path]:
        """(every task of a registration, the folder of the tokenizer that reads its items). Raises BadInput for
        experts that are not held whole."""
        if self.pool.compacted.experts:
            found = f"experts held as {self.pool.compacted.experts}"
            raise BadInput("experts", found, "full: what is learned, is learned of whole experts")
        self._rounds.check_heads(asked)
        template = chat_template(recipe, self.pool) if asked.chat else None
        tasks = []
        for task, positions in asked.tasks().items():
            items = [asked.items[i] for i in positions]
            tasks.append(TaskToLearn(task, items, asked.heads.get(task), experts.get(task), asked.system(task)))
        return tasks, self.pool.words.folder(template)

    def _fitting(self, asked: Registration, fit: Fit) -> Fitting:
        """Prepared once; only the last one is kept."""
        known, fitting = self.last
        if known != (asked, fit):
            self.forget()  # room before another
            tasks, folder = self.lessons(asked, fit.recipe, fit.experts)
            fitting = prepare(self.slot, fit, tasks, folder)
            self.last = (asked, fit), fitting
        return fitting
