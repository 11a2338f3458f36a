"""mergekit's rules: from a recipe and the endpoints' layouts to what becomes of each output tensor.

Parameters are looked up in source, slice and global order; position t runs from 0 to 1 over a slice's layers (1 for
a slice of one); tensors before the stack belong to the first slice and those after it to the last, both at t = 0;
with `models` the base joins the sources by itself.

The output is laid out after all its sources alike, whatever their order: a tensor that only some of them have is kept
from the base where that can be, and refused otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from merge3 import parameters as settings
from merge3.alignment import common_rows
from merge3.checkpoint.layout import Layout, Ref
from merge3.checkpoint.towers import Tower
from merge3.checkpoint.vocabulary import Vocabulary
from merge3.errors import Merge3Warning, RecipeError
from merge3.methods.base import REQUIRED, Job, Method
from merge3.recipe import TOP_KEYS, ModelRef, Recipe, Slice, Source, nearest
from merge3.statistics import Statistics

# mergekit ignores parameters a method does not take; these stand in many recipes without effect.
_HARMLESS = ("int8_mask", "normalize", "rescale")


class View(Protocol):
    """What compiling a recipe and a method's row may ask of a pool; see Pool. All but `statistics` reads no weights."""

    layouts: dict[str, Layout]
    fixed: dict[str, str]
    towers: Mapping[str, Tower]
    tower: Mapping[str, str]
    statistics: Statistics
    vocabulary: Vocabulary | None

    def has(self, ref: Ref) -> bool:
        """See Pool."""

    def shape(self, ref: Ref) -> tuple[int, ...]:
        """See Pool."""

    def shared_with(self, ref: Ref) -> str | None:
        """See Pool."""

    def derive(self, method: str, compute: Callable, jobs: Sequence[Job], survey: Callable | None) -> str:
        """See Pool."""


class Kept(NamedTuple):
    """An output that is one source's tensor as it is, and why."""

    name: str
    source: Ref
    reason: str


class Rest(NamedTuple):
    """The rows of an output after those that are merged."""

    name: str
    source: Ref


class Tied(NamedTuple):
    """An output that is the same as another one in every source, and not stored."""

    name: str
    source: str


class Layer(NamedTuple):
    """The next layer of the output has the configuration of this one."""

    model: str
    layer: int


def resolve(recipe: Recipe, method: Method, view: View, where: str) -> Iterator[Job | Rest | Kept | Tied | Layer]:
    """What becomes of every output tensor, one after the other: merged (a Job, and a Rest where only its first rows
    are), kept or tied; and a Layer after each layer's tensors. Raises RecipeError for what does not fit: method,
    parameters, layers, tensors."""
    _check(recipe, method, where)
    for model in recipe.models():
        if str(model) not in view.layouts:
            raise RecipeError(where, f"model {str(model)!r} is not in the pool", ", ".join(view.layouts))
    slices = [_with_base(part, recipe, method, f"{where}: slices[{i}]") for i, part in enumerate(recipe.slices)]
    recipe, slices = replace(recipe, parameters=settings.indexed(recipe.parameters)), [_indexed(p) for p in slices]
    models = [[str(s.model) for s in part.sources] for part in slices]
    rules = _Rules(recipe, method, view, where)
    layouts, layer = list(view.layouts.values()), 0
    for name in _all(names.pre for names in layouts):
        yield from rules.output(name, slices[0], [Ref(m, name) for m in models[0]], 0.0)
    for index, part in enumerate(slices):
        at = f"{where}: models" if recipe.whole else f"{where}: slices[{index}]"
        ranges = [_range(s, recipe.whole, view, at) for s in part.sources]
        if recipe.whole:
            _check_depths(models[index], ranges, part.base_model or recipe.base_model, where)
        firsts, count = [first for first, _ in ranges], ranges[0][1] - ranges[0][0]
        anchor = _anchor(part, recipe, models[index])
        names = _all(view.layouts[m].layer_names for m in models[index])
        prefix = view.layouts[models[index][anchor]].prefix
        for offset in range(count):
            t = offset / (count - 1) if count > 1 else 1.0
            for name in names:
                inputs = []
                for model, first in zip(models[index], firsts):
                    inputs.append(Ref(model, view.layouts[model].layer_tensor(first + offset, name)))
                yield from rules.output(f"{prefix}.{layer}.{name}", part, inputs, t)
            yield Layer(models[index][anchor], firsts[anchor] + offset)
            layer += 1
    for name in _all(names.post for names in layouts):
        yield from rules.output(name, slices[-1], [Ref(m, name) for m in models[-1]], 0.0)


