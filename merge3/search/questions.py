"""The items of a run: read, split into search and held-out, and which of them every candidate answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from merge3.checkpoint.read import resolve
from merge3.errors import ConfigError
from merge3.recipe import ModelRef
from merge3.search.config import EvolveConfig
from merge3.search.policy import Policy, decide
from merge3.search.seeds import seed_of
from merge3.tasks import Item, fit_to_model, read_items, split_heldout


@dataclass(frozen=True)
class Questions:
    """search: what candidates may be asked; subset: what each is asked, unless calibration chooses it;
    heldout: never seen by the search. skipped, truncated: task -> how many
    items were too long, which is said in `notes`."""

    search: list[Item]
    subset: list[Item]
    heldout: list[Item]
    weights: dict[str, float]
    heads: dict[str, str]
    policy: Policy
    skipped: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load_questions(config: EvolveConfig) -> Questions:
    """Read, split and subset the items of every task. What is too long is dealt with first, so that no later
    stage sees other items than another."""
    items, weights, heads, limits, notes = [], {}, {}, {}, []
    skipped, truncated = Counter(), Counter()
    for task in config.tasks:
        own = read_items(task.items, task.name)
        if task.name is not None:
            own = [replace(item, task=task.name) for item in own]
        if task.metric is not None and task.metric != "acc,none":  # mergekit-evolve's default for lm-eval
            own = [replace(item, metric=task.metric) for item in own]
        if task.too_long != "error":
            fitted = fit_to_model(own, base_folder(config), task.too_long, config.apply_chat_template)
            own = fitted.items
            skipped.update(fitted.skipped)
            truncated.update(fitted.truncated)
            notes += fitted.notes
        items += own
        weights.update({item.task: task.weight for item in own})
        limits.update({item.task: task.limit or config.limit for item in own})
        if task.head:
            heads.update({item.task: task.head for item in own})
    seen = set()
    for item in items:
        if (item.task, item.id) in seen:
            raise ConfigError(f"task {item.task!r}", f"item id {item.id!r} twice", "unique ids within a task")
        seen.add((item.task, item.id))
    seed = config.optimizer.seed
    search, heldout = split_heldout(items, config.heldout.fraction, seed_of("held-out", seed))
    search = _limited(search, limits, np.random.default_rng(seed_of("limit", seed)) if config.shuffle else None)
    policy = decide(config, search)
    subset = search
    if policy.extract == "random":
        subset = per_task(search, config.extract.size, np.random.default_rng(seed_of("subset", seed, 0)))
    return Questions(search, subset, heldout, weights, heads, policy, dict(skipped), dict(truncated), tuple(notes))


def base_folder(config: EvolveConfig) -> Path:
    """Where the base lies, whose tokenizer and positions say how long items may be."""
    ref = ModelRef.parse(config.models[0], "base_model")
    return resolve(ref.path, ref.revision)


def _limited(items: list[Item], limits: dict[str, int | None], rng: np.random.Generator | None) -> list[Item]:
    """Of every task as many items as its limit says, the first or random ones; all where it says nothing."""
    chosen = []
    for task in dict.fromkeys(item.task for item in items):
        own = [item for item in items if item.task == task]
        chosen += own if limits[task] is None else per_task(own, limits[task], rng)
    return chosen


def per_task(items: list[Item], size: int, rng: np.random.Generator | None) -> list[Item]:
    """The first `size` items of every task, or as many random ones."""
    chosen = []
    for task in dict.fromkeys(item.task for item in items):
        own = [item for item in items if item.task == task]
        at = range(min(size, len(own))) if rng is None else sorted(rng.permutation(len(own))[:size])
        chosen += [own[i] for i in at]
    return chosen
