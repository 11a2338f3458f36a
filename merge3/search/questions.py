"""The items of a run: read, split into search and held-out, and which of them every candidate answers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from merge3.errors import ConfigError
from merge3.search.calibration import assumptions
from merge3.search.config import EvolveConfig
from merge3.tasks import Item, read_items, split_heldout


@dataclass(frozen=True)
class Questions:
    """search: what candidates may be asked; subset: what each is asked, unless calibration chooses it;
    heldout: never seen by the search; assumed: (extract, estimate, why)."""

    search: list[Item]
    subset: list[Item]
    heldout: list[Item]
    weights: dict[str, float]
    heads: dict[str, str]
    assumed: tuple[str, str, str] = ("all", "mean", "")


def load_questions(config: EvolveConfig) -> Questions:
    """Read, split and subset the items of every task."""
    items, weights, heads = [], {}, {}
    for task in config.tasks:
        own = read_items(task.items, task.name)
        if task.name is not None:
            own = [replace(item, task=task.name) for item in own]
        if task.metric is not None and task.metric != "acc,none":  # mergekit-evolve's default for lm-eval
            own = [replace(item, metric=task.metric) for item in own]
        items += own
        weights.update({item.task: task.weight for item in own})
        if task.head:
            heads.update({item.task: task.head for item in own})
    seen = set()
    for item in items:
        if (item.task, item.id) in seen:
            raise ConfigError(f"task {item.task!r}", f"item id {item.id!r} twice", "unique ids within a task")
        seen.add((item.task, item.id))
    seed = config.optimizer.seed
    search, heldout = split_heldout(items, config.heldout.fraction, seed)
    if config.limit is not None:
        search = per_task(search, config.limit, None)
    assumed = assumptions(config, search)
    subset = search
    if assumed[0] == "random":
        subset = per_task(search, config.extract.size, np.random.default_rng(seed))
    return Questions(search, subset, heldout, weights, heads, assumed)


def per_task(items: list[Item], size: int, rng: np.random.Generator | None) -> list[Item]:
    """The first `size` items of every task, or as many random ones."""
    chosen = []
    for task in dict.fromkeys(item.task for item in items):
        own = [item for item in items if item.task == task]
        at = range(min(size, len(own))) if rng is None else sorted(rng.permutation(len(own))[:size])
        chosen += [own[i] for i in at]
    return chosen
