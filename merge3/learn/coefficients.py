"""What is learned: raw numbers, float32, and the weights of task vectors that follow from them.

SuperMerge (2412.10416) bounds weights by tanh, AdaMerging (2310.02575, equation 6) clamps them to [0, 1]. Both learn
one weight for every expert and tensor, which their papers call layer-wise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from merge3.checkpoint.layout import Layout
from merge3.errors import RecipeError


class Bound(NamedTuple):
    """weights(raw): what is merged with; raw(weight): where such a weight starts; low, high: what weights there are."""

    weights: Callable[[torch.Tensor], torch.Tensor]
    raw: Callable[[float], float]
    low: float
    high: float
    open: bool = False  # whether low and high themselves are out of reach


_LARGEST = torch.finfo(torch.float32).max
BOUNDS: dict[str, Bound] = {
    "tanh": Bound(torch.tanh, math.atanh, -1.0, 1.0, open=True),
    "clamp": Bound(lambda raw: raw.clamp(0.0, 1.0), float, 0.0, 1.0),
    "none": Bound(lambda raw: raw, float, -_LARGEST, _LARGEST),
}


def _by_tensor(names: Sequence[str], layout: Layout) -> list[str]:
    return list(names)


def _by_layer(names: Sequence[str], layout: Layout) -> list[str]:
    places = []
    for name in names:
        layer = layout.layer_of(name)
        outside = "before" if name in layout.pre else "after"
        places.append(outside if layer is None else f"layer {layer}")
    return places


def _by_task(names: Sequence[str], layout: Layout) -> list[str]:
    return ["all"] * len(names)


# What has a weight of its own: tensor names, layout -> the group of each tensor. `task`: every expert has one weight.
LEVELS: dict[str, Callable[[Sequence[str], Layout], list[str]]] = {
    "tensor": _by_tensor,
    "layer": _by_layer,
    "task": _by_task,
}


class Coefficients:
    """raw: what the optimizer steps on, float32 [experts, groups]. names: of the tensors, in order; groups: names."""

    def __init__(self, experts: int, names: Sequence[str], layout: Layout, level: str, bound: str, start: float):
        self.bound = BOUNDS[bound]
        check_start(bound, start, "fit: start")
        self.names = tuple(names)
        places = LEVELS[level](names, layout)
        self.groups = tuple(dict.fromkeys(places))
        member = {place: i for i, place in enumerate(self.groups)}
        # A product with zeros and ones adds a group's gradients in one order, whatever the device.
        self._members = torch.zeros(len(self.groups), len(names), dtype=torch.float64)
        for at, place in enumerate(places):
            self._members[member[place], at] = 1.0
        self.raw = torch.nn.Parameter(torch.full((experts, len(self.groups)), float(self.bound.raw(start))))

    def weights(self) -> torch.Tensor:
        """Of every expert for every tensor: float32 [experts, tensors], differentiable in `raw`."""
        # Float32 numbers times one, and zeros: the sum is exact.
        return (self.bound.weights(self.raw).double() @ self._members).float()


def check_start(bound: str, start: float, where: str) -> None:
    """Raises RecipeError where no such weight can be reached."""
    limits = BOUNDS[bound]
    inside = limits.low < start < limits.high if limits.open else limits.low <= start <= limits.high
    if not inside:
        bracket = "strictly between" if limits.open else "from"
        raise RecipeError(where, f"found {start:g}", f"{bracket} {limits.low:g} and {limits.high:g}, bound {bound!r}")
