"""Room for what a backward pass remembers: measured once, planned before a fit begins.

Beside the pool and the live model a step needs the activations of one forward pass, one parameter's gradient at a time
(of small models all of them), and nothing else that grows: weights are merged in place, and gradients become numbers.
Where activations of a whole pass do not fit, layers forget theirs and compute them again in backward; where that is not
enough either, a pass takes fewer tokens, which changes no result but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from merge3.errors import ResourceError
from merge3.learn.distributions import Asked, log_probabilities
from merge3.learn.weighted import Weighted
from merge3.memory import available, shown_size

MARGIN = 1.3  # over what was measured: passes differ, and allocators waste


@dataclass(frozen=True)
class Room:
    """batch_tokens: padded tokens of a pass. again: whether layers compute their activations again in backward.
    activations, gradient: bytes that a pass, and the gradients that are there at once, take at most; free: bytes that
    there were."""

    batch_tokens: int
    again: bool
    activations: int
    gradient: int
    free: int

    @property
    def size(self) -> int:
        """Bytes beside the pool and the live model."""
        return self.activations + self.gradient

    def kept(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """While it lasts forward passes with gradients remember as little as was planned."""
        return recomputed(model) if self.again else nullcontext()

    def describe(self) -> str:
        """One line."""
        how = ", computed again in backward" if self.again else ""
        found = f"learning: activations {shown_size(self.activations)} of {self.batch_tokens:,} tokens a pass{how}"
        return f"{found}; gradients {shown_size(self.gradient)}; {shown_size(self.free)} free"


def make_room(weighted: Weighted, asked: Sequence[Asked], most: int) -> Room:
    """A plan within the pool's budget, which then leaves as much, or else within what is free. Raises ResourceError, or
    BadInput for a budget in which the live model and what is planned have no place."""
    pool = weighted.slot.pool
    pool.reserve(0)
    weighted.write(torch.zeros(weighted.gradient.shape))  # what is resident on a device is so from here on
    weighted.slot.use_head(None)
    memory = pool.memory
    free = available(pool.device) if memory.budget is None else memory.budget - memory.slot - memory.window
    room = plan_room(weighted, asked, most, free)
    pool.reserve(room.size)
    return room


def plan_room(weighted: Weighted, asked: Sequence[Asked], most: int, free: int) -> Room:
    """For passes of at most `most` padded tokens of these items; free: bytes beside the pool and the live model.

    Raises ResourceError where one item alone does not fit.
    """
    model = weighted.slot.model
    longest = max(asked, key=lambda one: one.rows * max(1, one.width))
    least = longest.rows * max(1, longest.width)
    gradient = weighted.gradient_bytes
    needed = max(least, min(most, _tokens(asked)))
    found = None
    for again in (False, True):
        with recomputed(model) if again else nullcontext():
            per_token = MARGIN * _remembered(weighted, longest) / least
        if again:  # one layer's at a time come back, beside what all were given
            per_token += found / max(1, len(_layers(model)))
        found = per_token
        fit = int((free - gradient) / per_token)
        if fit >= needed:
            return Room(needed, again, int(per_token * needed), gradient, free)
    if fit >= least:
        return Room(fit, True, int(per_token * fit), gradient, free)
    wanted = shown_size(int(per_token * least) + gradient)
    where = longest.item.id
    raise ResourceError(
        "fit",
        f"item {where!r} alone needs {wanted} beside the models, and {shown_size(max(0, free))} are free",
        "a larger --memory-budget, or shorter items",
    )


@contextmanager
def recomputed(model: torch.nn.Module) -> Iterator[None]:
    """While it lasts every layer of the model's stacks remembers what it was given alone, and computes the rest again
    when backward needs it: the same bits, one forward pass more."""
    layers = _layers(model)
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = _again(layer.forward)
        yield
    finally:
        for layer, own in zip(layers, before):
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def _again(forward):
    def run(*arguments, **named):
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **named)

    return run


def _layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of the stacks that are in no other stack."""
    found, within = [], set()
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and id(module) not in within and len(module) > 1:
            found += list(module)
            within.update(id(inner) for inner in module.modules())
    return found


def _remembered(weighted: Weighted, asked: Asked) -> int:
    """Bytes that autograd keeps of one item's forward pass, without the parameters themselves; of layers that compute
    again what they are given."""
    own = {parameter.untyped_storage().data_ptr() for parameter in weighted.slot.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> None:  # what autograd keeps would keep itself: there is no backward to free it
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.detach()

    def given(layer: torch.nn.Module, arguments: tuple, named: dict) -> None:
        for value in (*arguments, *named.values()):
            if torch.is_tensor(value):
                keep(value)

    handles = [layer.register_forward_pre_hook(given, with_kwargs=True) for layer in _layers(weighted.slot.model)]
    try:
        with weighted.gradients(), torch.autograd.graph.saved_tensors_hooks(keep, _never):
            (found,) = log_probabilities(weighted.slot.model, [asked])
            loss = 3 * found.numel() * found.element_size()  # the loss's own, and logits before it
    finally:
        for handle in handles:
            handle.remove()
    return loss + sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _never(packed: None) -> torch.Tensor:
    raise AssertionError("a pass that is measured has no backward")


def _tokens(asked: Sequence[Asked]) -> int:
    return sum(one.rows * max(1, one.width) for one in asked)
