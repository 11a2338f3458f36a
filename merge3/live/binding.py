"""Which part of the live model each tensor of a checkpoint is.

Mostly a parameter of the same name. But transformers renames some tensors as it loads them, fuses others (the experts
of a mixture become one tensor per layer) and splits a few. Its own table of conversions says which; what a conversion
does to the numbers is found by sending marked ones through it, and checked against the base's weights, which the live
model holds. So a merge of a checkpoint's tensors is written straight into parts of fused parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from merge3.checkpoint.architecture import loading
from merge3.checkpoint.layout import Ref
from merge3.checkpoint.naming import by_token, is_buffer
from merge3.errors import CheckpointError
from merge3.pool import Pool

Shape = tuple[int, ...]
_SAMPLES = 512  # elements of a tensor that are compared with the live model's


def bind(model: torch.nn.Module, pool: Pool) -> dict[str, torch.Tensor]:
    """Checkpoint name -> the live tensor, for every tensor of the base, and every output that is held apart. A tensor
    that is a part of a parameter is a view of it; parameters that are parts of one tensor become views of that.

    Raises CheckpointError for a tensor that is no parameter, unless the model computes or ignores it.
    """
    live = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    shapes = {name: info.shape for name, info in pool.base_checkpoint.tensors.items()}
    apart = {name: pool.shape(Ref(pool.base, name)) for name in pool.outputs}
    bound: dict[str, torch.Tensor] = {}
    wanted, converted = _targets(model, live, shapes | apart)
    left = [name for name, target in wanted.items() if target not in live]
    if left:
        more, others = _targets(model, live, left, of_old=True)
        wanted, converted = wanted | more, converted + others
    for name, target in wanted.items():
        if target not in live or tuple(live[target].shape) != (shapes | apart)[name]:
            continue
        if target == name or name not in shapes or _other_words(pool, name) or _holds(pool, name, live[target]):
            bound[name] = live[target].data
    for group in converted:
        bound |= _parts(model, live, group, shapes, pool)
    missing = [name for name in shapes | apart if name not in bound and not is_buffer(name, shapes.get(name, ()))]
    if missing and (said := loading(pool.base_checkpoint.config, shapes)):
        ignored = set(said.unexpected)  # transformers does not load them either
        missing = [name for name in missing if name not in ignored and wanted.get(name) not in ignored]
    if missing:
        found = f"tensor {missing[0]!r} (one of {len(missing)}) is no parameter of {type(model).__name__}"
        raise CheckpointError(pool.base, found, "an architecture whose checkpoint names are its parameters")
    return bound


@dataclass(frozen=True)
class _Group:
    """Tensors that one conversion turns into one or more parameters. converter: transformers' own, as yet without
    tensors; target: the parameter it goes by; sources: (name, the converter's pattern for it), in loading order."""

    converter: Any
    target: str
    sources: list[tuple[str, str]]


def _targets(
    model, live: Mapping[str, Any], names: Iterable[str], of_old: bool = False
) -> tuple[dict[str, str], list[_Group]]:
    """(name -> the parameter or buffer that is the same tensor, whose values are the same; groups of all the others).
    of_old: whether names may be those that modules of torch and transformers once had."""
    table = _conversions(model, of_old)
    if not table:
        prefix = getattr(model, "base_model_prefix", "")
        return {name: _prefixed(name, live, prefix) for name in names}, []
    from transformers import core_model_loading as core

    renamings = [entry for entry in table if isinstance(entry, core.WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, core.WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    same, groups = {}, {}
    for name in sorted(names, key=core.dot_natural_key):  # the order in which it loads, and so numbers, them
        target, pattern = core.rename_source_key(name, renamings, converters, model.base_model_prefix, live)
        if target not in live and name in live:
            target, pattern = name, None
        if pattern is None or target not in live:
            same[name] = target
            continue
        groups.setdefault(target, _Group(by_pattern[pattern], target, [])).sources.append((name, pattern))
    return same, list(groups.values())


def _conversions(model, of_old: bool) -> list[Any]:
    """transformers' table for this model."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []  # a version that renames and fuses nothing
    return get_model_conversion_mapping(model, add_legacy=of_old)


def _prefixed(name: str, live: Mapping[str, Any], prefix: str) -> str:
    """The name with or without the backbone's prefix, whichever there is."""
    names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((n for n in names if n in live), name)


def _parts(model, live, group: _Group, shapes: Mapping[str, Shape], pool: Pool) -> dict[str, torch.Tensor]:
    """The live tensors of a group's sources. Raises CheckpointError where a conversion is more than taking apart and
    putting together."""
    names = [name for name, _ in group.sources]
    # Nearly always the last dimension stays as it is: two columns then tell as much as all.
    for narrow in (True, False):
        maps = _map(model, group, shapes, live, narrow)
        if maps is None:
            continue
        bound = _several(live, group, maps, shapes) if len(maps) > 1 else _one(live, maps, names, shapes)
        if bound is not None and all(_holds(pool, name, bound[name]) for name in names):
            return bound
    found = f"tensor {names[0]!r} (one of {len(names)}) becomes {group.target!r} of {type(model).__name__}"
    expected = "a conversion that only stacks, joins, splits or turns tensors"
    raise CheckpointError(pool.base, found, expected, "it can be merged to disk, not searched")


def _map(model, group: _Group, shapes, live, narrow: bool) -> dict[str, torch.Tensor] | None:
    """parameter -> the number of the source's element at each place, int64, as the conversion leaves them; sources are
    numbered one after the other. None where it cannot be run on numbers of this width."""
    marks, start = [], 0
    for name, _ in group.sources:
        shape = _narrowed(shapes[name], narrow)
        count = torch.Size(shape).numel()
        marks.append(torch.arange(start, start + count).reshape(shape))
        start += count
    converter = copy.deepcopy(group.converter)
    for (name, pattern), mark in zip(group.sources, marks):
        converter.add_tensor(group.target, name, pattern, mark)
    try:
        made = converter.convert(group.target, model=model, config=model.config)
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        return None
    maps = {}
    for target, value in made.items():
        value = value[0] if isinstance(value, list) else value
        if target not in live or tuple(value.shape) != _narrowed(live[target].shape, narrow):
            return None
        maps[target] = value.contiguous()
    whole = torch.cat([value.reshape(-1) for value in maps.values()]).sort().values
    return maps if torch.equal(whole, torch.arange(start)) else None  # each element once, as it was


def _narrowed(shape: Iterable[int], narrow: bool) -> Shape:
    *rest, last = shape
    return (*rest, min(last, 2)) if narrow and rest else (*rest, last)


def _one(live, maps: dict[str, torch.Tensor], names: list[str], shapes) -> dict[str, torch.Tensor] | None:
    """Views of one parameter for sources that it is made of; None where a source is no regular part of it."""
    ((target, numbers),) = maps.items()
    parameter = live[target].data
    place = torch.empty(numbers.numel(), dtype=torch.int64)
    place[numbers.reshape(-1)] = torch.arange(numbers.numel())
    bound, start = {}, 0
    narrow = tuple(numbers.shape) != tuple(parameter.shape)
    for name in names:
        shape = _narrowed(shapes[name], narrow)
        count = torch.Size(shape).numel()
        own = place[start : start + count].reshape(shape)
        start += count
        view = _view(own, shapes[name], numbers.shape, parameter)
        if view is None:
            return None
        bound[name] = view
    return bound


def _several(live, group: _Group, maps: dict[str, torch.Tensor], shapes) -> dict[str, torch.Tensor] | None:
    """One tensor for a source that several parameters are made of, which become views of it; None where a parameter
    is no regular part of it, or there are several sources."""
    if len(group.sources) != 1:
        return None
    ((name, _),) = group.sources
    first = live[next(iter(maps))]
    whole = torch.empty(shapes[name], dtype=first.dtype, device=first.device)
    views = {}
    for target, numbers in maps.items():
        narrow = _narrowed(shapes[name], tuple(numbers.shape) != tuple(live[target].shape))
        view = _view(numbers, tuple(live[target].shape), narrow, whole)
        if view is None or live[target].dtype != whole.dtype:
            return None
        views[target] = view
    for target, view in views.items():
        view.copy_(live[target])
        live[target].data = view
    return {name: whole}


def _view(places: torch.Tensor, shape: Shape, outer: Iterable[int], tensor: torch.Tensor) -> torch.Tensor | None:
    """The view of a tensor whose elements lie at these places: flat indices into `outer`, the tensor's shape or that
    with fewer columns. shape: the view's, of which `places` may likewise have fewer columns. None if there is none."""
    if not tensor.is_contiguous() or places.numel() == 0:
        return None
    outer = torch.Size(outer)
    index = torch.stack(torch.unravel_index(places, outer), -1)  # [..., the tensor's dimensions]
    strides = torch.tensor(tensor.stride())
    flat = (index * strides).sum(-1)
    origin, steps = int(flat.reshape(-1)[0]), []
    expected = torch.full((), origin)
    for dim, size in enumerate(places.shape):
        step = int(flat.select(dim, 1).reshape(-1)[0]) - origin if size > 1 else 0
        along = torch.arange(size) * step
        expected = expected + along.reshape([-1 if d == dim else 1 for d in range(places.dim())])
        steps.append(step)
    if not torch.equal(flat, expected.expand_as(flat)):
        return None
    # A dimension of one has no step; any will do, and this one keeps what is contiguous so.
    for dim in reversed(range(len(shape))):
        if places.shape[dim] == 1:
            steps[dim] = steps[dim + 1] * shape[dim + 1] if dim + 1 < len(shape) else 1
    last = origin + sum(step * (size - 1) for step, size in zip(steps, shape))
    if min(steps, default=1) < 0 or last >= tensor.numel():
        return None
    return tensor.as_strided(shape, steps, tensor.storage_offset() + origin)


def _other_words(pool: Pool, name: str) -> bool:
    """Whether a tensor has a row for each token, which are others here than in the base's file."""
    return pool.vocabulary is not None and by_token(name)


def _holds(pool: Pool, name: str, view: torch.Tensor) -> bool:
    """Whether a part of the live model has the base's values, by some of them: first, last and between."""
    stored = pool.stored(Ref(pool.base, name))
    count = stored.numel()
    at = torch.linspace(0, count - 1, min(count, _SAMPLES), dtype=torch.float64).long()
    index = torch.unravel_index(at, stored.shape)
    found = view[tuple(i.to(view.device) for i in index)].cpu()
    return torch.equal(found, stored[index].to(found.dtype))
