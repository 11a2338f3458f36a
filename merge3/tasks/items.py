"""Items: the questions a candidate is asked, how messages name them, and how they are split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merge3.errors import BadInput, ItemsError

MOST = 2**31 - 1  # what a whole number may be on the wire to a daemon


@dataclass(frozen=True)
class Item:
    """One question. answer: as its kind (kinds.py) has checked it, an index, a label, or accepted texts; image: a file.

    source: the file and line it came from, for messages; extra: (key, value) pairs of its line that are not ours.
    Neither is part of the question: items that differ in them alone are equal.
    asks: (context, continuation) pairs, instead of prompt and answer, of a document of lm-eval's (documents.py).

        Item("1", "sums", "generate", "one plus one is", ("two", "2"))
    """

    id: str
    task: str
    kind: str
    prompt: str
    answer: int | str | tuple[str, ...]
    choices: tuple[str, ...] = ()
    metric: str = ""
    image: str | None = None
    max_tokens: int = 32
    stop: tuple[str, ...] = ()
    source: str = field(default="", compare=False, repr=False)
    extra: tuple[tuple[str, Any], ...] = field(default=(), compare=False, repr=False)
    asks: tuple[tuple[str, str], ...] = field(default=(), repr=False)


def place(item: Item) -> str:
    """How messages name an item."""
    name = f"item {shown(item.id)} of task {shown(item.task)}"
    return f"{item.source}: {name}" if item.source else name


def located(error: BadInput, items: Sequence[Item]) -> BadInput:
    """A daemon's error about one of these items, with the file and line that only the driver knows. What it says before
    the item, an endpoint or a step, stays."""
    for item in items:
        bare = place(replace(item, source=""))
        before = error.where.removesuffix(bare)
        if item.source and before != error.where and (not before or before.endswith((": ", ", "))):
            return type(error)(before + place(item), error.found, error.expected, error.hint)
    return error


def shown(value: Any, most: int = 100) -> str:
    """A value's repr, short enough for one line."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def split_heldout(items: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(search, held-out): the same `fraction` of every task's items, chosen by a hash of their ids.

    Raises ItemsError if a task would keep no items on a side that needs them.
    """
    search, heldout = [], []
    for task in dict.fromkeys(item.task for item in items):
        own = [item for item in items if item.task == task]
        count = round(len(own) * fraction)
        if fraction > 0 and not 0 < count < len(own):
            raise ItemsError(
                f"task {task!r}",
                f"{len(own)} items, of which a held-out fraction of {fraction:g} takes {count}",
                "items on both sides",
                "add items or change heldout.fraction",
            )
        order = sorted(own, key=lambda item: hashlib.sha256(f"{seed}:{item.id}".encode()).digest())
        chosen = {item.id for item in order[:count]}
        heldout += [item for item in own if item.id in chosen]
        search += [item for item in own if item.id not in chosen]
    return search, heldout


def items_hash(items: Sequence[Item]) -> str:
    """Names a set of items, order included."""
    # Asks are no part of an item's repr: sets without any are named as they were before there were documents.
    said = [repr(item) + (repr(item.asks) if item.asks else "") for item in items]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]
