"""Filters that fit no tensor: misspelt, or of another architecture. What they say is then lost without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from merge3.checkpoint.layout import Layout
from merge3.errors import Merge3Warning
from merge3.parameters import filters
from merge3.recipe import Recipe, nearest

_SHOWN = 5  # a fitted recipe, which names every tensor, may be merged into other models


def check_filters(recipe: Recipe, layouts: Iterable[Layout], where: str = "recipe") -> None:
    """A Merge3Warning for each filter of a recipe that is a part of no tensor's name, whichever slice it stands in.
    layouts: of all models."""
    said: dict[str, str] = {}
    for parameters, at in recipe.levels(where):
        for name, setting in parameters.items():
            for pattern in filters(setting):
                said.setdefault(pattern, f"{at}.{name}")
    said.pop("*", None)
    if not said:
        return
    names = _names(recipe, layouts)
    text = "\n".join(names)
    lost = [pattern for pattern in said if pattern not in names and pattern not in text]
    for pattern in lost[:_SHOWN]:
        hint = nearest(pattern, _parts(names, pattern.count(".") + 1))
        line = f"{said[pattern]}: filter {pattern!r} fits no tensor" + (f" ({hint})" if hint else "")
        warnings.warn(line, Merge3Warning, stacklevel=3)
    if len(lost) > _SHOWN:
        warnings.warn(f"{where}: {len(lost) - _SHOWN} more filters fit no tensor", Merge3Warning, stacklevel=3)


def _names(recipe: Recipe, layouts: Iterable[Layout]) -> set[str]:
    """Of every tensor of the models, merged or not, and of an output that has more layers than they."""
    found: set[str] = set()
    ranges = [part.sources[0].layer_range or (0, 0) for part in recipe.slices]
    stacked = sum(last - first for first, last in ranges)
    for layout in layouts:
        found.update(layout.pre, layout.post)
        for layer in range(max(stacked, layout.layers)):
            found.update(layout.layer_tensor(layer, name) for name in layout.layer_names)
    return found


def _parts(names: Iterable[str], count: int) -> set[str]:
    """So many neighbouring parts of names, but for numbers alone."""
    found = set()
    for name in names:
        parts = name.split(".")
        found.update(".".join(parts[at : at + count]) for at in range(len(parts) - count + 1))
    return {part for part in found if not part.isdecimal()}
