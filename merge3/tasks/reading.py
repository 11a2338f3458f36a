"""Item files: JSON lines in UTF-8, read strictly, so that what is wrong is named with its line."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

from merge3.errors import ItemsError
from merge3.tasks.items import Item, make_item, shown

NEWLINE = b"\n"
# UTF-32's little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip


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