@dataclass(frozen=True)
class _Rules:
    """What one output becomes. constants: values of parameters that are the same for all tensors, as they are met."""

    recipe: Recipe
    method: Method
    view: View
    where: str
    constants: dict[tuple, Any] = field(default_factory=dict)

    def output(self, name: str, part: Slice, refs: list[Ref], t: float) -> Iterator[Job | Rest | Kept | Tied]:
        """Merged, kept or tied; nothing where no source has it."""
        view, there = self.view, [self.view.has(r) for r in refs]
        if not any(there):
            return
        shared = {view.shared_with(r) for r in refs}
        if len(shared) == 1 and None not in shared:
            yield Tied(name, shared.pop())
            return
        base = part.base_model or self.recipe.base_model
        anchor = refs[_anchor(part, self.recipe, [r.model for r in refs])]
        if (rows := self._rows(refs, there, anchor)) is not None:
            first = [Ref(r.model, r.tensor, (0, rows)) for r in refs]
            yield self._job(name, part, first, t, base, (rows, *view.shape(anchor)[1:]))
            if rows < view.shape(anchor)[0]:
                yield Rest(name, Ref(anchor.model, anchor.tensor, (rows, view.shape(anchor)[0])))
            return
        reason = self._unmergeable(refs, there, anchor)
        if reason is None:
            yield self._job(name, part, refs, t, base, view.shape(anchor))
            return
        if not view.has(anchor) or not (str(base) == anchor.model or len(refs) == 1 or anchor.tensor in view.fixed):
            raise RecipeError(
                self.where,
                f"tensor {name!r}: {reason}",
                "tensors of equal shapes in all models, or a base_model to keep it from",
            )
        yield Kept(name, anchor, reason)

    def _job(
        self, name: str, part: Slice, refs: list[Ref], t: float, base: ModelRef | None, shape: tuple[int, ...]
    ) -> Job:
        """The job with its parameters looked up: shared ones by the output's name, each source's by its tensor's."""
        method, common = self.method, (part.parameters, self.recipe.parameters)
        shared, own = {}, []
        for parameter, spec in method.parameters.items():
            if spec.scope == "shared":
                shared[parameter] = self._value(parameter, common, name, t, "parameters")
            else:
                own.append(parameter)
        base_ref, sources, per_source = None, [], []
        for source, ref in zip(part.sources, refs):
            if source.model == base and method.base != "source":
                base_ref = ref
                continue
            levels = (source.parameters, *common)
            sources.append(ref)
            per_source.append({p: self._value(p, levels, ref.tensor, t, source.model) for p in own})
        return Job(name, base_ref, tuple(sources), shared, tuple(per_source), shape)

    def _value(self, parameter: str, levels: tuple, tensor: str, t: float, whose: Any) -> Any:
        """Looked up once where no level tells tensors apart: a swap asks it of every tensor and model."""
        key = (parameter, *map(id, levels))
        if key in self.constants:
            return self.constants[key]
        value = _value(self.method, parameter, levels, tensor, t, f"{self.where}: {whose}")
        if not any(isinstance(level.get(parameter), list | tuple | Mapping) for level in levels):
            self.constants[key] = value
        return value

    def _rows(self, refs: list[Ref], there: list[bool], anchor: Ref) -> int | None:
        """How many rows a table of words has in all sources, where one of them is in a tower and they are not equally
        many; else None, and the tensor is merged or kept whole."""
        view = self.view
        if not all(there) or anchor.tensor in view.fixed or not any(r.model in view.towers for r in refs):
            return None
        if view.layouts[anchor.model].layer_of(anchor.tensor) is not None:
            return None
        shapes = [view.shape(ref) for ref in refs]
        return common_rows(*shapes) or None if len(set(shapes)) > 1 else None

    def _unmergeable(self, refs: list[Ref], there: list[bool], anchor: Ref) -> str | None:
        """Why a tensor is not merged; None where it is."""
        if anchor.tensor in self.view.fixed:
            return self.view.fixed[anchor.tensor]
        for ref, here in zip(refs, there):
            if not here:
                return f"not in {ref.model}"
        expected = self.view.shape(anchor)
        for ref in refs:
            if (found := self.view.shape(ref)) != expected:
                return f"shape {list(found)} in {ref.model}, {list(expected)} in {anchor.model}"
        return None


