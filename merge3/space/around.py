"""The space around a recipe: groups of tensors move together, and what sets them apart stays as the recipe has it.

A fit knows a weight for every tensor, a search some dozens of genes; as a start in the space of parameters such a
recipe is cut down to its means. Here a gene is what it is there, the mean of the tensors that it governs, and a
tensor's weight is that and its own difference from where the search begins: the first candidate is the recipe itself.
Of parameters other than weights, which have limits, only the means are taken.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from merge3.checkpoint.layout import Layout
from merge3.errors import ConfigError
from merge3.parameters import Setting, by_tensor
from merge3.recipe import Recipe, Source
from merge3.space import projection
from merge3.space.definition import SpaceDefinition
from merge3.space.parameters import ParameterSpace

WHERE = "genome: start"


class AroundSpace(ParameterSpace):
    """See merge3.space.Space, and ParameterSpace. around: the recipe; tensors: of the layout, by name and slice; apart:
    (place of a model, gene) -> how much more every tensor has than its genes where the search begins, float64
    [tensors]."""

    def __init__(self, definition: SpaceDefinition, layout: Layout):
        super().__init__(definition, layout)
        self.around, self._plain = _read(definition.around), ParameterSpace(definition, layout)
        self.tensors = projection.tensors_of(self)
        names = [tensor.name for tensor in self.tensors]
        self._shares = projection.governed(self, names).reshape(len(names), -1)
        with warnings.catch_warnings():  # a search says what bounds have changed when it begins there
            warnings.simplefilter("ignore")
            self._start = self._plain.project(self.around, WHERE)
        own, _ = self.decoded(self._start)
        self.apart = {}
        for at, values in projection.by_tensor(self, self.around, WHERE).items():
            if self._genes[at[1]].weighs:
                self.apart[at] = np.nan_to_num(values - self._governed(own, *at))
        if not self.apart:
            found = f"weights are no genes of {self.method.name} here"
            raise ConfigError("genome: space", f"around, and {found}", "`space: parameters`")

    def initial(self) -> np.ndarray:
        """The recipe's genome."""
        return self._start.copy()

    def recipe(self, genome: Sequence[float]) -> Recipe:
        """See Space."""
        recipe = super().recipe(genome)
        own, _ = self.decoded(np.asarray(genome, dtype=np.float64))
        values = {at: self._governed(own, *at) + apart for at, apart in self.apart.items()}
        slices = []
        for number, part in enumerate(recipe.slices):
            inside = [i for i, tensor in enumerate(self.tensors) if tensor.part == number]
            sources = list(part.sources)
            for (m, gene), found in values.items():
                named = {self.tensors[i].name: float(found[i]) for i in inside}
                sources[m] = _with(sources[m], gene, by_tensor(named))
            slices.append(replace(part, sources=tuple(sources)))
        return replace(recipe, slices=tuple(slices))

    def genome(self, recipe: Recipe) -> np.ndarray:
        """See Space; but for weights, whose last bits are rounded."""
        bare = self._plain.project(recipe)
        own, shared = self.decoded(bare)
        for (m, gene), values in projection.by_tensor(self, recipe, "recipe").items():
            if (m, gene) in self.apart:
                found = projection.nearest(self._shares, values - self.apart[m, gene])
                known = ~np.isnan(found)
                own[gene][:, m].reshape(-1)[known] = found[known]
        return self.encoded(own, shared)

    def project(self, recipe: Recipe, where: str = "recipe", unmerged: Collection[str] = ()) -> np.ndarray:
        """See Space. Of the recipe that the space is around, where it begins."""
        genome = self._plain.project(recipe, where, unmerged)
        return self.initial() if recipe.to_dict() == self.around.to_dict() else genome

    def _governed(self, own: dict[str, np.ndarray], m: int, gene: str) -> np.ndarray:
        """What a model's genes make of every tensor, float64 [tensors]."""
        return self._shares @ own[gene][:, m].ravel()


def _with(source: Source, gene: str, setting: Setting) -> Source:
    return replace(source, parameters={**source.parameters, gene: setting})


def _read(text: str) -> Recipe:
    """Raises ConfigError, or RecipeError, for what is none."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(WHERE, f"found {text[:40]!r}", "a recipe as JSON") from None
    return Recipe.parse(data, WHERE)
