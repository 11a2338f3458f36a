"""Item files: JSON lines in UTF-8, read strictly and checked key by key: what is wrong is named with its line."""

from __future__ import annotations

import codecs
import functools
import json
import math
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from merge3.errors import ItemsError
from merge3.tasks.items import MOST, Item, shown
from merge3.tasks.kinds import KINDS, in_files

_KEYS = ("id", "task", "kind", "prompt", "image", "choices", "answer", "metric", "max_tokens", "stop")
NEWLINE = b"\n"
# UTF-32's little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_items(path: str | Path, task: str | None = None) -> list[Item]:
    """Read a JSONL file: one object per line. task: the default for lines that name none (the file's stem).

    Raises ItemsError naming file and line for anything that is not an item, and for duplicate ids.
    """
    path = Path(path)
    items, seen = [], {}
    # Of all that Unicode calls a line's end only \n is one here: JSON text may hold the others.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        item = parse_item(line, where, task or path.stem, f"{path.stem}-{number}", path.parent)
        if item.id in seen:
            raise ItemsError(where, f"id {shown(item.id)} is also on line {seen[item.id]}", "unique ids")
        seen[item.id] = number
        items.append(item)
    if not items:
        raise ItemsError(path, "no items", "at least one JSON line")
    return items


def parse_item(line: str, where: str, task: str, default_id: str, folder: Path = Path()) -> Item:
    """One JSON line as an Item that remembers `where`."""

    def once(pairs: list[tuple[str, object]]) -> dict:
        data = dict(pairs)
        if len(data) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise ItemsError(where, f"key {shown(twice)} twice in one object", "each key once")
        return data

    try:
        # Not strict: a raw tab or form feed in a string is not JSON, but has one meaning only.
        data = json.loads(line, object_pairs_hook=once, strict=False)
    except ItemsError:
        raise
    except json.JSONDecodeError as error:
        raise ItemsError(where, f"not JSON ({error.msg}: column {error.colno})", "one JSON object per line") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists without end
        raise ItemsError(where, f"not JSON that can be read ({error})", "one JSON object per line") from None
    return make_item(data, where, task, default_id, folder, where)


def make_item(data, where: str, task: str, default_id: str, folder: Path = Path(), source: str = "") -> Item:
    """Check the content of one item, its answer as its kind does.

    where: how messages name it; task, default_id: of an item that has none; folder: where a relative image lies;
    source: what the item remembers. Raises ItemsError naming `where` and the key.
    """
    if not isinstance(data, dict):
        raise ItemsError(where, f"found {type(data).__name__}", "a JSON object")
    for key, value in data.items():
        _check_value(value, key, where)
    extra = _extra(data, where)
    data = {key: data[key] for key in _KEYS if data.get(key) is not None}  # null: as if it were not there
    name = data.get("kind")
    kinds = in_files()
    if not isinstance(name, str) or name not in kinds:
        raise ItemsError(where, f"kind is {shown(name)}", ", ".join(kinds))
    kind = kinds[name]
    image = data.get("image")
    if image is not None and (not isinstance(image, str) or not image):
        raise ItemsError(where, f"image is {shown(image)}", "a file")
    prompt = data.get("prompt", "" if image else None)
    if not isinstance(prompt, str) or (not prompt and not image):
        raise ItemsError(where, f"prompt is {shown(data.get('prompt'))}", "text")
    metric = data.get("metric", kind.default)
    if not isinstance(metric, str) or metric not in kind.metrics:
        raise ItemsError(where, f"metric is {shown(metric)}", ", ".join(kind.metrics))
    max_tokens = data.get("max_tokens", 32)
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or not 1 <= max_tokens <= MOST:
        raise ItemsError(where, f"max_tokens is {shown(max_tokens)}", "a positive number")
    stop = data.get("stop", ())
    stop = _texts((stop,) if isinstance(stop, str) else stop, "stop", where)
    choices = _texts(data.get("choices", ()), "choices", where)
    answer = kind.answer(data.get("answer"), choices, metric, where)
    id = _name(data.get("id", default_id), "id", where)
    task = _name(data.get("task", task), "task", where)
    image = str(folder / image) if image else None
    return Item(id, task, name, prompt, answer, choices, metric, image, max_tokens, stop, source, extra)


def make_document(
    id: str,
    task: str,
    kind: str,
    asks: tuple[tuple[str, str], ...],
    where: str,
    metric: str = "",
    max_tokens: int = 32,
    stop: tuple[str, ...] = (),
) -> Item:
    """A document of one of lm-eval's tasks as an item. kind: what lm-eval calls its requests' type; asks: (context,
    continuation) pairs, either of which may be empty; metric: as lm-eval names it, with its filter.

    Raises ItemsError naming `where` for what cannot be asked.
    """
    if kind not in KINDS or KINDS[kind].raw is None:
        known = ", ".join(name for name, row in KINDS.items() if row.raw is not None)
        raise ItemsError(where, f"kind is {shown(kind)}", known)
    if not asks or not id or not task:
        raise ItemsError(where, "a document without name, task or asks", "all three")
    for text in (id, task, *stop, *(text for ask in asks for text in ask)):
        _check_text(text, "text", where)
    if not 1 <= max_tokens <= MOST:
        raise ItemsError(where, f"max_tokens is {max_tokens}", "a positive number")
    return Item(id, task, kind, "", "", metric=metric, max_tokens=max_tokens, stop=stop, source=where, asks=asks)


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


def _text(path: Path) -> str:
    """The file's text, without a byte-order mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ItemsError(path, error.strerror or str(error), "a JSONL file") from None
    for mark, name in _MARKS:
        if data.startswith(mark):
            hint = f"iconv -f {name} -t UTF-8"
            raise ItemsError(f"{path}, line 1", f"{name}, as its byte-order mark says", "UTF-8", hint)
    data = data.removeprefix(codecs.BOM_UTF8)
    line = lambda at: f"{path}, line {1 + data.count(NEWLINE, 0, at)}"
    if b"\0" in data:
        raise ItemsError(line(data.index(b"\0")), "a NUL byte", "JSON lines in UTF-8", "UTF-16, or a damaged file?")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        column = error.start - data.rfind(NEWLINE, 0, error.start)
        found, hint = f"not UTF-8 at byte {column} of the line", "iconv -f ITS-ENCODING -t UTF-8"
        raise ItemsError(line(error.start), found, "JSON lines in UTF-8", hint) from None
    if text.lstrip().startswith("["):
        expected = "one JSON object per line, and nothing around them"
        raise ItemsError(line(data.index(b"[")), "a JSON array", expected, "jq -c '.[]' makes them")
    return text
