"""Items: the questions a candidate is asked, read from JSONL and checked line by line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Item:
    """One question. answer: an index for choice and classify, accepted texts (or patterns) for generate."""

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


def read_items(path: str | Path, task: str | None = None) -> list[Item]:
    """Read a JSONL file: one object per line. task: the default for lines that name none (the file's stem).

    Raises ItemsError naming file and line for anything that is not an item, and for duplicate ids.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ItemsError(path, f"not UTF-8 at byte {error.start}", "JSON lines") from None
    except OSError as error:
        raise ItemsError(path, error.strerror or str(error), "a JSONL file") from None
    items, seen = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        item = parse_item(line, where, task or path.stem, f"{path.stem}-{number}", path.parent)
        if item.id in seen:
            raise ItemsError(where, f"id {item.id!r} is also on line {seen[item.id]}", "unique ids")
        seen[item.id] = number
        items.append(item)
    if not items:
        raise ItemsError(path, "no items", "at least one JSON line")
    return items


def parse_item(line: str, where: str, task: str, default_id: str, folder: Path = Path()) -> Item:
    """One JSON line as an Item."""
    try:
        data = json.loads(line)
    except ValueError as error:
        raise ItemsError(where, f"not JSON ({error})", "one JSON object per line") from None
    return make_item(data, where, task, default_id, folder)


def make_item(data, where: str, task: str, default_id: str, folder: Path = Path()) -> Item:
    """Validate the content of one item. Raises ItemsError naming `where` and the key."""
    if not isinstance(data, dict):
        raise ItemsError(where, f"found {type(data).__name__}", "a JSON object")
    unknown = sorted(set(data) - set(_KEYS))
    if unknown:
        raise ItemsError(where, f"unknown key {unknown[0]!r}", ", ".join(_KEYS))
    kind = data.get("kind")
    if kind not in KINDS:
        raise ItemsError(where, f"kind is {kind!r}", ", ".join(KINDS))
    prompt = data.get("prompt", "" if "image" in data else None)
    if not isinstance(prompt, str) or (not prompt and "image" not in data):
        raise ItemsError(where, f"prompt is {data.get('prompt')!r}", "text")
    metric = data.get("metric", METRICS[kind][0])
    if metric not in METRICS[kind]:
        raise ItemsError(where, f"metric is {metric!r}", ", ".join(METRICS[kind]))
    max_tokens = data.get("max_tokens", 32)
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise ItemsError(where, f"max_tokens is {max_tokens!r}", "a positive number")
    stop = data.get("stop", ())
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    choices = data.get("choices") or ()
    if not isinstance(choices, (list, tuple)) or not all(isinstance(c, str) and c for c in choices):
        raise ItemsError(where, f"choices is {choices!r}"[:120], "a list of texts")
    answer = _answer(data.get("answer"), kind, choices, metric, where)
    image = str(folder / data["image"]) if data.get("image") else None
    return Item(
        str(data.get("id", default_id)), str(data.get("task", task)), kind, prompt, answer, tuple(choices),
        metric, image, max_tokens, stop,
    )  # fmt: skip


def _answer(answer, kind: str, choices: Sequence[str], metric: str, where: str):
    if kind == "choice":
        if len(choices) < 2:
            raise ItemsError(where, f"{len(choices)} choices", "at least 2")
        if isinstance(answer, str) and answer in choices:
            return choices.index(answer)
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
            return answer
        raise ItemsError(where, f"answer is {answer!r}", f"one of the choices, or an index below {len(choices)}")
    if kind == "classify":
        if isinstance(answer, (int, str)) and not isinstance(answer, bool):
            return answer
        raise ItemsError(where, f"answer is {answer!r}", "a label or its index")
    texts = (answer,) if isinstance(answer, (str, int, float)) and not isinstance(answer, bool) else answer
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(t, (str, int, float)) for t in texts):
        raise ItemsError(where, f"answer is {answer!r}", "a text, a number or a list of them")
    texts = tuple(str(t) for t in texts)
    if metric == "regex":
        for pattern in texts:
            try:
                regex.compile(pattern)
            except regex.error as error:
                raise ItemsError(where, f"answer {pattern!r} is no pattern ({error})", "a regular expression") from None
    if metric == "number":
        for text in texts:
            try:
                float(text)
            except ValueError:
                raise ItemsError(where, f"answer is {text!r}", "a number, as metric is `number`") from None
    return texts


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
