"""Representation Surgery (2402.02705): per task an adapter z' = z − U·ReLU(D·z) on the last representation of a merge.

It is fitted so that z' is near what the task's own expert has there, by the L1 distance, on unlabelled inputs. What the
merge and the experts have is computed once; fitting is then a small loop on the CPU, the same bits for the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from merge3.errors import RecipeError
from merge3.learn.features import features
from merge3.learn.fitting import FitError, drawn
from merge3.learn.lessons import TaskToLearn, questions
from merge3.learn.losses import LOSSES
from merge3.learn.settings import SurgerySettings
from merge3.learn.surgery_file import Adapters, load, save
from merge3.live.hooks import Adapter, width_of
from merge3.live.slot import Slot
from merge3.recipe import Recipe
from merge3.threads import few_threads

__all__ = ["Adapters", "Features", "Operation", "Surgery", "SurgeryStep", "fit_adapters", "load", "operate", "save"]


@dataclass(frozen=True, eq=False)
class Surgery:
    """What an engine is asked. experts: task -> the endpoint whose representation is matched."""

    settings: SurgerySettings
    experts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Features:
    """Of one task's items. merged, expert: float32 [places, width]; starts: where each item's places begin, and where
    the last one's end, int64 [items + 1]."""

    merged: torch.Tensor
    expert: torch.Tensor
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @staticmethod
    def of(merged: Sequence[torch.Tensor], expert: Sequence[torch.Tensor]) -> Features:
        """From float32 [places, width] of each item."""
        starts = np.cumsum([0, *(len(states) for states in merged)])
        return Features(torch.cat(list(merged)), torch.cat(list(expert)), starts)

    def distance(self, adapter: Adapter | None, items: Sequence[int] | None = None) -> torch.Tensor:
        """L1: mean over items (all by default) of the mean over their places of the mean over the width of |z' − z_e|;
        a scalar. adapter: None for z itself."""
        rows, weights = self._rows(range(len(self)) if items is None else items)
        states = self.merged[rows] if adapter is None else adapter.changed(self.merged[rows])
        return (weights * (states - self.expert[rows]).abs().mean(-1)).sum()

    def _rows(self, items: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        own = [np.arange(self.starts[i], self.starts[i + 1]) for i in items]
        counts = np.array([len(rows) for rows in own])
        weights = np.repeat(1.0 / (counts * len(own)), counts).astype(np.float32)
        return torch.from_numpy(np.concatenate(own)), torch.from_numpy(weights)


@dataclass(frozen=True)
class SurgeryStep:
    """number: from 1. losses: task -> the L1 distance of the step's inputs before it, loss: their mean. adapters: after
    the last step."""

    number: int
    loss: float
    losses: Mapping[str, float]
    adapters: Mapping[str, Adapter] | None = None


def started(width: int, rank: int, seed: Sequence[int]) -> Adapter:
    """An adapter that changes nothing yet: D as kaiming_uniform_(a=√5) draws it, within ±1/√width; U zeros."""
    number = np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(number >> np.uint64(1)))
    down = torch.empty(rank, width)
    torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    return Adapter(down, torch.zeros(width, rank))


def fit_adapters(tasks: Mapping[str, Features], settings: SurgerySettings) -> Iterator[SurgeryStep]:
    """Adam on the L1 distance of each task's own inputs; which ones a step has follows from the seed and the step.

    Deterministic, on the CPU. Raises FitError naming the step and task where a distance is no number.
    """
    adapters: dict[str, Adapter] = {}
    for index, (task, known) in enumerate(tasks.items()):
        adapters[task] = started(known.merged.shape[-1], settings.rank, [settings.seed, index])
    parameters = [tensor.requires_grad_(True) for adapter in adapters.values() for tensor in adapter]
    # One optimizer for all: Adam moves every number by its own gradients alone.
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, foreach=False)
    for number in range(1, settings.steps + 1):
        losses = {}
        with few_threads(0):  # small products: the bits are those of one, however many there are
            optimizer.zero_grad()
            for index, (task, known) in enumerate(tasks.items()):
                chosen = drawn(len(known), settings.batch, number, [settings.seed, index])
                with torch.enable_grad():
                    loss = known.distance(adapters[task], chosen)
                losses[task] = float(loss.detach())
                if not math.isfinite(losses[task]):
                    where, found = f"surgery: step {number}, task {task!r}", f"a distance of {losses[task]}"
                    raise FitError(where, found, "a finite one", "a smaller learning_rate")
                loss.backward()
            optimizer.step()
        found = None
        if number == settings.steps:
            found = {task: Adapter(*(t.detach().clone() for t in adapter)) for task, adapter in adapters.items()}
        yield SurgeryStep(number, sum(losses.values()) / len(losses), losses, found)


def check_surgery(settings: SurgerySettings, model: torch.nn.Module) -> None:
    """Raises BadInput for a live model without a head, RecipeError for a rank above the width before it."""
    width = width_of(model)
    if settings.rank > width:
        expected = f"at most {width}, the width of the last representation"
        raise RecipeError("surgery.rank", f"found {settings.rank}", expected)


@dataclass(frozen=True)
class Operation:
    """One surgery on a live model's merge, its items tokenised, the experts and the merge asked."""

    features: Mapping[str, Features]
    settings: SurgerySettings
    experts: Mapping[str, str]
    recipe: str

    def steps(self) -> Iterator[SurgeryStep]:
        """See fit_adapters."""
        return fit_adapters(self.features, self.settings)

    def distances(self, adapters: Mapping[str, Adapter] | None = None) -> dict[str, float]:
        """Task -> the L1 distance of all its inputs, with or without adapters."""
        with torch.no_grad():
            return {t: float(known.distance(adapters and adapters[t])) for t, known in self.features.items()}


def operate(
    slot: Slot, recipe: Recipe, tasks: Sequence[TaskToLearn], settings: SurgerySettings, folder, limit: int = 4096
) -> Operation:
    """The features of each task's items: of the recipe's merge, and of the task's expert at the same places.

    Raises RecipeError, ItemsError, BadInput or LogitsError for what cannot be fitted. Overwrites the live model.
    """
    check_surgery(settings, slot.model)
    asked, known = {}, {}
    for task in tasks:
        if task.expert is not None and task.expert not in slot.pool.endpoints:
            where = f"surgery: items: task {task.name!r}: model"
            raise RecipeError(where, f"found {task.expert!r}", ", ".join(slot.pool.endpoints))
        asked[task.name] = questions(slot, task, LOSSES["expert_kl"], folder, settings.over, "surgery").asked
        slot.use_head(task.head)
        known[task.name] = features(slot.model, asked[task.name], task.expert, limit)
    slot.swap(recipe)
    found = {}
    for task in tasks:
        slot.use_head(task.head)
        found[task.name] = Features.of(features(slot.model, asked[task.name], "merge", limit), known[task.name])
    return Operation(found, settings, {task.name: task.expert for task in tasks}, recipe.hash())
