"""Items: the questions a candidate is asked, each checked key by key."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import regex

from merge3.errors import ItemsError

KINDS = ("choice", "generate", "classify")
# The first of each kind is its default.
METRICS = {
    "choice": ("acc_norm", "acc"),  # log-likelihood per token, or in total
    "generate": ("exact", "number", "regex"),
    "classify": ("acc",),
}
_KEYS = ("id", "task", "kind", "prompt", "image", "choices", "answer", "metric", "max_tokens", "stop")
_MOST = 2**31 - 1  # what a whole number may be on the wire to a daemon
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")


@dataclass(frozen=True)
class Item:
    """One question. answer: an index for choice and classify, accepted texts (or patterns) for generate.

    source: the file and line it came from, for messages; extra: (key, value) pairs of its line that are not ours.
    Neither is part of the question: items that differ in them alone are equal.
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


def place(item: Item) -> str:
    """How messages name an item."""
    name = f"item {shown(item.id)} of task {shown(item.task)}"
    return f"{item.source}: {name}" if item.source else name


def located(error: ItemsError, items: Sequence[Item]) -> ItemsError:
    """A daemon's error about one of these items, with the file and line that only the driver knows."""
    for item in items:
        if item.source and error.where == place(replace(item, source="")):
            return type(error)(place(item), error.found, error.expected, error.hint)
    return error


def shown(value: Any, most: int = 100) -> str:
    """A value's repr, short enough for one line."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def make_item(data, where: str, task: str, default_id: str, folder: Path = Path(), source: str = "") -> Item:
    """Validate the content of one item. Raises ItemsError naming `where` and the key."""
    if not isinstance(data, dict):
        raise ItemsError(where, f"found {type(data).__name__}", "a JSON object")
    for key, value in data.items():
        _check_value(value, key, where)
    extra = _extra(data, where)
    data = {key: data[key] for key in _KEYS if data.get(key) is not None}  # null: as if it were not there
    kind = data.get("kind")
    if kind not in KINDS:
        raise ItemsError(where, f"kind is {shown(kind)}", ", ".join(KINDS))
    image = data.get("image")
    if image is not None and (not isinstance(image, str) or not image):
        raise ItemsError(where, f"image is {shown(image)}", "a file")
    prompt = data.get("prompt", "" if image else None)
    if not isinstance(prompt, str) or (not prompt and not image):
        raise ItemsError(where, f"prompt is {shown(data.get('prompt'))}", "text")
    metric = data.get("metric", METRICS[kind][0])
    if metric not in METRICS[kind]:
        raise ItemsError(where, f"metric is {shown(metric)}", ", ".join(METRICS[kind]))
    max_tokens = data.get("max_tokens", 32)
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or not 1 <= max_tokens <= _MOST:
        raise ItemsError(where, f"max_tokens is {shown(max_tokens)}", "a positive number")
    stop = data.get("stop", ())
    stop = _texts((stop,) if isinstance(stop, str) else stop, "stop", where)
    choices = _texts(data.get("choices", ()), "choices", where)
    answer = _answer(data.get("answer"), kind, choices, metric, where)
    name, task = _name(data.get("id", default_id), "id", where), _name(data.get("task", task), "task", where)
    image = str(folder / image) if image else None
    return Item(name, task, kind, prompt, answer, choices, metric, image, max_tokens, stop, source, extra)


def _check_value(value, key: str, where: str) -> None:
    """Refuse what Python reads and nothing after it can use: half characters, and numbers that are none."""
    if isinstance(value, str):
        _check_text(value, key, where)
    elif isinstance(value, float) and not math.isfinite(value):
        expected = "a finite number: JSON has no NaN and no infinity"
        raise ItemsError(where, f"{shown(key)} is {json.dumps(value)}", expected)
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            _check_value(part, f"{key}[{i}]", where)
    elif isinstance(value, dict):
        for name, part in value.items():
            _check_value(part, f"{key}.{name}", where)
    _check_text(key, key, where)


def _check_text(text, key: str, where: str) -> None:
    try:
        str(text).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        found = f"{shown(key)} has half a character, the lone surrogate {half}"
        raise ItemsError(where, found, "whole characters", "a text cut in the middle of one?") from None


def _extra(data: dict, where: str) -> tuple[tuple[str, Any], ...]:
    """What a line carries beside our keys. A misspelt key of ours is refused, and so is a row of another format."""
    unknown = [key for key in data if key not in _KEYS]
    for key in unknown:
        meant = [name for name in _alike(key) if name not in data]
        if meant:
            raise ItemsError(where, f"unknown key {shown(key)}", ", ".join(_KEYS), f"did you mean {meant[0]!r}?")
    missing = [] if "kind" in data else ["kind"]
    if not {"prompt", "image"} & set(data):
        missing.append("prompt")
    if unknown and missing:
        hint = f"an item needs {' and '.join(missing)}; other keys are then kept as they are"
        raise ItemsError(where, f"unknown key {shown(min(unknown))}", ", ".join(_KEYS), hint)
    return tuple((key, data[key]) for key in unknown)


@functools.lru_cache(1024)  # files have the same few extra keys in every line
def _alike(key: str) -> tuple[str, ...]:
    """Our keys that this one may be a misspelling of. Of two or three letters (idx, qid, uid) too many are."""
    key = key.lower()
    alike = lambda name: sorted(key) == sorted(name) or SequenceMatcher(None, key, name).ratio() > 0.8
    return tuple(name for name in _KEYS if alike(name))


def _name(value, key: str, where: str) -> str:
    """A task or an id: a text, or a number as text."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value == "":
        raise ItemsError(where, f"{key} is {shown(value)}", "a text or a number")
    return str(value)


