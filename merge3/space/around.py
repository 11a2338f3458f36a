"""The space around a recipe: groups of tensors move together, and what sets them apart stays as the recipe has it.

A fit knows a weight for every tensor, a search some dozens of genes; as a start in the space of parameters such a
recipe is cut down to its means. Here a gene is what it is there, the mean of the tensors that it governs, and a
tensor's weight is that and its own difference from where the search begins: the first candidate is the recipe itself.
Of parameters other than weights, which have limits, only the means are taken.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from merge3.checkpoint.layout import Layout
from merge3.errors import ConfigError
from merge3.parameters import by_tensor
from merge3.recipe import Recipe, Source
from merge3.space import projection
from merge3.space.definition import SpaceDefinition
from merge3.space.parameters import ParameterSpace

WHERE = "genome: start"
_REST = {"filter": "*", "value": 0.0}


class AroundSpace(ParameterSpace):
    """See merge3.space.Space, and ParameterSpace. around: the recipe; tensors: by name and slice, of the layout and
    those that the recipe names beyond it (a head that only some models store); apart: (place of a model, gene) -> how
    much more every tensor has than its genes where the search begins, float64 [tensors]."""

    def __init__(self, definition: SpaceDefinition, layout: Layout):
        super().__init__(definition, layout)
        self.around, self._plain = _read(definition.around), ParameterSpace(definition, layout)
        weights = [name for name in self.own if self._genes[name].weighs]
        if not weights:
            found = f"weights are no genes of {self.method.name} here"
            raise ConfigError("genome: space", f"around, and {found}", "`space: parameters`")
        self._beyond = _beyond(self.around, weights, {tensor.name for tensor in projection.tensors_of(self)})
        self.tensors = projection.tensors_of(self, self._beyond)
        self._shares = projection.governing(self, self.tensors).reshape(len(self.tensors), -1)
        # The order in which a slice's recipe names them: of two names that contain one another the longer one first.
        self._inside = {}
        for number in range(1 if self.whole else len(self.ranges)):
            own = {tensor.name: i for i, tensor in enumerate(self.tensors) if tensor.part == number}
            self._inside[number] = [own[entry["filter"]] for entry in by_tensor(dict.fromkeys(own, 0.0))]
        # A search says what bounds have changed when it begins there.
        self._start, _ = projection.projected(self._plain, _without_rest(self.around, weights), WHERE)
        own, _ = self.decoded(self._start)
        self.apart = {}
        for at, values in projection.by_tensor(self, self.around, WHERE, self._beyond).items():
            if at[1] in weights:
                self.apart[at] = np.nan_to_num(values - self._governed(own, *at))

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
            sources = list(part.sources)
            for (m, gene), found in values.items():
                named = [{"filter": self.tensors[i].name, "value": float(found[i])} for i in self._inside[number]]
                sources[m] = _before(sources[m], gene, named)
            slices.append(replace(part, sources=tuple(sources)))
        return replace(recipe, slices=tuple(slices))

    def genome(self, recipe: Recipe) -> np.ndarray:
        """See Space; but for weights, whose last bits are rounded."""
        bare = self._plain.project(recipe)
        own, shared = self.decoded(bare)
        for (m, gene), values in projection.by_tensor(self, recipe, "recipe", self._beyond).items():
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


def _before(source: Source, gene: str, named: list[dict]) -> Source:
    """With values of single tensors before its setting, which then holds for all others."""
    setting = source.parameters[gene]
    alone = not isinstance(setting, list) or not isinstance(setting[0], dict)
    others = [{"value": setting}] if alone else setting
    return replace(source, parameters={**source.parameters, gene: [*named, *others]})


def _beyond(recipe: Recipe, genes: Collection[str], layout: Collection[str]) -> list[str]:
    """What a recipe's conditions name that is neither a tensor of the layout nor a part of its name."""
    found = {}
    for part in recipe.slices:
        for setting in (source.parameters.get(gene) for source in part.sources for gene in genes):
            for entry in setting if isinstance(setting, (list, tuple)) else ():
                name = entry.get("filter") if isinstance(entry, Mapping) else None
                if name not in (None, "*") and name not in layout:
                    found[name] = None
    return [name for name in found if not any(name in tensor for tensor in layout)]


def _without_rest(recipe: Recipe, genes: Collection[str]) -> Recipe:
    """Without the 0 that a fit gives to all it has no weight for: what is never merged, and no part of any mean."""
    slices = []
    for part in recipe.slices:
        sources = []
        for source in part.sources:
            parameters = dict(source.parameters)
            for gene in genes:
                setting = parameters.get(gene)
                if isinstance(setting, (list, tuple)) and len(setting) > 1 and setting[-1] == _REST:
                    parameters[gene] = list(setting[:-1])
            sources.append(replace(source, parameters=parameters))
        slices.append(replace(part, sources=tuple(sources)))
    return replace(recipe, slices=tuple(slices))


def _read(text: str) -> Recipe:
    """Raises ConfigError, or RecipeError, for what is none."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(WHERE, f"found {text[:40]!r}", "a recipe as JSON") from None
    return Recipe.parse(data, WHERE)
