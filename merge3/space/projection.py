"""Any recipe as a genome: where a search can begin.

A space writes settings, so which genes govern which tensor is found by writing them: every gene is a unit vector, and
what a tensor looks up says how far each gene governs it. A gene that governs its tensors alone then takes the mean of
the recipe's values for them, all tensors alike (a layout knows no sizes); those of `smooth` spaces, which share
tensors, the least squares. A gene that governs no tensor starts as usual.

A layout also has tensors that are never merged (tied, or kept from the base); a pool says which. Whatever a recipe has
for them counts for nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from merge3.checkpoint.layout import Layout
from merge3.errors import ConfigError, Merge3Warning
from merge3.methods import Method, method_named
from merge3.methods.base import REQUIRED
from merge3.parameters import evaluate, indexed
from merge3.recipe import ModelRef, Recipe

if TYPE_CHECKING:
    from merge3.space.parameters import ParameterSpace


class Tensor(NamedTuple):
    """One that may be merged. part: the slice that it is in; t: its place in the slice, as plan.py counts."""

    name: str
    part: int
    t: float


def project(space: ParameterSpace, recipe: Recipe, where: str, unmerged: Collection[str] = ()) -> np.ndarray:
    """The genome nearest to a recipe, inside the bounds: float64 [size]; a warning for each line of `projected`."""
    genome, lines = projected(space, recipe, where, unmerged)
    for line in lines:
        warnings.warn(line, Merge3Warning, stacklevel=3)
    return genome


def projected(
    space: ParameterSpace, recipe: Recipe, where: str, unmerged: Collection[str] = ()
) -> tuple[np.ndarray, list[str]]:
    """(the genome nearest to a recipe, float64 [size], lines to tell). One says what bounds have changed, another what
    a recipe of a method that is only alike does not say. unmerged: tensors that no merge changes.

    Raises ConfigError for another method, base or models, layers out of place, and parameters that no candidate has.
    """
    theirs = method_named(recipe.method, f"{where}: merge_method")
    alike = _alike(space.method, theirs, where)
    _check_models(space, recipe, where)
    ranges = _ranges(recipe, space.layout.layers, where)
    values = _Values(recipe, theirs, _tensors(space.layout, ranges, unmerged), where)
    ours = [tensor for tensor in tensors_of(space) if tensor.name not in unmerged]
    _check_fixed(space, values, ours, alike)
    wanted = _wanted(space, values, ours, [gene for gene in space.genes if gene in alike])
    encoded = space.encoded(*wanted)
    genome = np.where(np.isnan(encoded), space.initial(), np.clip(encoded, *space.bounds()))
    lines: list[str] = []
    if theirs is not space.method:
        taken, others = ([g for g in space.genes if (g in alike) == known] for known in (True, False))
        rest = f"; begun as usual: {', '.join(others)}" if others else ""
        found = f"a {theirs.name} merge, not {space.method.name}: taken from it: {', '.join(taken)}{rest}"
        lines.append(f"{where}: {found}")
    if changed := list(_changed(space, wanted, genome)):
        more = f", and {len(changed) - 1} more genes" if len(changed) > 1 else ""
        lines.append(f"{where}: outside what the search may vary: {changed[0]}{more}")
    return genome, lines


# -- what a recipe must be like


def _alike(method: Method, theirs: Method, where: str) -> Sequence[str]:
    """The parameters of a recipe's method that mean the same in the space's."""
    if theirs is method:
        return list(method.parameters)
    if theirs.name not in method.like:
        raise ConfigError(f"{where}: merge_method", f"found {theirs.name}", " or ".join([method.name, *method.like]))
    return method.like[theirs.name]


def _experts(space: ParameterSpace) -> list[str]:
    """The models whose genes count: the base is none where it is not merged."""
    models = [str(ModelRef.parse(model)) for model in space.definition.models]
    return models if space.method.base == "source" else [m for m in models if m != space.definition.base]


def _check_models(space: ParameterSpace, recipe: Recipe, where: str) -> None:
    base, merged = space.definition.base, space.method.base == "source"
    expected = _experts(space)
    for part in recipe.slices:
        theirs = part.base_model or recipe.base_model
        if not merged and (theirs and str(theirs)) != base:
            found = f"found {theirs or 'none'}"
            raise ConfigError(f"{where}: base_model", found, f"{base or 'none'}, as in the genome")
        found = [str(source.model) for source in part.sources]
        if merged and recipe.whole and theirs is not None and str(theirs) not in found:
            found.append(str(theirs))  # it joins them by itself
        if not merged:
            found = [model for model in found if model != base]
        if sorted(found) != sorted(expected):
            raise ConfigError(
                f"{where}: models", f"found {', '.join(found) or 'none'}", f"{', '.join(expected)}, as in the genome"
            )


def _ranges(recipe: Recipe, layers: int, where: str) -> list[tuple[int, int]]:
    """[first, last) of the layers of every slice."""
    if recipe.whole:
        return [(0, layers)]
    ranges, reached = [], 0
    for i, part in enumerate(recipe.slices):
        found = sorted({source.layer_range or (0, layers) for source in part.sources})
        (first, last), *others = found
        if others or first != reached or last > layers:
            names = ", ".join(f"[{a}, {b})" for a, b in found)
            expected = f"[{reached}, ..) of every model: all {layers} layers once, in place"
            raise ConfigError(f"{where}: slices[{i}]", f"layers {names}", expected)
        ranges.append((first, last))
        reached = last
    if reached != layers:
        raise ConfigError(f"{where}: slices", f"the first {reached} layers", f"all {layers} once, in place")
    return ranges


def _check_fixed(space: ParameterSpace, values: _Values, tensors: list[Tensor], names: Sequence[str]) -> None:
    """Refuse what no candidate has: of parameters that are not searched every candidate has the same value. tensors:
    as candidates have them."""
    ours = _Values(space.uniform_recipe(), space.method, tensors, "genome")
    for name in names:
        parameter = space.method.parameters[name]
        if name in space.genes or parameter.idle:
            continue
        for model in [None] if parameter.scope == "shared" else _experts(space):
            for tensor, found, fixed in zip(tensors, values.of(name, model), ours.of(name, model)):
                if found == fixed or found is REQUIRED or fixed is REQUIRED:
                    continue
                hint = f"or {name} among the genome's `genes`" if parameter.gene else ""
                if hasattr(space.definition, name):
                    hint = f"or `{name}: {str(found).lower()}` in the genome"
                of = f" of {model}" if model else ""
                expected = f"{fixed}, which every candidate has"
                raise ConfigError(f"{values.where}: {name}{of}", f"{found} for {tensor.name}", expected, hint)


# -- what it says, tensor by tensor


def _tensors(layout: Layout, ranges: Sequence[tuple[int, int]], unmerged: Collection[str]) -> list[Tensor]:
    """Every tensor that may be merged, in one order whatever the slices."""
    return [tensor for tensor in _all_tensors(layout, ranges) if tensor.name not in unmerged]


def _all_tensors(layout: Layout, ranges: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    for name in layout.pre:
        yield Tensor(name, 0, 0.0)
    for part, (first, last) in enumerate(ranges):
        for layer in range(first, last):
            t = (layer - first) / (last - first - 1) if last - first > 1 else 1.0
            for name in layout.layer_names:
                yield Tensor(layout.layer_tensor(layer, name), part, t)
    for name in layout.post:
        yield Tensor(name, len(ranges) - 1, 0.0)


@dataclass(frozen=True)
class _Values:
    """What a recipe has for every tensor."""

    recipe: Recipe
    method: Method
    tensors: list[Tensor]
    where: str

    def of(self, name: str, model: str | None) -> list[Any]:
        """A parameter's values; REQUIRED where there is none but should be. model: whose; None for a shared one."""
        levels, found, at = [], [], f"{self.where}: {model or 'parameters'}"
        for part in self.recipe.slices:
            own = [source.parameters for source in part.sources if str(source.model) == model]
            levels.append([indexed(level) for level in (*own, part.parameters, self.recipe.parameters)])
        for tensor in self.tensors:
            found.append(self.method.looked_up(name, levels[tensor.part], tensor.name, tensor.t, at))
        return found

    def numbers(self, name: str, model: str | None) -> np.ndarray:
        """The same as float64 [tensors], NaN for none."""
        values = self.of(name, model)
        if values and all(value is REQUIRED for value in values):
            at = f"{self.where}: {model}.{name}" if model else f"{self.where}: {name}"
            raise ConfigError(at, "missing", f"a value, {self.method.name} needs one")
        return np.array([np.nan if value is REQUIRED or value is None else value for value in values], np.float64)


