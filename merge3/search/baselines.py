"""What a searched merge is measured against: every endpoint, and the merges one would pick by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from merge3.methods import LEARNED, METHODS, VARIANTS, ZIPPED, Method
from merge3.methods.base import DERIVED, NOTHING, RECIPE, REQUIRED, ByHand, ForModels, for_models
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


def every_merge(
    base: str | None, experts: list[str], dtype: str | None = None, tower: dict[str, str] | None = None
) -> Iterator[tuple[str, Recipe | str]]:
    """(name, recipe) of the merges of every method that needs nothing but models: by hand, where the row knows any,
    else with what `defaults` says. Of the other methods why there is none. Whether models allow it, compiling tells."""
    for method in METHODS.values():
        if method.needs != NOTHING:
            yield method.name, f"needs {method.needs}"
        elif method.result not in (RECIPE, DERIVED):
            yield method.name, f"makes {method.result}, not one model"
        elif method.base == "required" and base is None:
            yield method.name, "needs a base"
        else:
            own = base if method.base == "required" else None
            merges = method.by_hand or {method.name: ByHand(defaults(method))}
            for name, by_hand in merges.items():
                yield name, replace(_recipe(method.name, own, experts, by_hand, dtype), tower=tower or {})
    for name in VARIANTS:
        sources = tuple(Source(ModelRef.parse(expert)) for expert in experts)
        recipe = base and Recipe(name, (Slice(sources),), ModelRef.parse(base), dtype=dtype, tower=tower or {})
        yield f"{name}, by task", recipe or "needs a base"
    for name, row in (LEARNED | ZIPPED).items():
        yield name, f"needs {row.needs}"


def defaults(method: Method) -> dict[str, ForModels]:
    """What all models are given of a method where nothing is said: its first merge by hand, else where a search starts,
    of parameters that it varies or that have no default."""
    for by_hand in method.by_hand.values():
        return {**by_hand.own, **by_hand.common}
    found = {}
    for name, parameter in method.parameters.items():
        if parameter.gene is not None and (name in method.searched or parameter.default is REQUIRED):
            found[name] = parameter.gene.start
    return found


def _recipe(method: str, base: str | None, experts: list[str], by_hand: ByHand, dtype: str | None) -> Recipe:
    own = {name: for_models(value, len(experts)) for name, value in by_hand.own.items()}
    sources = tuple(Source(ModelRef.parse(e), None, dict(own)) for e in experts)
    return Recipe(method, (Slice(sources),), ModelRef.parse(base) if base else None, dict(by_hand.common), dtype)
