"""The space of a method's parameters: values for groups of layers, models and filter sets.

A genome is a flat float64 vector in the parameters' own units, laid out [group, model, filter set, own parameter] and
then [group, shared parameter]. Groups are runs of layers; the tensors before the stack and after it (embedding; final
norm and head) are groups of their own, the first and the last. What a value means is its gene's and the preset's
affair (presets.py); how a recipe writes it, settings.py's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from merge3.checkpoint.layout import Layout
from merge3.errors import ConfigError
from merge3.methods import Method, method_named
from merge3.recipe import ModelRef, Recipe, Slice, Source
from merge3.space import projection, settings
from merge3.space.definition import SpaceDefinition
from merge3.space.presets import PRESETS, Preset

Values = dict[str, np.ndarray]  # by gene: of every model [groups, models, filter sets], or shared [groups]


class ParameterSpace:
    """See merge3.space.Space. own: genes of every model; shared: genes of all; ranges: [first, last) of each run of
    layers; outside: whether embedding, and norm and head, are groups; whole: whether recipes have one slice, of all
    layers; shape: of the genome's first part."""

    def __init__(self, definition: SpaceDefinition, layout: Layout):
        self.definition, self.layout, self.merged = definition, layout, definition.merges()
        self.method, self.preset = _method(definition), _preset(definition)
        self.genes = definition.genes or self.method.searched
        for gene in self.genes:
            if gene not in self.method.genes:
                valid = ", ".join(self.method.genes) or "a method with parameters"
                raise ConfigError("genome: genes", f"{gene!r} for {self.method.name}", valid)
        self._genes = {name: self.method.genes[name] for name in self.genes}
        self.own = tuple(g for g in self.genes if self.method.parameters[g].scope != "shared")
        self.shared = tuple(g for g in self.genes if self.method.parameters[g].scope == "shared")
        self.ranges = _layer_ranges(layout.layers, definition.layer_granularity, self.preset)
        self.outside = self.preset.outside and len(self.ranges) > 1 and not definition.smooth
        self.whole = definition.smooth or len(self.ranges) == 1
        self.groups = len(self.ranges) + (2 if self.outside else 0)
        self.sets = len(definition.filters) + 1
        self.shape = (self.groups, len(definition.models), self.sets, len(self.own))
        self._split = int(np.prod(self.shape))
        self.size = self._split + self.groups * len(self.shared)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest value of every gene, float64 [size] each."""
        if not self.preset.bounded:
            return np.full(self.size, -np.inf), np.full(self.size, np.inf)
        asked, limits = self.definition.bounds, {}
        for name, gene in self._genes.items():
            low, high = asked.get(name, (gene.low, gene.high))
            if gene.weighs and name not in asked and not self.definition.allow_negative_weights:
                low = max(low, 0.0)
            limits[name] = (low, high)
        both = self._laid_out(limits).reshape(self.size, 2)
        return both[:, 0].copy(), both[:, 1].copy()

    def initial(self) -> np.ndarray:
        """The uniform merge: float64 [size]."""
        models = len(self.definition.models)
        starts = {name: self.preset.start(gene, models) for name, gene in self._genes.items()}
        return np.clip(self._laid_out(starts), *self.bounds())

    def recipe(self, genome: Sequence[float]) -> Recipe:
        """The recipe of a genome. Raises ConfigError on a wrong length or a value that is not finite."""
        own, shared = self.decoded(self._checked(genome))
        if self.whole:
            slices, parameters = (self._whole(own),), self._of_all_layers(shared)
        else:
            slices, parameters = tuple(self._slice(i, own, shared) for i in range(len(self.ranges))), {}
        normalize = self.definition.normalize
        if normalize is None and self.preset.normalizes:
            normalize = self.method.evolve_normalizes
        if normalize is not None and "normalize" in self.method.parameters:
            parameters["normalize"] = normalize
        base = ModelRef.parse(self.definition.base) if self.definition.base else None
        return Recipe(
            self.method.name,
            slices,
            base,
            parameters,
            self.definition.dtype,
            tokenizer=self.definition.tokenizer,
            chat_template=self.definition.chat_template,
            tower=self.definition.tower,
            merged=self.merged,
        )

    def genome(self, recipe: Recipe) -> np.ndarray:
        """The genome of a recipe this space made: the inverse of `recipe`, exact to the last bit."""
        own = np.zeros(self.shape)
        shared = np.zeros((self.groups, len(self.shared)))
        for group, part, tensor in self._places(recipe):
            by_model = {str(s.model): s.parameters for s in part.sources}
            for i, gene in enumerate(self.own):
                for m, model in enumerate(self.definition.models):
                    own[group, m, :, i] = settings.read(by_model[model][gene], group, self.sets, tensor)
            for i, gene in enumerate(self.shared):
                setting = part.parameters.get(gene, recipe.parameters.get(gene))
                shared[group, i] = settings.read(setting, group, self.sets, tensor)[-1]
        return np.concatenate([own.ravel(), shared.ravel()])

    def project(self, recipe: Recipe, where: str = "recipe", unmerged: Collection[str] = ()) -> np.ndarray:
        """See Space."""
        return projection.project(self, recipe, where, unmerged)

    def uniform_recipe(self) -> Recipe:
        """The recipe of `initial`."""
        return self.recipe(self.initial())

    # -- genome to values

    def _laid_out(self, by_gene: Mapping[str, Any]) -> np.ndarray:
        """Something of every gene where a genome has that gene's values: float64 [size, ..]."""
        cells = int(np.prod(self.shape[:-1]))
        names = self.own * cells + self.shared * self.groups
        return np.array([by_gene[name] for name in names], dtype=np.float64)

    def _checked(self, genome: Sequence[float]) -> np.ndarray:
        genome = np.asarray(genome, dtype=np.float64)
        if genome.shape != (self.size,):
            raise ConfigError("genome", f"{genome.shape[0] if genome.ndim else 0} values", f"{self.size}")
        if not np.isfinite(genome).all():
            position = int(np.flatnonzero(~np.isfinite(genome))[0])
            raise ConfigError("genome", f"value {position} is not finite", "numbers")
        return genome

    def decoded(self, genome: np.ndarray) -> tuple[Values, Values]:
        """The parameters' values: (own, shared)"""

        def decode(name: str, values: np.ndarray) -> np.ndarray:
            return self.preset.decode(self._genes[name], values, self.definition.allow_negative_weights)

        own = genome[: self._split].reshape(self.shape)
        shared = genome[self._split :].reshape(self.groups, len(self.shared))
        return (
            {name: decode(name, own[..., i]) for i, name in enumerate(self.own)},
            {name: decode(name, shared[:, i]) for i, name in enumerate(self.shared)},
        )

    def encoded(self, own: Values, shared: Values) -> np.ndarray:
        """The genome, bounds aside, that is decoded to values as near to these as can be. NaN stays."""

        def encode(name: str, values: np.ndarray) -> np.ndarray:
            return self.preset.encode(self._genes[name], values, self.definition.allow_negative_weights)

        parts = []
        for values in (own, shared):
            parts.append(np.stack([encode(*one) for one in values.items()], axis=-1).ravel() if values else np.empty(0))
        return np.concatenate(parts)

    # -- values to settings, and where to find them again

    def written(self, values: np.ndarray) -> list[settings.Setting]:
        """The setting in every slice of a recipe. values: of one model and parameter, [groups, filter sets]."""
        if self.whole:
            return [settings.by_layer(values, self.definition.filters)]
        return [self._setting(index, values) for index in range(len(self.ranges))]

    def _slice(self, index: int, own: Values, shared: Values) -> Slice:
        """One run of layers; the first has the tensors before the stack too, the last those after it."""
        layers, base = self.ranges[index], self.definition.base
        sources = []
        for m, model in enumerate(self.definition.models):
            parameters = {name: self._setting(index, values[:, m]) for name, values in own.items()}
            sources.append(Source(ModelRef.parse(model), layers, parameters))
        if base is not None and base not in self.definition.models:
            sources.append(Source(ModelRef.parse(base), layers))
        alike = {name: np.repeat(values[:, None], self.sets, axis=1) for name, values in shared.items()}
        return Slice(tuple(sources), None, {name: self._setting(index, values) for name, values in alike.items()})

    def _setting(self, index: int, values: np.ndarray) -> settings.Setting:
        """values: [groups, filter sets]."""
        if not self.outside:
            return settings.by_name(values[index], {}, self.definition.filters)
        others: dict[str, float] = {}
        if index == 0:
            others |= dict.fromkeys(self.layout.pre, values[0].tolist()[-1])
        if index == len(self.ranges) - 1:
            others |= dict.fromkeys(self.layout.post, values[-1].tolist()[-1])
        return settings.by_name(values[index + 1], others, self.definition.filters)

    def _whole(self, own: Values) -> Slice:
        """All layers in one slice."""
        sources = []
        for m, model in enumerate(self.definition.models):
            of_model = {name: settings.by_layer(values[:, m], self.definition.filters) for name, values in own.items()}
            sources.append(Source(ModelRef.parse(model), None, of_model))
        return Slice(tuple(sources))

    def _of_all_layers(self, shared: Values) -> dict[str, settings.Setting]:
        return {name: settings.by_layer(values[:, None], ()) for name, values in shared.items()}

    def _places(self, recipe: Recipe) -> Iterator[tuple[int, Slice, str | None]]:
        """(group, the slice that holds its values, the tensor outside the stack that has them) of every group."""
        first = 1 if self.outside else 0
        for i in range(len(self.ranges)):
            yield first + i, recipe.slices[min(i, len(recipe.slices) - 1)], None
        if self.outside:
            yield 0, recipe.slices[0], next(iter(self.layout.pre), None)
            yield self.groups - 1, recipe.slices[-1], next(iter(self.layout.post), None)


def _method(definition: SpaceDefinition) -> Method:
    """The definition's method, if it can merge so many models."""
    method = method_named(definition.method, "genome: merge_method")
    if method.base == "required" and definition.base is None:
        raise ConfigError("genome: base_model", f"missing; {method.name} merges changes from a base", "a model")
    low, high = method.experts
    if not low <= len(definition.models) <= high:
        raise ConfigError("genome: models", f"{len(definition.models)} models", f"{low} to {high} for {method.name}")
    return method


def _preset(definition: SpaceDefinition) -> Preset:
    if definition.preset not in PRESETS:
        raise ConfigError("genome: preset", f"found {definition.preset!r}", ", ".join(PRESETS))
    return PRESETS[definition.preset]


def _layer_ranges(layers: int, step: int, preset: Preset) -> list[tuple[int, int]]:
    if step <= 0 or not preset.layered or layers == 0:
        return [(0, layers)]
    if preset.divisible and layers % step:
        raise ConfigError("genome: layer_granularity", f"{step} for {layers} layers", "a divisor of the layers")
    return [(first, min(first + step, layers)) for first in range(0, layers, step)]
