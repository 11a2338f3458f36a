"""The loop that learns weights: merge, ask, one gradient, one step of Adam.

Which items a step asks follows from the seed and the step alone, merging and gradients are summed in a fixed order: a
fit that was stopped goes on from its State as if it had not been, bit for bit on a CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from merge3.errors import BadInput
from merge3.learn.coefficients import Coefficients
from merge3.learn.distributions import Asked, batches, log_probabilities
from merge3.learn.losses import Loss, Target
from merge3.learn.room import Room
from merge3.learn.settings import FitSettings
from merge3.learn.weighted import Weighted
from merge3.tasks.items import place

_MOMENTS = ("exp_avg", "exp_avg_sq")  # as Adam names them


class FitError(BadInput):
    """A loss, or a gradient of it, that is NaN or infinite: nothing could be learned from here on."""

    reason = "fit"


@dataclass(frozen=True)
class State:
    """All that a fit is after some steps: raw numbers and Adam's moments, float32 [experts, groups] each."""

    step: int
    raw: torch.Tensor
    moments: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Step:
    """number: from 1. loss: the mean of tasks' losses, before the step; state: after it; weights: what `state` merges
    with, float32 [experts, tensors]."""

    number: int
    loss: float
    losses: dict[str, float]
    state: State
    weights: torch.Tensor


@dataclass(frozen=True)
class Lesson:
    """What is learned of one task. head: the endpoint whose head answers; targets: of each item, on the CPU."""

    task: str
    asked: Sequence[Asked]
    targets: Sequence[Target]
    head: str | None = None


class _Question(NamedTuple):
    """An item of a step. share: of its task's loss."""

    task: str
    asked: Asked
    target: Target
    share: float


@dataclass
class Fitting:
    """A fit over a live model.

    for step in Fitting(weighted, coefficients, lessons, LOSSES["entropy"], settings, room).steps(): ...
    """

    weighted: Weighted
    coefficients: Coefficients
    lessons: Sequence[Lesson]
    loss: Loss
    settings: FitSettings
    room: Room

    def __post_init__(self):
        self._start = self.coefficients.raw.detach().clone()

    def steps(self, state: State | None = None) -> Iterator[Step]:
        """Steps after `state`'s; without one from the start, whatever was fitted before. Raises FitError naming the
        step and an item where a loss is no number."""
        raw = self.coefficients.raw
        optimizer = torch.optim.Adam([raw], lr=self.settings.learning_rate, foreach=False)
        first = 0
        if state is None:
            with torch.no_grad():
                raw.copy_(self._start)
        else:
            first = self._restore(optimizer, state)
        for number in range(first + 1, self.settings.steps + 1):
            weights = self.coefficients.weights()
            self.weighted.write(weights.detach())
            losses = self._ask(number)
            gradient = self.weighted.gradient.float()
            if not gradient.isfinite().all():
                where = f"fit: step {number}"
                raise FitError(where, "gradients that are NaN or infinite", "finite ones", _HINT)
            optimizer.zero_grad()
            weights.backward(gradient)
            optimizer.step()
            after = self._state(optimizer, number)
            mean = sum(losses.values()) / len(losses)
            yield Step(number, mean, losses, after, self.coefficients.weights().detach())

    def _ask(self, number: int) -> dict[str, float]:
        """Task -> its loss; the gradient of their mean is left in `weighted`. Tasks that one head answers share
        forward passes: the fewer there are, the fewer gradients become numbers."""
        losses = dict.fromkeys((lesson.task for lesson in self.lessons), 0.0)
        with self.weighted.gradients(), self.room.kept(self.weighted.slot.model):
            for head, questions in self._drawn(number).items():
                self.weighted.slot.use_head(head)
                asked = [question.asked for question in questions]
                order = sorted(range(len(asked)), key=lambda at: asked[at].width)
                for batch in batches(order, asked, self.room.batch_tokens):
                    own = [questions[at] for at in batch]
                    for question, loss in zip(own, self._learn(number, own)):
                        losses[question.task] += loss * question.share
        return losses

    def _drawn(self, number: int) -> dict[str | None, list[_Question]]:
        """Head -> what it is asked in this step."""
        found: dict[str | None, list[_Question]] = {}
        for index, lesson in enumerate(self.lessons):
            chosen = drawn(len(lesson.asked), self.settings.batch, number, [self.settings.seed, index])
            for at in chosen:
                question = _Question(lesson.task, lesson.asked[at], lesson.targets[at], 1 / len(chosen))
                found.setdefault(lesson.head, []).append(question)
        return found

    def _learn(self, number: int, own: Sequence[_Question]) -> list[float]:
        """The loss of each, after a forward and a backward pass."""
        costs = []
        for question, log_p in zip(own, log_probabilities(self.weighted.slot.model, [q.asked for q in own])):
            target = question.target
            costs.append(self.loss.cost(log_p, None if target is None else target.to(log_p.device)))
        values = [float(cost.detach()) for cost in costs]
        for question, value in zip(own, values):
            if not math.isfinite(value):
                where = f"fit: step {number}, {place(question.asked.item)}"
                raise FitError(where, f"a loss of {value}", "a finite one", _HINT)
        shares = torch.tensor([question.share / len(self.lessons) for question in own], device=costs[0].device)
        (torch.stack(costs) * shares).sum().backward()
        return values

    def _restore(self, optimizer: torch.optim.Adam, state: State) -> int:
        raw = self.coefficients.raw
        if state.raw.shape != raw.shape:
            raise BadInput("state", f"coefficients {list(state.raw.shape)}", f"{list(raw.shape)}, this fit's")
        with torch.no_grad():
            raw.copy_(state.raw)
        known = {"step": torch.tensor(float(state.step))}
        known |= {name: moment.clone() for name, moment in zip(_MOMENTS, state.moments)}
        optimizer.state[raw] = known
        return state.step

    def _state(self, optimizer: torch.optim.Adam, number: int) -> State:
        raw = self.coefficients.raw
        moments = tuple(optimizer.state[raw][name].clone() for name in _MOMENTS)
        return State(number, raw.detach().clone(), moments)


_HINT = "a smaller learning_rate, or a dtype with more room"


def drawn(count: int, size: int, number: int, seed: Sequence[int]) -> list[int]:
    """Which of `count` items step `number` (from 1) asks: `size` of them, every item once before any comes again."""
    size = min(size, count)
    chosen: list[int] = []
    for position in range((number - 1) * size, number * size):
        epoch, at = divmod(position, count)
        chosen.append(int(_order(count, (*seed, epoch))[at]))
    return chosen


@functools.lru_cache(maxsize=64)
def _order(count: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(list(seed)).permutation(count)
