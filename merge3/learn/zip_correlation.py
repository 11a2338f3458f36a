"""What two models' units do on the same inputs, as correlations: sums and products in float64, batch after batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from merge3.errors import BadInput, ItemsError
from merge3.learn.zip_maps import Map, Point
from merge3.tasks.forward import LogitsError, without_cache

SMALLEST = 1e-7  # product of two deviations below which a correlation is made smaller, as in the authors' code


@dataclass(frozen=True)
class Batch:
    """Of one forward pass. mask: int64 [rows, tokens], 0 where a row is padded; None of images."""

    inputs: Mapping[str, torch.Tensor]
    mask: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


class Moments:
    """Of the 2n units of two models at one point: count, sums [2n] and products [2n, 2n], in float64."""

    def __init__(self):
        self.count, self.sums, self.products = 0, 0.0, 0.0

    def add(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """States of both, [places, n], at the same places of the same inputs."""
        states = torch.cat([first, second], dim=1).double()
        self.count += len(states)
        self.sums = self.sums + states.sum(0)
        self.products = self.products + states.T @ states

    def correlation(self) -> np.ndarray:
        """Float64 [2n, 2n]. A unit that never changes has 0, but 1 with such a unit of the other model: the two do the
        same, and are better one than each in the place of a unit that does something. (The authors' code has 0.)"""
        mean = self.sums / self.count
        covariance = self.products / self.count - mean[:, None] * mean[None]
        variance = covariance.diagonal().clamp(min=0)
        deviation = variance.sqrt()
        found = covariance / (deviation[:, None] * deviation[None]).clamp(min=SMALLEST)
        still = variance <= 1e-12 * mean * mean  # rounding alone
        count = len(mean) // 2
        both = still[:count, None] & still[None, count:]
        found[still], found[:, still] = 0.0, 0.0
        found[:count, count:][both], found[count:, :count][both.T] = 1.0, 1.0
        return found.cpu().numpy()


@torch.no_grad()
def correlations(
    models: Sequence[torch.nn.Module],
    found: Map,
    batches: Sequence[Batch],
    depth: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Space -> float64 [2n, 2n]: of what is seen at several points, such as a residual stream after every layer, the
    mean of their correlations. depth: points of this layer and later ones are left out.

    Raises LogitsError where a model's states are NaN or infinite, ItemsError for inputs that it cannot take.
    """
    there = set(dict(models[0].named_modules()))
    points = {point: Moments() for seen in found.seen.values() for point in seen if point.module in there}
    points = {point: moments for point, moments in points.items() if point.layer < depth}
    for done, batch in enumerate(batches, 1):
        states = []
        for at, model in enumerate(models):
            with _watched(model, points) as seen:
                forward(model, batch)
            states.append({point: _places(value, batch.mask) for point, value in seen.items()})
            for point, value in states[-1].items():
                if not value.isfinite().all():
                    raise LogitsError(f"model {at + 1}: {point.module}", "states that are NaN or infinite", "numbers")
        for point, moments in points.items():
            moments.add(states[0][point], states[1][point])
        progress(done, len(batches))
    result = {}
    for space, seen in found.seen.items():
        own = [points[point].correlation() for point in seen if point in points]
        if own:
            result[space] = np.mean(own, axis=0)
    return result


def forward(model: torch.nn.Module, batch: Batch):
    """What a model makes of a batch. Raises ItemsError with transformers' own reason where it cannot take it."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    try:
        return model(**inputs, **without_cache(model))
    except (ValueError, RuntimeError, IndexError) as error:
        if isinstance(error, (torch.OutOfMemoryError, BadInput)):
            raise
        reason = str(error).strip().split("\n")[0][:200]
        raise ItemsError("items", f"a {type(model).__name__} cannot take them ({reason})") from None


@torch.no_grad()
def renew_statistics(model: torch.nn.Module, batches: Sequence[Batch], names: Iterable[str]) -> None:
    """Give these modules, batch norms, the mean and variance that their inputs have, each batch counted alike."""
    norms = [model.get_submodule(name) for name in names]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
        norm.train()
    try:
        for batch in batches:
            forward(model, batch)
    finally:
        for norm, momentum in zip(norms, before):
            norm.momentum = momentum
            norm.eval()


@contextmanager
def _watched(model: torch.nn.Module, points: Iterable[Point]):
    seen: dict[Point, torch.Tensor] = {}

    def keep(point: Point):
        def hook(module, arguments, out):
            found = arguments[0] if point.given else out
            seen[point] = found[0] if isinstance(found, tuple) else found

        return hook

    handles = [model.get_submodule(point.module).register_forward_hook(keep(point)) for point in points]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _places(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[places, n] of what a module gave: [rows, n, height, width] of a convolution, [rows, tokens, n], [rows, n]."""
    if states.dim() == 4:
        return states.movedim(1, -1).flatten(0, -2)
    if states.dim() == 3 and mask is not None and states.shape[:2] == mask.shape:
        return states[mask.to(states.device).bool()]
    return states.flatten(0, -2)