# -- and which genes that makes


def _wanted(space: ParameterSpace, values: _Values, tensors: list[Tensor], genes: Sequence[str]) -> tuple[dict, dict]:
    """The values that genes should have, as Space.decoded has them; NaN where the recipe says nothing. tensors: as
    candidates have them."""
    shares = governing(space, tensors)
    own = {name: np.full(space.shape[:-1], np.nan) for name in space.own}
    shared = {name: np.full(space.groups, np.nan) for name in space.shared}
    models = [str(ModelRef.parse(model)) for model in space.definition.models]
    for name in genes:
        if name in shared:
            shared[name][:] = nearest(shares.sum(axis=-1), values.numbers(name, None))
            continue
        for model in _experts(space):
            found = nearest(shares.reshape(len(shares), -1), values.numbers(name, model))
            found = found.reshape(space.groups, space.sets)
            if space.outside:  # there the last set has the value, the others go unused
                found[[0, -1]] = found[[0, -1], -1:]
            own[name][:, models.index(model)] = found
    return own, shared


def tensors_of(space: ParameterSpace, beyond: Sequence[str] = ()) -> list[Tensor]:
    """Every tensor of a space's layout, where its recipes have it. beyond: names of others, which follow the layers."""
    ranges = [(0, space.layout.layers)] if space.whole else space.ranges
    return [*_tensors(space.layout, ranges, ()), *(Tensor(name, len(ranges) - 1, 0.0) for name in beyond)]


