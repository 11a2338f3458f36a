"""A gene's values as a recipe's setting, and back, exact both ways.

Filter sets are {filter, value} conditions and count inside layers; a tensor outside the stack has a condition of its
own name, with the last set's value. A value without any condition stands alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from merge3.parameters import Setting


def by_name(layers: np.ndarray, outside: Mapping[str, float], filters: Sequence[str]) -> Setting:
    """The setting of one run of layers. layers: values [filter sets]; outside: tensor -> value."""
    conditions = [{"filter": tensor, "value": value} for tensor, value in outside.items()]
    return _unconditional(conditions + _filtered(layers.tolist(), filters))


def by_layer(values: np.ndarray, filters: Sequence[str]) -> Setting:
    """The setting of all layers: numbers, or lists that mergekit interpolates. values: [groups, filter sets]."""
    if len(values) == 1:
        return _unconditional(_filtered(values[0].tolist(), filters))
    return _unconditional(_filtered(values.T.tolist(), filters))


def read(setting: Setting, group: int, sets: int, tensor: str | None = None) -> np.ndarray:
    """The values [filter sets] of a group of layers, or of a tensor outside the stack."""
    if not isinstance(setting, (list, tuple)):
        return np.full(sets, setting)
    if not isinstance(setting[0], dict):  # smooth: one value per group
        return np.full(sets, setting[group])
    if tensor is not None:
        return np.full(sets, next(c["value"] for c in setting if c.get("filter") == tensor))
    return np.concatenate([read(condition["value"], group, 1) for condition in setting[-sets:]])


def _filtered(values: list, filters: Sequence[str]) -> list[dict]:
    """One condition per filter set, the last for all other tensors."""
    named = [{"filter": f, "value": value} for f, value in zip(filters, values)]
    return [*named, {"value": values[-1]}]


def _unconditional(conditions: list[dict]) -> Setting:
    """What holds for every tensor needs no condition."""
    return conditions[0]["value"] if len(conditions) == 1 else conditions
