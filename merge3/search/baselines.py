"""What a searched merge is measured against: every endpoint, and the merges one would pick by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from merge3.methods import METHODS
from merge3.methods.base import ByHand, for_models
from merge3.recipe import ModelRef, Recipe, Slice, Source


def default_merges(
    base: str | None, experts: list[str], dtype: str | None = None, tower: dict[str, str] | None = None
) -> Iterator[tuple[str, Recipe]]:
    """(name, recipe) of every merge by hand, of the methods' rows, that these models allow."""
    for method in METHODS.values():
        needs_base = method.base == "required"
        if needs_base and (base is None or not experts):
            continue
        for name, by_hand in method.by_hand.items():
            recipe = _recipe(method.name, base if needs_base else None, experts, by_hand, dtype)
            yield name, replace(recipe, tower=tower or {})


def _recipe(method: str, base: str | None, experts: list[str], by_hand: ByHand, dtype: str | None) -> Recipe:
    own = {name: for_models(value, len(experts)) for name, value in by_hand.own.items()}
    sources = tuple(Source(ModelRef.parse(e), None, dict(own)) for e in experts)
    return Recipe(method, (Slice(sources),), ModelRef.parse(base) if base else None, dict(by_hand.common), dtype)
