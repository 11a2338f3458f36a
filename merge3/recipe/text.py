"""YAML in and out, and the hint for a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from merge3.errors import RecipeError

_MERGE = "tag:yaml.org,2002:merge"
_BY_VALUE = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float"))


def load_yaml(text: str, where: str) -> Any:
    """YAML content, or a RecipeError with the line. Every YAML file that users write is read by it."""
    try:
        return built(text, where)
    except RecipeError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        found, hint = f"not YAML ({getattr(error, 'problem', error)})", ""
        if "single document" in str(getattr(error, "context", "")):
            found, hint = "several documents", "one recipe a file: merge the first, then name its folder in the second"
        elif text.lstrip().startswith("```"):
            hint = "take away the lines that begin with ```"
        elif "\t" in text:
            hint = "YAML is indented with spaces, not tabs"
        raise RecipeError(f"{where}{line}", found, "", hint) from None
    except ValueError as error:  # a number with too many digits, a month that is none
        raise RecipeError(where, f"not YAML ({error})"[:200], "a recipe in YAML") from None


def built(text: str, where: str, loader: Any = yaml.SafeLoader) -> Any:
    """YAML content, by a class of PyYAML's safe loaders, whose errors pass. Raises RecipeError for a key that a mapping
    has twice: of both YAML takes the last and says nothing."""
    reader = loader(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        _refuse_twice(reader, node, where)
        return reader.construct_document(node)
    finally:
        reader.dispose()


def _refuse_twice(reader: Any, node: yaml.Node, where: str) -> None:
    """As written, before `<<` brings other mappings' keys into one, which its own may replace."""
    waiting, seen = [node], set()
    for node in waiting:  # which grows on the way
        if isinstance(node, yaml.ScalarNode) or id(node) in seen:  # aliases: what is said once is looked at once
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        lines: dict[Any, int] = {}
        for key, value in node.value:
            waiting += (key, value)
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            name = reader.construct_object(key) if key.tag in _BY_VALUE else key.value  # 1 and 0x1 are one key
            line = key.start_mark.line + 1
            if name in lines:
                raise RecipeError(f"{where}, line {line}", f"key {name!r} twice, first in line {lines[name]}", "once")
            lines[name] = line


def dump_yaml(data: dict) -> str:
    """YAML of plain dicts, lists and scalars, in their order; floats survive exactly."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=100)


def plain(value: Any) -> Any:
    """A setting as dicts, lists and scalars alone."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def nearest(name: str, names: Iterable[str], cutoff: float = 0.5) -> str:
    """A hint naming the closest valid name, or nothing. cutoff: how alike it must be, 1 for equal."""
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else ""


class _Dumper(yaml.SafeDumper):
    """Lists of numbers on one line, floats in their shortest exact form with a dot YAML 1.1 needs."""


def _represent_list(dumper: yaml.Dumper, data: list) -> yaml.Node:
    flow = all(isinstance(v, (int, float)) for v in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(list, _represent_list)
