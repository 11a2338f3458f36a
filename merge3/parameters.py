"""Recipe parameters: a scalar, a list interpolated over layers, or a list of {filter, value}.

The rules are mergekit's: a filter is a substring of the tensor name, the first match wins, none or `*`
matches all, and no match falls through to the next level (source, slice, global).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

Setting = Any  # scalar | list of scalars | list of {"filter", "value"} | one such mapping
_MANY = 32  # conditions, from which on an index is sooner made than they are tried
_HEAD = 8  # characters by which filters are found; shorter ones are tried


def evaluate(setting: Setting, tensor: str, t: float) -> Any:
    """The value for one tensor at position t in [0, 1] of its slice; None if no filter matches."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, (list, tuple)):
        return setting
    if not setting:
        return None
    if isinstance(setting[0], Mapping):
        place = setting.first(tensor) if isinstance(setting, _Indexed) else _first(setting, tensor)
        return None if place is None else evaluate(setting[place]["value"], tensor, t)
    scaled = t * (len(setting) - 1)
    low = int(scaled)
    values = [number(v) for v in setting]
    if any(isinstance(v, (bool, str)) for v in values):
        return setting[low]  # labels select, numbers interpolate
    high = min(len(setting) - 1, low + 1)
    fraction = scaled - low
    return (1 - fraction) * values[low] + fraction * values[high]


def _first(conditions: Iterable[Mapping[str, Any]], tensor: str) -> int | None:
    """The place of the first condition that fits."""
    for place, condition in enumerate(conditions):
        pattern = condition.get("filter")
        if pattern is None or pattern == "*" or pattern in tensor:
            return place
    return None


class _Indexed(tuple):
    """Many conditions, as a fit writes them for every tensor: `first` finds what `_first` does without trying each."""

    def __new__(cls, conditions: Iterable[Mapping[str, Any]]) -> _Indexed:
        self = super().__new__(cls, conditions)
        self.short = []  # places of those that are tried one by one
        self.places: dict[str, int] = {}
        self.lengths: dict[str, set[int]] = {}  # of all filters that begin with these characters
        for place, condition in enumerate(self):
            pattern = condition.get("filter")
            if pattern is None or len(pattern) < _HEAD:
                self.short.append(place)
            elif pattern not in self.places:
                self.places[pattern] = place
                self.lengths.setdefault(pattern[:_HEAD], set()).add(len(pattern))
        return self

    def first(self, tensor: str) -> int | None:
        """The place of the first condition that fits."""
        place = _first((self[place] for place in self.short), tensor)
        found = [] if place is None else [self.short[place]]
        for start in range(len(tensor) - _HEAD + 1):
            for length in self.lengths.get(tensor[start : start + _HEAD], ()):
                if (place := self.places.get(tensor[start : start + length])) is not None:
                    found.append(place)
        return min(found, default=None)


def indexed(parameters: Mapping[str, Setting]) -> dict[str, Setting]:
    """The same settings, to be looked up for many tensors: with as many conditions as tensors, trying each is slow."""

    def many(setting: Setting) -> bool:
        return isinstance(setting, (list, tuple)) and len(setting) >= _MANY and isinstance(setting[0], Mapping)

    return {name: _Indexed(setting) if many(setting) else setting for name, setting in parameters.items()}


def number(value: Any) -> Any:
    """A text that is a number as that number, for YAML 1.1 reads `5e-1` as a text; anything else as it is."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def by_tensor(values: Mapping[str, float]) -> list[dict[str, Any]]:
    """The setting of tensors that have a value each, by their names. A filter is a part of a name, and the first that
    fits counts: names that are parts of others come after them."""
    names, rising = list(values), sorted(values, key=len)
    shortest = _Indexed({"filter": name} for name in rising)
    if any(shortest.first(name) != place for place, name in enumerate(rising)):
        names.sort(key=lambda name: -len(name))
    return [{"filter": name, "value": float(values[name])} for name in names]


def lookup(name: str, levels: Iterable[Mapping[str, Setting]], tensor: str, t: float, default: Any) -> Any:
    """The first level that has a value for `name`, else the default."""
    for level in levels:
        if name in level and (value := evaluate(level[name], tensor, t)) is not None:
            return value
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
