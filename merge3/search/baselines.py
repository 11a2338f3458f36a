"""What a searched merge is measured against: every endpoint, and the merges one would pick by hand."""

from __future__ import annotations

from collections.abc import Iterator

from merge3.recipe import ModelRef, Recipe, Slice, Source

# The usual hand-picked settings: mergekit's documentation examples, and Ilharco et al. 2022 for the
# scale of task arithmetic. `share` is 1 / number of experts.
_DEFAULTS = {
    "task_arithmetic": ({"weight": 0.3}, {}),
    "task_arithmetic_full": ({"weight": 1.0}, {}),
    "ties": ({"weight": 1.0}, {"density": 0.5, "normalize": True}),
    "dare_ties": ({"weight": "share"}, {"density": 0.5}),
}


def default_merges(base: str | None, experts: list[str], dtype: str | None = None) -> Iterator[tuple[str, Recipe]]:
    """(name, recipe) of every default merge these models allow."""
    yield "uniform_linear", _recipe("linear", None, experts, {"weight": 1.0}, {}, dtype)
    if base is None or not experts:
        return
    for name, (own, shared) in _DEFAULTS.items():
        own = {k: 1 / len(experts) if v == "share" else v for k, v in own.items()}
        yield name, _recipe(name.removesuffix("_full"), base, experts, own, shared, dtype)


def _recipe(method: str, base: str | None, experts: list[str], own: dict, shared: dict, dtype: str | None) -> Recipe:
    sources = tuple(Source(ModelRef.parse(e), None, dict(own)) for e in experts)
    return Recipe(method, (Slice(sources),), ModelRef.parse(base) if base else None, dict(shared), dtype)
