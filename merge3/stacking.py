"""What becomes of a model's settings where its layers are put elsewhere: each keeps those of the layer it was, or the
merge is refused.

Many types have layers of several kinds, such as attention over a window and over everything. A config.json lists them,
or says a period, or leaves all of it to its type's rule: transformers then makes the list of the layers' numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from merge3.checkpoint.architecture import layer_kinds, layer_lists
from merge3.checkpoint.depth import depth_keys, per_layer_lists, repeat_types, stack_section, unknown_lists
from merge3.errors import CheckpointError, RecipeError
from merge3.pool import Pool

Origins = Sequence[tuple[str, int]]  # of every output layer, the model and its layer that it is laid out after


def in_place(model: str, pool: Pool) -> tuple[tuple[str, int], ...]:
    """The layers of an endpoint as they are."""
    return tuple((model, layer) for layer in range(pool.layouts[model].layers))


def stacked(lead: str, origins: Origins, pool: Pool) -> dict[str, Any]:
    """The lead's config.json with these layers. One that says all of it as it is stays as it is.

    Raises CheckpointError where it does not say how many layers are stored, or lacks what one of them needs.
    """
    config = json.loads(json.dumps(pool.endpoints[lead].config))
    if tuple(origins) == in_place(lead, pool):
        return config
    stack = pool.layouts[lead]
    inner = stack_section(config, stack.prefix)
    keys = depth_keys(inner, stack.prefix)
    for key in keys:
        if inner[key] != stack.layers:  # it counts something else, such as layers without those that draft
            found = f"config.json: {key} is {inner[key]}, and {stack.layers} layers are stored"
            raise CheckpointError(lead, found, "as many, where layers are taken with `slices`")
        inner[key] = len(origins)
    if not keys and len(origins) != stack.layers:
        found = f"config.json says by no key that is known how many layers it has; there would be {len(origins)}"
        raise CheckpointError(lead, found, f"{stack.layers}, as it has, or num_hidden_layers in config.json")
    _follow(config, inner, lead, origins, pool)
    return config


def _follow(config: dict[str, Any], inner: dict[str, Any], lead: str, origins: Origins, pool: Pool) -> None:
    """Settings with one entry for each layer: those that config.json has, and those that it leaves to its type's rule,
    where the rule would give these layers others."""
    prefix = pool.layouts[lead].prefix
    if layer_lists(pool.endpoints[lead].config, prefix) is None:
        for key in unknown_lists(inner, pool.layouts[lead].layers):
            found = f"config.json: {key} may have an entry for each layer, in a type that transformers does not know"
            raise CheckpointError(lead, found, "layers in place", "it is not known what to write there")
    lists = {model: _lists(pool.endpoints[model].config, pool.layouts[model].prefix) for model, _ in origins}
    left: dict[str, list] = {}
    for key in dict.fromkeys(key for found in lists.values() for key in found):
        stated = isinstance(inner.get(key), list)
        own = [(model, layer, lists[model].get(key, ())) for model, layer in origins]
        lacking = next(((model, layer) for model, layer, values in own if layer >= len(values)), None)
        if lacking is None:
            (inner if stated else left)[key] = [values[layer] for _, layer, values in own]
        elif stated:
            found = f"config.json: {key} has no entry for layer {lacking[1]}"
            raise CheckpointError(lacking[0], found, "one entry per layer")
    repeat_types(inner)
    made = _lists(config, prefix) if left else {}
    inner.update({key: values for key, values in left.items() if made.get(key) != values})
    repeat_types(inner)


def _lists(config: Mapping[str, Any], prefix: str) -> dict[str, list]:
    """As config.json has them, and as transformers makes those that it has not."""
    return (layer_lists(config, prefix) or {}) | per_layer_lists(stack_section(config, prefix))


def check_kinds(lead: str, config: Mapping[str, Any], origins: Origins, pool: Pool, where: str) -> None:
    """Refuse an output whose layers would compute otherwise than where they were taken, by a rule that no config.json
    can say: attention scaled by a layer's number, a layer that takes keys from another one. Raises CheckpointError.

    config: the output's. What models differ in everywhere is another matter, of which they are warned about.
    """
    if tuple(origins) == in_place(lead, pool):
        return
    stack = pool.layouts[lead]
    for name in pool.endpoints[lead].tensors if not _numbered(origins, stack.layers) else ():
        if "per_layer" in name and stack.layer_of(name) is None:
            found = f"tensor {name!r} of {lead} has a part for each layer, by its number"
            raise CheckpointError(where, found, "layers in place")
    made = layer_kinds(config, stack.prefix)
    if made is None:
        return
    theirs = {}
    for model in dict.fromkeys(model for model, _ in origins):
        theirs[model] = _kinds_of(model, lead, pool)
    for number, (model, layer) in enumerate(origins):
        if layer >= len(theirs[model]) or number >= len(made):
            continue
        now, was = made[number], theirs[model][layer]
        for key in sorted({*now, *was}):
            if now.get(key) != was.get(key) and _varies(key, made, theirs[model]):
                found = f"layer {number} of the output, which is {layer} of {model}, would have {key} {now.get(key)!r}"
                expected = f"{was.get(key)!r} as there, which config.json cannot say of a layer elsewhere"
                raise CheckpointError(where, found, expected)


def check_live(origins: Origins, pool: Pool, where: str) -> None:
    """Refuse layers that the base's live model cannot hold, or would compute otherwise than a merge on disk: its own
    stay where they are, with the kinds that they have there. Raises RecipeError, or what the merge raises."""
    depth = pool.layouts[pool.base].layers
    if len(origins) != depth:
        raise RecipeError(where, f"{len(origins)} layers", f"{depth}, as in the base: a slot cannot grow")
    if tuple(origins) == in_place(pool.base, pool):
        return
    lists = {model: _lists(pool.endpoints[model].config, pool.layouts[model].prefix) for model, _ in origins}
    own = _lists(pool.base_checkpoint.config, pool.layouts[pool.base].prefix)
    for number, (model, layer) in enumerate(origins):
        for key, values in lists[model].items():
            mine = own.get(key, ())
            if layer < len(values) and number < len(mine) and values[layer] != mine[number]:
                found = f"layers of several kinds ({key}), others than the base's at their places"
                expected = "the base's kinds, which a live model keeps"
                raise RecipeError(where, found, expected, "it can be merged to disk")
    if not _numbered(origins, depth):  # else their numbers make them what the base's are
        check_kinds(pool.base, stacked(pool.base, origins, pool), origins, pool, where)


def _numbered(origins: Origins, depth: int) -> bool:
    """Whether every layer of a model of this depth has its number, whichever model it is of."""
    return [layer for _, layer in origins] == list(range(depth))


def _varies(key: str, *models: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a setting is not the same in all layers of one of these models, so that it is of layers at all."""
    return any(len({repr(kind.get(key)) for kind in kinds}) > 1 for kinds in models)


def _kinds_of(model: str, lead: str, pool: Pool) -> list[dict[str, Any]]:
    """Of an endpoint's own layers, where they stand in it, with the lead's settings; empty where nothing says them."""
    try:
        config = stacked(lead, in_place(model, pool), pool)
    except CheckpointError:  # it stores layers that its config.json does not count
        return []
    return layer_kinds(config, pool.layouts[lead].prefix) or []
