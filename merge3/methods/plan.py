"""From a recipe and the endpoints' layouts to one job per output tensor.

mergekit's rules: parameters are looked up in source, slice and global order; position t runs from 0 to
1 over a slice's layers (1 for a slice of one); tensors before the stack belong to the first slice and
those after it to the last, both at t = 0; with `models` the base joins the sources by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from merge3 import parameters as settings
from merge3.checkpoint.layout import Layout, Ref
from merge3.errors import RecipeError
from merge3.methods.base import REQUIRED, Job, Method
from merge3.recipe import ModelRef, Recipe, Slice, Source

# mergekit ignores parameters a method does not take; these stand in many recipes without effect.
_HARMLESS = ("int8_mask", "normalize", "rescale")


class Endpoints(Protocol):
    """What planning asks of a pool."""

    layouts: dict[str, Layout]
    kept: dict[str, str]

    def has(self, ref: Ref) -> bool: ...
    def shape(self, ref: Ref) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Plan:
    """jobs: what is merged; copies: output name -> the tensor kept as it is; layers: of the output."""

    jobs: list[Job]
    copies: dict[str, Ref]
    layers: int


def plan(recipe: Recipe, method: Method, pool: Endpoints, where: str = "recipe") -> Plan:
    """Resolve every output tensor. Raises RecipeError for what does not fit: method, parameters, layers."""
    _check(recipe, method, where)
    for model in recipe.models():
        if str(model) not in pool.layouts:
            raise RecipeError(where, f"model {str(model)!r} is not in the pool", ", ".join(pool.layouts))
    slices = [_with_base(part, recipe, method, f"{where}: slices[{i}]") for i, part in enumerate(recipe.slices)]
    lead = pool.layouts[str(slices[0].sources[0].model)]
    jobs, copies, layers = [], {}, 0

    def add(name: str, part: Slice, models: list[str], inputs: list[str], t: float) -> None:
        refs = [Ref(model, tensor) for model, tensor in zip(models, inputs)]
        base = part.base_model or recipe.base_model
        anchor = refs[0]
        if base is not None and str(base) in models:
            anchor = Ref(str(base), refs[models.index(str(base))].tensor)
        if anchor.tensor in pool.kept and not (len(refs) == 1 and pool.has(refs[0])):
            copies[name] = anchor
            return
        if not all(pool.has(r) for r in refs):
            if pool.has(anchor):
                copies[name] = anchor
            return
        jobs.append(_job(name, part, refs, t, recipe, method, base, pool.shape(anchor), where))

    models = [[str(s.model) for s in part.sources] for part in slices]
    for name in lead.pre:
        add(name, slices[0], models[0], [name] * len(slices[0].sources), 0.0)
    for index, part in enumerate(slices):
        ranges = [_range(s, pool, f"{where}: slices[{index}]") for s in part.sources]
        count = ranges[0][1] - ranges[0][0]
        for offset in range(count):
            t = offset / (count - 1) if count > 1 else 1.0
            for tensor in lead.layer_names:
                inputs = [pool.layouts[m].layer_tensor(r[0] + offset, tensor) for m, r in zip(models[index], ranges)]
                add(lead.layer_tensor(layers, tensor), part, models[index], inputs, t)
            layers += 1
    for name in lead.post:
        add(name, slices[-1], models[-1], [name] * len(slices[-1].sources), 0.0)
    return Plan(jobs, copies, layers)


def _check(recipe: Recipe, method: Method, where: str) -> None:
    levels = [(recipe.parameters, f"{where}: parameters")]
    for i, part in enumerate(recipe.slices):
        at = f"{where}: models" if recipe.whole else f"{where}: slices[{i}].sources"
        levels.append((part.parameters, f"{where}: slices[{i}].parameters"))
        levels += [(s.parameters, f"{at}[{j}].parameters") for j, s in enumerate(part.sources)]
    for names, at in levels:
        method.check_parameters([n for n in names if n not in _HARMLESS], at)
        for name, setting in names.items():
            if name in method.parameters:
                for value in settings.scalars(setting):
                    if value is not None:
                        method.validate(name, value, at)


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


def _range(source: Source, pool: Endpoints, where: str) -> tuple[int, int]:
    layers = pool.layouts[str(source.model)].layers
    first, last = source.layer_range or (0, layers)
    if last > layers:
        raise RecipeError(f"{where}: layer_range", f"[{first}, {last}) of {source.model}", f"at most {layers} layers")
    return first, last


def _job(
    name: str, part: Slice, refs: list[Ref], t: float, recipe: Recipe, method: Method, base: ModelRef | None,
    shape: tuple[int, ...], where: str,
) -> Job:  # fmt: skip
    common = (part.parameters, recipe.parameters)
    shared = {
        p: _value(method, p, common, name, t, f"{where}: parameters")
        for p, spec in method.parameters.items()
        if spec.scope == "shared"
    }
    own = [p for p, spec in method.parameters.items() if spec.scope != "shared"]
    base_ref, sources, per_source = None, [], []
    for source, ref in zip(part.sources, refs):
        if source.model == base and method.base != "source":
            base_ref = ref
            continue
        sources.append(ref)
        levels = (source.parameters, *common)
        per_source.append({p: _value(method, p, levels, ref.tensor, t, f"{where}: {source.model}") for p in own})
    return Job(name, base_ref, tuple(sources), shared, tuple(per_source), shape)


def _value(method: Method, name: str, levels: tuple, tensor: str, t: float, where: str) -> Any:
    default = method.parameters[name].default
    try:
        value = settings.lookup(name, levels, tensor, t, *([] if default is REQUIRED else [default]))
    except KeyError:
        raise RecipeError(f"{where}.{name}", f"missing for tensor {tensor}", f"a value, {method.name} needs one") from None
    return value if value is default else method.validate(name, value, where)
