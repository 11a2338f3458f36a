"""The items of a run: read, split into search and held-out, and which of them every candidate answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from merge3.errors import ConfigError
from merge3.fitness import check_objectives, lengths_needed
from merge3.registration import ACCURACY, Judge, Registration
from merge3.search.config import EvolveConfig, Task
from merge3.search.policy import Policy, decide
from merge3.search.seeds import seed_of
from merge3.search.words import AskedWith
from merge3.tasks import Item, fit_to_model, read_items, split_heldout
from merge3.tasks.kinds import writes

if TYPE_CHECKING:
    from merge3.adapters.judging import Benchmark

_ASKED = ("num_fewshot", "apply_chat_template", "system_instruction", "fewshot_as_multiturn")


@dataclass(frozen=True)
class Questions:
    """search: what candidates may be asked; subset: what each is asked, unless calibration chooses it;
    heldout: never seen by the search. skipped, truncated: task -> how many items were too long, which is said in
    `notes`. chat: task -> system message of prompts that the chat template wraps; judges: of lm-eval's tasks; judged:
    those -> a digest of what they hold answers against."""

    search: list[Item]
    subset: list[Item]
    heldout: list[Item]
    weights: dict[str, float]
    heads: dict[str, str]
    policy: Policy
    skipped: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    chat: dict[str, str] = field(default_factory=dict)
    judges: dict[str, Judge] = field(default_factory=dict)
    judged: dict[str, str] = field(default_factory=dict)


def load_questions(config: EvolveConfig) -> Questions:
    """Read, split and subset the items of every task. What is too long is dealt with first, so that no later
    stage sees other items than another."""
    items, weights, heads, limits, notes, chat, judges, judged = [], {}, {}, {}, [], {}, {}, {}
    spoken = AskedWith(config)
    skipped, truncated, told = Counter(), Counter(), {}
    for task in config.tasks:
        wrapped, system = config.of_task(task, "apply_chat_template"), config.of_task(task, "system_instruction") or ""
        if task.items is None:
            benchmark = _benchmark(config, task, spoken)
            own, wrapped, system = list(benchmark.items), False, ""  # lm-eval has applied it
            judges[task.name], judged[task.name] = benchmark.judge, benchmark.digest()
        else:
            own = _from_file(task, wrapped, system)
        if task.too_long != "error":
            fitted = fit_to_model(own, spoken.folder, task.too_long, wrapped, system)
            own = fitted.items
            skipped.update(fitted.skipped)
            truncated.update(fitted.truncated)
            notes += fitted.notes
        items += own
        _check_alike(told, {item.task for item in own}, task, config.of_task(task, "limit"), wrapped, system)
        weights.update({item.task: task.weight for item in own})
        limits.update({item.task: task.limit or config.limit for item in own})
        if wrapped:
            chat.update({item.task: system for item in own})
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
    _check_objectives(config, search, weights)
    policy = decide(config, search)
    subset = search
    if policy.extract == "random":
        subset = per_task(search, config.extract.size, np.random.default_rng(seed_of("subset", seed, 0)))
    return Questions(
        search,
        subset,
        heldout,
        weights,
        heads,
        policy,
        dict(skipped),
        dict(truncated),
        tuple(notes),
        chat,
        judges,
        judged,
    )


def _check_alike(told: dict, names: Iterable[str], task: Task, limit: int | None, wrapped: bool, system: str) -> None:
    """Raises ConfigError for a task of several files, or lm-eval's and ours, that says two things. told: what was said
    of each."""
    words = {"weight": task.weight, "head": task.head, "limit": limit}
    words |= {"apply_chat_template": wrapped, "system_instruction": system}
    for name in names:
        for word, value in words.items():
            if (before := told.setdefault((name, word), value)) != value:
                found = f"{word} {value!r}, and {before!r} in another entry of it"
                raise ConfigError(f"task {name!r}", found, "the same, or another name for one of them")


def _check_objectives(config: EvolveConfig, items: list[Item], weights: dict[str, float]) -> None:
    """Raises BadInput for objectives that these items or this space do not have, or two that are one."""
    asked = Registration(tuple(items), config.genome.definition(), objectives=config.names)
    check_objectives(asked)
    if lengths_needed(asked) and not any(weights[item.task] for item in items if writes(item)):
        found = "a length of texts, whose tasks all have weight 0"
        raise ConfigError("objectives", found, "a weight above 0 for one of them")
    if ACCURACY in config.names and len(asked.tasks()) == 1 and set(asked.tasks()) & set(config.names):
        raise ConfigError("objectives", f"{' and '.join(config.names)}, which is one task", "values that can differ")


def _from_file(task: Task, wrapped: bool, system: str) -> list[Item]:
    """A file's items, under the task's name and metric where it has them."""
    own = read_items(task.items, task.name)
    if system and not wrapped:
        where = f"task {own[0].task!r}: system_instruction"
        raise ConfigError(where, "without apply_chat_template", "both, or neither")
    if task.name is not None:
        own = [replace(item, task=task.name) for item in own]
    if task.metric is not None and task.metric != "acc,none":  # mergekit-evolve's default for lm-eval
        own = [replace(item, metric=task.metric) for item in own]
    return own


def _benchmark(config: EvolveConfig, task: Task, spoken: AskedWith) -> Benchmark:
    """A task of lm-eval's. Raises ConfigError, ItemsError or Unavailable."""
    from merge3.adapters.lm_eval import Settings, load_benchmark

    asked = {key: config.of_task(task, key) for key in _ASKED}
    settings = Settings(metric=task.metric, gen_kwargs=task.gen_kwargs, **asked)
    # Nothing but a chat template is asked of the model's files, which may lie with a daemon alone.
    folder = spoken.folder if settings.apply_chat_template else ""
    return load_benchmark(task.name, settings, folder, config.task_path)


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
