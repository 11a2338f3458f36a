"""A world of a study: its items and what they measure, its models in one pool, and the merges that one slot holds one
after the other."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from merge3.client.evaluate import check_unique
from merge3.client.run import open_pool
from merge3.client.study_config import StudyConfig, StudyMethod, World, files_of, recipe_of, subsets_of
from merge3.client.study_journal import packed
from merge3.engine import LocalEngine
from merge3.errors import ConfigError, Merge3Error
from merge3.live.heads import own_heads
from merge3.methods.filters import check_filters
from merge3.pool import Pool
from merge3.registration import Registration
from merge3.search.seeds import seed_of
from merge3.tasks import Item, read_items, split_heldout


@dataclass(frozen=True)
class Questions:
    """A world's items. tuning: those that parameters are tuned on; measured: those that count, grouped by task."""

    tuning: tuple[Item, ...]
    measured: tuple[Item, ...]
    heldout: tuple[str, ...]  # tasks that are no expert's

    @property
    def tasks(self) -> tuple[str, ...]:
        """Of the measured items, in their order."""
        return tuple(dict.fromkeys(item.task for item in self.measured))

    def outside(self, world: World, subset: Sequence[str]) -> tuple[str, ...]:
        """The tasks that a merge of these experts was not made for."""
        return self.heldout or tuple(task for task in world.experts if task not in subset)


@dataclass(frozen=True)
class Cell:
    """One merge of the grid."""

    world: World
    method: StudyMethod
    subset: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str, tuple[str, ...]]:
        """What names it in the journal."""
        return self.world.name, self.method.label, self.subset


def key_of(line: Mapping[str, Any]) -> tuple[str, str, tuple[str, ...]]:
    """The cell that a line of the journal is of."""
    return line["world"], line["method"], tuple(line["subset"])


def read_questions(config: StudyConfig, world: World, where: str) -> Questions:
    """Raises ConfigError or ItemsError."""
    where = f"{where}: world {world.name!r}"
    items, counts = [], Counter()
    for file in files_of(world, where):
        for item in read_items(file):
            counts[item.task] += 1
            if config.limit is None or counts[item.task] <= config.limit:
                items.append(item)
    check_unique(items)
    for task in world.experts:
        if task not in counts:
            raise ConfigError(
                f"{where}: experts.{task}", "no items of this task", f"items; there are {', '.join(counts)}"
            )
    heldout = [task for task in counts if task not in world.experts] if world.heldout is None else world.heldout
    for task in heldout:
        if task not in counts or task in world.experts:
            found = f"{task!r} has an expert" if task in world.experts else f"no items of task {task!r}"
            raise ConfigError(f"{where}: heldout", found, "tasks with items and without an expert")
    wanted = [*world.experts, *heldout]
    items = sorted((item for item in items if item.task in wanted), key=lambda item: wanted.index(item.task))
    if not config.tune:
        return Questions((), tuple(items), tuple(heldout))
    measured, tuning = split_heldout(items, config.tune_share, seed_of("held-out", config.seed))
    return Questions(tuple(tuning), tuple(measured), tuple(heldout))


def cells_of(config: StudyConfig, world: World) -> Iterator[Cell]:
    """Every cell of a world, those of one subset together."""
    for count in config.experts:
        for subset in subsets_of(list(world.experts), count, config.subsets, config.seed):
            for method in config.methods:
                yield Cell(world, method, subset)