def by_tensor(
    space: ParameterSpace, recipe: Recipe, where: str, beyond: Sequence[str] = ()
) -> dict[tuple[int, str], np.ndarray]:
    """(place of a model in the space, gene of every model) -> what a recipe that can be projected has for each of
    tensors_of, float64 [tensors], NaN for none."""
    theirs = method_named(recipe.method, f"{where}: merge_method")
    alike = _alike(space.method, theirs, where)
    ranges = _ranges(recipe, space.layout.layers, where)
    others = [Tensor(name, len(ranges) - 1, 0.0) for name in beyond]
    values = _Values(recipe, theirs, [*_tensors(space.layout, ranges, ()), *others], where)
    models, found = [str(ModelRef.parse(model)) for model in space.definition.models], {}
    for gene in space.own:
        if gene in alike:
            found |= {(models.index(model), gene): values.numbers(gene, model) for model in _experts(space)}
    return found


def governed(space: ParameterSpace, names: Sequence[str]) -> np.ndarray:
    """How far every gene of one model and parameter governs each of these tensors: float64 [tensors, groups, filter
    sets], 1 in all; 0 for a tensor outside the space's layout."""
    ranges = [(0, space.layout.layers)] if space.whole else space.ranges
    places = {tensor.name: tensor for tensor in _all_tensors(space.layout, ranges)}
    inside = [i for i, name in enumerate(names) if name in places]
    found = np.zeros((len(names), space.groups, space.sets))
    found[inside] = governing(space, [places[names[i]] for i in inside])
    return found


def governing(space: ParameterSpace, tensors: list[Tensor]) -> np.ndarray:
    """The same of tensors with their places, in the layout or not."""
    cells = np.empty((space.groups, space.sets), dtype=object)
    for cell, unit in zip(np.ndindex(cells.shape), np.eye(cells.size)):
        cells[cell] = unit
    settings = space.written(cells)
    found = [evaluate(settings[tensor.part], tensor.name, tensor.t) for tensor in tensors]
    return np.array(found).reshape(len(found), *cells.shape)


def nearest(governed: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Float64 [genes] that come nearest to values [tensors]; NaN for those without any. governed: [tensors, genes]."""
    known = ~np.isnan(values)
    governed, values = governed[known], values[known]
    found, reached = np.full(governed.shape[1], np.nan), governed.any(axis=0)
    if (governed.max(axis=1, initial=0) == 1).all():
        for gene in np.flatnonzero(reached):
            own = values[governed[:, gene] == 1]
            found[gene] = own[0] + (own - own[0]).mean()  # exact where all are equal
    else:
        offset = values[0]
        found[reached] = offset + np.linalg.lstsq(governed[:, reached], values - offset, rcond=None)[0]
    return found


def _changed(space: ParameterSpace, wanted: tuple[dict, dict], genome: np.ndarray) -> Iterator[str]:
    """Genes whose candidate at the start has another value than was wanted, by more than snapping explains."""
    for values, decoded in zip(wanted, space.decoded(genome)):
        for name, asked in values.items():
            steps = space.method.genes[name].steps
            off = np.abs(decoded[name] - asked) > (0.5 / steps if steps else 0) + 1e-9
            for at in map(tuple, np.argwhere(off)):
                yield f"{_described(space, name, at)} from {asked[at]:g} to {decoded[name][at]:g}"


def _described(space: ParameterSpace, name: str, at: tuple[int, ...]) -> str:
    """A gene in a message. at: (group, model, filter set), or (group,) of a shared one."""
    first = 1 if space.outside else 0
    if space.outside and at[0] in (0, space.groups - 1):
        place = "before the layers" if at[0] == 0 else "after the layers"
    else:
        low, high = space.ranges[at[0] - first]
        place = f"layers {low} to {high - 1}"
    if len(at) == 1:
        return f"{name} ({place})"
    filters = space.definition.filters
    place += f", {filters[at[2]]}" if at[2] < len(filters) else ""
    return f"{name} of {space.definition.models[at[1]]} ({place})"
