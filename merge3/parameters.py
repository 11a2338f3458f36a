"""Recipe parameters: a scalar, a list interpolated over layers, or a list of {filter, value}.

The rules are mergekit's: a filter is a substring of the tensor name, the first match wins, none or `*`
matches all, and no match falls through to the next level (source, slice, global).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

Setting = Any  # scalar | list of scalars | list of {"filter", "value"} | one such mapping
_MISSING = object()


def evaluate(setting: Setting, tensor: str, t: float) -> Any:
    """The value for one tensor at position t in [0, 1] of its slice; None if no filter matches."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, (list, tuple)):
        return setting
    if not setting:
        return None
    if isinstance(setting[0], Mapping):
        for condition in setting:
            pattern = condition.get("filter")
            if pattern is None or pattern == "*" or pattern in tensor:
                return evaluate(condition["value"], tensor, t)
        return None
    scaled = t * (len(setting) - 1)
    low = int(scaled)
    values = [number(v) for v in setting]
    if any(isinstance(v, (bool, str)) for v in values):
        return setting[low]  # labels select, numbers interpolate
    high = min(len(setting) - 1, low + 1)
    fraction = scaled - low
    return (1 - fraction) * values[low] + fraction * values[high]


def number(value: Any) -> Any:
    """A text that is a number as that number, for YAML 1.1 reads `5e-1` as a text; anything else as it is."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def by_tensor(values: Mapping[str, float]) -> list[dict[str, Any]]:
    """The setting of tensors that have a value each, by their names. A filter is a part of a name, and the first that
    fits counts: names that are parts of others come after them."""
    names = list(values)
    if any(name != other and name in other for name in names for other in names):
        names.sort(key=lambda name: -len(name))
    return [{"filter": name, "value": float(values[name])} for name in names]


def lookup(name: str, levels: Iterable[Mapping[str, Setting]], tensor: str, t: float, default: Any = _MISSING) -> Any:
    """The first level that has a value for `name`, else the default; KeyError without one."""
    for level in levels:
        if name in level and (value := evaluate(level[name], tensor, t)) is not None:
            return value
    if default is _MISSING:
        raise KeyError(name)
    return default


def problem(setting: Setting) -> str | None:
    """What is wrong with a setting's form; None if nothing is."""
    if isinstance(setting, Mapping):
        if set(setting) - {"filter", "value"} or "value" not in setting:
            return f"found keys {sorted(map(str, setting))}, expected `filter` and `value`"
        pattern = setting.get("filter")
        if pattern is not None and not isinstance(pattern, str):
            return f"found filter {pattern!r}"[:100] + ", expected one text, a part of tensors' names"
        return problem(setting["value"])
    if isinstance(setting, (list, tuple)):
        if not setting:
            return "an empty list"
        if any(isinstance(v, Mapping) for v in setting):
            if not all(isinstance(v, Mapping) for v in setting):
                return "a list that mixes values with {filter, value}"
            return next((p for v in setting if (p := problem(v))), None)
        if any(v is None or isinstance(v, (list, tuple)) for v in setting):
            return "a list with more in it than plain values"
        return next((p for v in setting if (p := problem(v))), None)
    if setting is None or isinstance(setting, (bool, int, float, str)):
        return None
    return f"found {type(setting).__name__}"


def filters(setting: Setting) -> list[str]:
    """Every filter inside a setting, in its order."""
    if isinstance(setting, Mapping):
        pattern = setting.get("filter")
        return ([] if pattern is None else [pattern]) + filters(setting.get("value"))
    if isinstance(setting, (list, tuple)):
        return [pattern for s in setting for pattern in filters(s)]
    return []


def scalars(setting: Setting) -> list[Any]:
    """Every plain value inside a setting."""
    if isinstance(setting, Mapping):
        return scalars(setting.get("value"))
    if isinstance(setting, (list, tuple)):
        return [v for s in setting for v in scalars(s)]
    return [setting]