class Opened:
    """A world's models, open. where: names the study in messages."""

    def __init__(
        self,
        config: StudyConfig,
        world: World,
        questions: Questions,
        where: str,
        device: str = "cpu",
        memory_budget: str | None = None,
        read: bool = True,
    ):
        self.config, self.world, self.questions = config, world, questions
        self.where = f"{where}: world {world.name!r}"
        if read:
            pool = open_pool(world.models, device, True, memory_budget)
        else:
            pool = Pool.open(world.models[0], world.models[1:], device, memory_budget=memory_budget)
        self.engine = LocalEngine(pool, getattr(torch, config.dtype) if config.dtype else None)
        self._heads = self._told_heads() if own_heads(pool) else {}
        self._measured = self._asking(questions.measured)
        self._tuning = lru_cache(maxsize=None)(self._tuning_of)

    def check(self) -> None:
        """Raises what merging or asking would refuse. Answers nothing."""
        self.engine.prepare(self._measured)
        seen = set()
        for cell in cells_of(self.config, self.world):
            if (key := (cell.method.label, len(cell.subset))) not in seen:
                seen.add(key)
                for parameters in self.config.settings(cell.method, len(cell.subset)):
                    recipe = recipe_of(self.config, cell.method, self.world, cell.subset, parameters)
                    self.engine.slot.compile(recipe, where := f"{self.where}: {cell.method.label}")
                    check_filters(recipe, self.engine.pool.layouts.values(), where)

    def alone(self, task: str | None) -> dict[str, Any]:
        """The journal's line of an expert, on its own task, or (None) of the base, on all. Raises ConfigError where it
        is never right, so that nothing can be counted by it."""
        model = self.world.base if task is None else self.world.experts[task]
        asked = self._measured
        if task is not None:
            asked = self._asking([item for item in self.questions.measured if item.task == task])
        (evaluation,) = self.engine.evaluate(asked, [model])
        responses = evaluation.answers()
        for name, positions in asked.tasks().items():
            if (task is not None or name in self.questions.heldout) and not responses[positions].any():
                expected = "one that is right now and then: accuracies are told as shares of its own"
                raise ConfigError(f"{self.where}: {model}", f"not one right answer to task {name!r}", expected)
        return {"world": self.world.name, "model": task or "", "responses": packed(responses)}

    def answer(self, cell: Cell) -> dict[str, Any]:
        """The journal's line of a cell: what was tuned, and what the merge answers; `error` where it has no answers."""
        began = time.perf_counter()
        tried = self.config.settings(cell.method, len(cell.subset))
        chosen, tuning = tried[0], []
        if len(tried) > 1:
            tuning = [self._value(cell, parameters) for parameters in tried]
            chosen = tried[int(np.argmax(tuning))]
        line: dict[str, Any] = {"world": self.world.name, "method": cell.method.label, "subset": list(cell.subset)}
        line |= {"parameters": chosen, "tuning": tuning}
        recipe = recipe_of(self.config, cell.method, self.world, cell.subset, chosen)
        (evaluation,) = self.engine.evaluate(self._measured, [recipe])
        try:
            line["responses"] = packed(evaluation.answers())
        except Merge3Error as error:
            line["error"] = str(error)
        return line | {"seconds": time.perf_counter() - began}

    def _value(self, cell: Cell, parameters: Mapping[str, Any]) -> float:
        """Accuracy over the subset's tasks on the items to tune by; of a merge without answers less than any."""
        recipe = recipe_of(self.config, cell.method, self.world, cell.subset, dict(parameters))
        (evaluation,) = self.engine.evaluate(self._tuning(cell.subset), [recipe])
        return -1.0 if evaluation.error is not None else evaluation.value

    def _tuning_of(self, subset: tuple[str, ...]) -> Registration:
        return self._asking([item for item in self.questions.tuning if item.task in subset])

    def _asking(self, items: Sequence[Item]) -> Registration:
        heads = {item.task: self._heads[item.task] for item in items if item.task in self._heads}
        return Registration(tuple(items), heads=heads, seed=self.config.seed)

    def _told_heads(self) -> dict[str, str]:
        heads = self.world.experts | self.world.heads
        for task in self.questions.heldout:
            if task not in heads:
                expected = "`heads: {task: model}`, as every model has a head of its own"
                raise ConfigError(f"{self.where}: heads", f"none for task {task!r}", expected)
        return heads
