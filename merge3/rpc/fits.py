"""Messages <-> fits: how far they are, their steps, and what one is known by."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from merge3.errors import BadInput, Busy
from merge3.learn.fit import Fit, FitStep, experts_of
from merge3.learn.fitting import State
from merge3.recipe import Recipe
from merge3.rpc import convert
from merge3.rpc import merge3_pb2 as pb

_FLOAT = np.dtype("<f4")


class Occupied(Busy):
    """A pool has a fit under way, and one at a time. It may be that of the stream before, which the daemon has not
    missed yet."""

    reason = "occupied"


def fit_to(fit: Fit) -> pb.FitRequest:
    """Without pool, items and state. Files of items are the driver's, and stay with it."""
    settings = {key: value for key, value in fit.recipe.fit.items() if key != "items"}
    return pb.FitRequest(recipe=convert.recipe_to(replace(fit.recipe, fit=settings)), experts=fit.experts)


def digest(request: pb.FitRequest) -> str:
    """What a fit is known by, however far it is."""
    whole = pb.FitRequest()
    whole.CopyFrom(request)
    whole.ClearField("state")
    return hashlib.sha256(whole.SerializeToString(deterministic=True)).hexdigest()


def state_to(state: State) -> pb.FitState:
    """All of it, bit for bit."""
    raw, first, second = (_bytes(tensor) for tensor in (state.raw, *state.moments))
    return pb.FitState(step=state.step, shape=state.raw.shape, raw=raw, exp_avg=first, exp_avg_sq=second)


def state_from(m: pb.FitState, fit: Fit, most: int, where: str = "state") -> State:
    """What `state_to` sent. most: numbers of each kind. Raises BadInput or Busy for what can be no state of this fit;
    whether it has so many groups is seen where its models are."""
    shape, experts, steps = tuple(m.shape), len(experts_of(fit.recipe)), fit.settings.steps
    if m.step > steps:
        raise BadInput(f"{where}: step", f"found {m.step}", f"at most {steps}, the fit's")
    if len(shape) != 2 or shape[0] != experts or shape[1] < 1:
        raise BadInput(f"{where}: shape", f"found {list(shape)[:4]}", f"[{experts} experts, groups]")
    count = math.prod(shape)
    if count > most:
        raise Busy(f"{where}: shape", f"{count} numbers", f"at most {most}")
    found = [_tensor(getattr(m, name), shape, f"{where}: {name}") for name in ("raw", "exp_avg", "exp_avg_sq")]
    if (found[2] < 0).any():
        raise BadInput(f"{where}: exp_avg_sq", "negative numbers", "means of squares")
    return State(m.step, found[0], (found[1], found[2]))


def step_to(step: FitStep) -> pb.FitStep:
    """With what it brings along."""
    return pb.FitStep(
        number=step.number,
        loss=step.loss,
        losses=step.losses,
        state=None if step.state is None else state_to(step.state),
        recipe=None if step.recipe is None else convert.recipe_to(step.recipe),
    )


def step_from(m: pb.FitStep, fit: Fit, tasks: Mapping[str, object]) -> FitStep:
    """What `step_to` sent, bit for bit. tasks: names, in the order that losses have."""
    losses = {task: m.losses[task] for task in tasks if task in m.losses}
    state = state_from(m.state, fit, most=1 << 31) if m.HasField("state") else None
    recipe: Recipe | None = convert.recipe_from(m.recipe, "fitted recipe") if m.HasField("recipe") else None
    return FitStep(m.number, m.loss, losses, state, recipe)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().numpy().astype(_FLOAT).tobytes()


def _tensor(data: bytes, shape: tuple[int, ...], where: str) -> torch.Tensor:
    if len(data) != math.prod(shape) * _FLOAT.itemsize:
        raise BadInput(where, f"{len(data)} bytes", f"{math.prod(shape) * _FLOAT.itemsize}, float32 {list(shape)}")
    values = np.frombuffer(data, _FLOAT).astype(np.float32).reshape(shape)
    if not np.isfinite(values).all():
        raise BadInput(where, "numbers that are NaN or infinite", "finite ones")
    return torch.from_numpy(values)