def _texts(values, key: str, where: str) -> tuple[str, ...]:
    if not isinstance(values, (list, tuple)):
        raise ItemsError(where, f"{key} is {shown(values)}", "a list of texts")
    for i, value in enumerate(values):
        if not isinstance(value, str) or not value:
            raise ItemsError(where, f"{key}[{i}] is {shown(value)}", "a text")
    return tuple(values)


def _answer(answer, kind: str, choices: Sequence[str], metric: str, where: str):
    if kind == "choice":
        return _choice_answer(answer, choices, where)
    if kind == "classify":
        index = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer <= _MOST
        if index or isinstance(answer, str):
            return answer
        raise ItemsError(where, f"answer is {shown(answer)}", "a label or its index")
    texts = answer if isinstance(answer, (list, tuple)) else (answer,)
    if not texts or not all(isinstance(t, (str, int, float)) and not isinstance(t, bool) for t in texts):
        raise ItemsError(where, f"answer is {shown(answer)}", "a text, a number or a list of them")
    texts = tuple(str(t) for t in texts)
    if metric == "regex":
        for pattern in texts:
            try:
                regex.compile(pattern)
            except regex.error as error:
                found = f"answer {shown(pattern)} is no pattern ({error})"
                raise ItemsError(where, found, "a regular expression") from None
    if metric == "number":
        texts = tuple(_number(text, where) for text in texts)
    return texts


def _choice_answer(answer, choices: Sequence[str], where: str) -> int:
    if len(choices) < 2:
        raise ItemsError(where, f"{len(choices)} choices", "at least 2")
    for i, choice in enumerate(choices):
        if choice in choices[:i]:
            found = f"choices[{choices.index(choice)}] and choices[{i}] are both {shown(choice)}"
            raise ItemsError(where, found, "different choices: of equal ones neither is the likelier")
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    expected = f"one of the choices, or an index below {len(choices)}"
    raise ItemsError(where, f"answer is {shown(answer)}", expected, _meant(answer, choices))


def _meant(answer, choices: Sequence[str]) -> str:
    """A hint where an answer is nearly one: a letter, a number as text, a choice but for its white space."""
    if not isinstance(answer, str):
        return ""
    for i, choice in enumerate(choices):
        if answer.strip() == choice.strip():
            return f"choices[{i}] is {shown(choice)}"
        if answer.strip() in (str(i), chr(ord("A") + i)):
            return f"index {i}, a number, if choices[{i}] is meant"
    return ""


def _number(text: str, where: str) -> str:
    """A number as `float` takes it: digits in groups of three lose their commas."""
    plain = text.strip().replace(",", "") if _THOUSANDS.fullmatch(text.strip()) else text
    try:
        if math.isfinite(float(plain)):
            return plain
    except ValueError:
        pass
    raise ItemsError(where, f"answer is {shown(text)}", "a number, as metric is `number`")


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
                f"task {task!r}", f"{len(own)} items, of which a held-out fraction of {fraction:g} takes {count}",
                "items on both sides", "add items or change heldout.fraction",
            )  # fmt: skip
        order = sorted(own, key=lambda item: hashlib.sha256(f"{seed}:{item.id}".encode()).digest())
        chosen = {item.id for item in order[:count]}
        heldout += [item for item in own if item.id in chosen]
        search += [item for item in own if item.id not in chosen]
    return search, heldout


def items_hash(items: Sequence[Item]) -> str:
    """Names a set of items, order included."""
    return hashlib.sha256(repr([repr(item) for item in items]).encode()).hexdigest()[:16]
