"""The merge methods: a table, what each needs, and the way from a recipe to kernel calls.

METHODS is the one list: `merge3-client methods`, docs/methods.md and the parity tests are made from it.
"""

from merge3.errors import RecipeError
from merge3.methods import averages, doge, rules, spectral, spherical, task_arithmetic
from merge3.methods.base import Copy, Gene, Job, Method, Parameter, Step
from merge3.methods.execute import execute
from merge3.methods.learned import LEARNED
from merge3.recipe import nearest

_FAMILIES = (averages, task_arithmetic, spherical, rules, spectral, doge)
METHODS: dict[str, Method] = {m.name: m for family in _FAMILIES for m in family.methods()}


def method_named(name: str, where: str = "merge_method") -> Method:
    """The method of a recipe, or a RecipeError with the nearest name."""
    if name in LEARNED:
        found = f"{name!r}, which learns its weights from items"
        raise RecipeError(where, found, "a recipe with weights", "`merge3-client fit RECIPE` with `fit:` makes one")
    if name not in METHODS:
        raise RecipeError(where, f"unknown method {name!r}", ", ".join(METHODS), nearest(name, (*METHODS, *LEARNED)))
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
    "Copy",
    "Gene",
    "Job",
    "Method",
    "Parameter",
    "Step",
    "execute",
    "gene_names",
    "method_named",
]
