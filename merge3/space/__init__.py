"""Spaces: what a search varies, genome <-> recipe. One row of SPACES for each kind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np

from merge3.checkpoint.layout import Layout
from merge3.errors import ConfigError
from merge3.recipe import Recipe
from merge3.space.around import AroundSpace
from merge3.space.definition import SpaceDefinition
from merge3.space.parameters import ParameterSpace
from merge3.space.path import PathSpace
from merge3.space.presets import PRESETS


class Space(Protocol):
    """A definition met with a model's layout: genomes are float64 [size], and every one is a recipe.

    `Space(definition, layout)` is one of the definition's kind. genes: the parameters of the method that it varies. A
    space may say which of its numbers are bits as well: `bits`, bool [size], on above one half.

        space = Space(SpaceDefinition(("./math", "./code"), "ties", "./base"), pool.layouts["./base"])
        space.recipe(space.initial())
    """

    definition: SpaceDefinition
    layout: Layout
    size: int
    genes: tuple[str, ...]

    def __new__(cls, definition: SpaceDefinition, layout: Layout) -> Space:
        if definition.kind not in SPACES:
            raise ConfigError("genome: space", f"found {definition.kind!r}", ", ".join(SPACES))
        return SPACES[definition.kind](definition, layout)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest value of every gene, float64 [size] each."""

    def initial(self) -> np.ndarray:
        """Where a search starts, inside the bounds: float64 [size]."""

    def recipe(self, genome: Sequence[float]) -> Recipe:
        """The recipe of a genome. Raises ConfigError on a wrong length or a value that is not finite."""

    def genome(self, recipe: Recipe) -> np.ndarray:
        """The genome of a recipe this space made: the inverse of `recipe`, exact to the last bit."""

    def project(self, recipe: Recipe, where: str = "recipe", unmerged: Collection[str] = ()) -> np.ndarray:
        """The genome whose recipe is nearest to any recipe of these models, as far as bounds let it; see projection.py.
        where: what messages call the recipe; unmerged: tensors of the layout that no merge changes. Raises ConfigError
        naming what no genome of this space can be near to."""

    def uniform_recipe(self) -> Recipe:
        """The recipe of `initial`."""


PATH, AROUND = "path", "around"
SPACES: dict[str, Callable[[SpaceDefinition, Layout], Space]] = {
    "parameters": ParameterSpace,
    AROUND: AroundSpace,
    PATH: PathSpace,
}


def cost_of(space: Space | None, recipe: Recipe) -> float:
    """What a forward through the recipe's merge takes, in those of the base: 1 where the space does not count it."""
    return space.cost(recipe) if hasattr(space, "cost") else 1.0


__all__ = ["AROUND", "PATH", "PRESETS", "SPACES", "ParameterSpace", "PathSpace", "Space", "SpaceDefinition", "cost_of"]
