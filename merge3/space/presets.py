"""What a gene's number means: the parameter's value, its bounds, and where a search starts. A preset is a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from merge3.methods.base import Gene, for_models


class Preset(NamedTuple):
    """decode(gene, values, negative weights allowed): the parameter's values. start(gene, models): of a search.
    encode: as decode, and back: what is decoded to the nearest values that can be.

    bounded: genes have bounds. layered: layers fall into groups. outside: so do the tensors before and after the
    stack. divisible: groups are of equal size. normalizes: sets `normalize` for methods that mergekit-evolve does.
    """

    decode: Callable[[Gene, np.ndarray, bool], np.ndarray]
    start: Callable[[Gene, int], float]
    encode: Callable[[Gene, np.ndarray, bool], np.ndarray]
    bounded: bool = True
    layered: bool = True
    outside: bool = True
    divisible: bool = False
    normalizes: bool = False


def _snapped(gene: Gene, values: np.ndarray, negative: bool) -> np.ndarray:
    """Multiples of 1 / steps, and never 0; negative weights are the bounds' affair."""
    if not gene.steps:
        return values
    return np.clip(np.round(values * gene.steps), 1, gene.steps) / gene.steps


def _start(gene: Gene, models: int) -> float:
    return for_models(gene.start, models)


def _as_it_is(gene: Gene, values: np.ndarray, negative: bool) -> np.ndarray:
    """Snapping finds the nearest by itself."""
    return values


def _decoded_by_evolve(gene: Gene, values: np.ndarray, negative: bool) -> np.ndarray:
    if gene.folded:
        return np.clip(np.abs(values), 1 / gene.steps, 1.0)  # mergekit has density 0 mean nothing at all
    if gene.weighs and not negative:
        return np.abs(values)
    return values


def _encoded_for_evolve(gene: Gene, values: np.ndarray, negative: bool) -> np.ndarray:
    """Of two genomes with one value, the one that is not folded. A negative weight would be decoded to its opposite: 0
    is nearer."""
    if gene.folded:
        return np.clip(values, 1 / gene.steps, 1.0)
    if gene.weighs and not negative:
        return np.maximum(values, 0.0)
    return values


def _start_of_evolve(gene: Gene, models: int) -> float:
    return 1.0 if gene.folded else for_models(gene.start, models)


PRESETS = {
    "layerwise": Preset(_snapped, _start, _as_it_is),
    "sakana6": Preset(_snapped, _start, _as_it_is, layered=False, outside=False),
    # As mergekit-evolve decodes, so that its users' genomes mean the same here.
    "evolve": Preset(
        _decoded_by_evolve,
        _start_of_evolve,
        _encoded_for_evolve,
        bounded=False,
        outside=False,
        divisible=True,
        normalizes=True,
    ),
}
