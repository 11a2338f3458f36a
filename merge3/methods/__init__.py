"""The merge methods: a table, what each needs, and the way from a recipe to kernel calls.

METHODS is the one list: `merge3-client methods`, docs/methods.md and the parity tests are made from it.
"""

from merge3.errors import RecipeError
from merge3.methods import averages, doge, rules, spectral, spherical, task_arithmetic
from merge3.methods.base import Copy, Gene, Job, Method, Parameter, Step, Unpacked
from merge3.methods.execute import execute
from merge3.methods.learned import LEARNED
from merge3.methods.variants import VARIANTS
from merge3.methods.zipped import ZIPPED
from merge3.recipe import nearest

_FAMILIES = (averages, task_arithmetic, spherical, rules, spectral, doge)
METHODS: dict[str, Method] = {m.name: m for family in _FAMILIES for m in family.methods()}


def method_named(name: str, where: str = "merge_method") -> Method:
    """The method of a recipe, or a RecipeError with the nearest name."""
    if name in LEARNED:
        found = f"{name!r}, which learns its weights from items"
        raise RecipeError(where, found, "a recipe with weights", "`merge3-client fit RECIPE` with `fit:` makes one")
    if name in ZIPPED:
        found = f"{name!r}, which matches units on items and makes a checkpoint"
        raise RecipeError(where, found, "a recipe of another method", "`merge3-client fit RECIPE` with `fit:` zips")
    if name in VARIANTS:
        raise RecipeError(where, f"{name!r}, which makes a model for each task", ", ".join(METHODS))
    if name not in METHODS:
        hint = nearest(name, (*METHODS, *LEARNED, *VARIANTS, *ZIPPED))
        raise RecipeError(where, f"unknown method {name!r}", ", ".join(METHODS), hint)
    return METHODS[name]


def gene_names() -> list[str]:
    """Every parameter that a search can vary, whatever the method."""
    names: dict[str, None] = {}
    for method in METHODS.values():
        names |= dict.fromkeys(method.genes)
    return list(names)


__all__ = [
    "LEARNED",
    "METHODS",
    "VARIANTS",
    "ZIPPED",
    "Copy",
    "Gene",
    "Job",
    "Method",
    "Parameter",
    "Step",
    "Unpacked",
    "execute",
    "gene_names",
    "method_named",
]