def _all(groups) -> list[str]:
    """Every name once, sorted: no model's order counts."""
    return sorted({name for group in groups for name in group})


def _anchor(part: Slice, recipe: Recipe, models: list[str]) -> int:
    """Which source the output is laid out after: the base, else the first."""
    base = part.base_model or recipe.base_model
    return models.index(str(base)) if base is not None and str(base) in models else 0


def _check_depths(models: list[str], ranges: list[tuple[int, int]], base: ModelRef | None, where: str) -> None:
    depths = {model: last for model, (_, last) in zip(models, ranges)}
    reference = str(base) if base is not None and str(base) in depths else models[0]
    for model, depth in depths.items():
        if depth != depths[reference]:
            found = f"{model} has {depth} layers, {reference} {depths[reference]}"
            raise RecipeError(f"{where}: models", found, "models of equal depth", "take layer ranges with `slices`")


def _check(recipe: Recipe, method: Method, where: str) -> None:
    for names, at in recipe.levels(where):
        for name, setting in names.items():
            if name not in method.parameters:
                _unknown(name, method, at)
                continue
            for value in settings.scalars(setting):
                if value is not None:
                    method.validate(name, value, at)


def _unknown(name: str, method: Method, at: str) -> None:
    """mergekit ignores what a method does not take. So do we, aloud; what is meant otherwise is refused."""
    if name in _HARMLESS:
        return
    known = ", ".join(method.parameters) or "none"
    if name in TOP_KEYS:
        raise RecipeError(f"{at}.{name}", "stands under `parameters`", f"`{name}` at the top level of the recipe")
    if hint := nearest(name, method.parameters, 0.7):
        raise RecipeError(f"{at}.{name}", f"{method.name} has no such parameter", known, hint)
    line = f"{at}.{name}: ignored, {method.name} has no such parameter (it has {known})"
    warnings.warn(line, Merge3Warning, stacklevel=2)


def _with_base(part: Slice, recipe: Recipe, method: Method, where: str) -> Slice:
    """The slice with the base among its sources where it joins them, and the right number of sources."""
    base, models = part.base_model or recipe.base_model, [s.model for s in part.sources]
    if method.base == "required" and base is None:
        raise RecipeError(f"{where}: base_model", f"missing; {method.name} merges changes from a base", "a model")
    if base is not None and base not in models:
        if not recipe.whole and method.base == "required":
            raise RecipeError(f"{where}: sources", f"the base {base} is not among them", "the base as a source")
        if recipe.whole:
            part = Slice((*part.sources, Source(base)), part.base_model, part.parameters)
    others = [s for s in part.sources if method.base == "source" or s.model != base]
    low, high = method.experts
    if not low <= len(others) <= high:
        expected = f"{low}" if low == high else f"{low} to {high}"
        what = "models" if method.base == "source" else "models beside the base"
        raise RecipeError(where, f"{len(others)} {what}", f"{expected} for {method.name}")
    return part


def _indexed(part: Slice) -> Slice:
    sources = tuple(replace(source, parameters=settings.indexed(source.parameters)) for source in part.sources)
    return replace(part, sources=sources, parameters=settings.indexed(part.parameters))


def _range(source: Source, whole: bool, view: View, where: str) -> tuple[int, int]:
    layers = view.layouts[str(source.model)].layers
    source.check_depth(layers, where)
    first, last = (0, layers) if whole or source.layer_range is None else source.layer_range
    if last > layers:
        raise RecipeError(f"{where}: layer_range", f"[{first}, {last}) of {source.model}", f"at most {layers} layers")
    return first, last


def _value(method: Method, name: str, levels: tuple, tensor: str, t: float, where: str) -> Any:
    value = method.looked_up(name, levels, tensor, t, where)
    if value is REQUIRED:
        raise RecipeError(f"{where}.{name}", f"missing for tensor {tensor}", f"a value, {method.name} needs one")
    return value
