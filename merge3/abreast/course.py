"""The course of a forward through a model: which weights it uses before the stack of layers, in each, and after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from merge3.errors import Unavailable
from merge3.tasks.requests import Pass, one_by_one

_BEFORE, _WITHIN, _AFTER = range(3)


class Unfit(Unavailable):
    """A model that is not one stack of layers, each gone through once, with all other weights before or after it."""


@dataclass(frozen=True)
class Course:
    """layers: in their order. before, after: modules outside the stack that have weights."""

    model: str
    layers: tuple[torch.nn.Module, ...]
    before: tuple[torch.nn.Module, ...]
    after: tuple[torch.nn.Module, ...]

    def __str__(self) -> str:
        return f"{len(self.layers)} layers of a {self.model}"

    def stages(self) -> list[list[torch.Tensor]]:
        """Parameters and buffers that are used together, in order. They may be in the first and in the last of them."""
        inside = [[*layer.parameters(), *layer.buffers()] for layer in self.layers]
        before, after = ([tensor for one in modules for tensor in _own(one)] for modules in (self.before, self.after))
        return [before, *inside, after]

    def check_whole(self, written: Iterable[torch.Tensor], used: Iterable[torch.Tensor]) -> None:
        """Raises Unfit where tensors that recipes write are not all of what the model uses there."""
        if sum(tensor.numel() for tensor in written) < max(tensor.numel() for tensor in used):
            raise Unfit(self.model, "a parameter that is merged in part", "whole ones")


def course_of(
    model: torch.nn.Module, stack: Sequence[torch.nn.Module], weights: set[int], passes: Sequence[Pass]
) -> Course:
    """Found by these forwards of the model as it is. weights: storages of what recipes write; see storage_of. Raises
    Unfit."""
    layers, name = tuple(stack), type(model).__name__
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = [m for m in model.modules() if id(m) not in inside and not weights.isdisjoint(map(storage_of, _own(m)))]
    gone: list[tuple[int, bool]] = []  # (a layer, whether it is left)
    used: dict[int, set[int]] = {id(module): set() for module in outside}

    def phase() -> int:
        if not gone:
            return _BEFORE
        return _AFTER if gone[-1] == (len(layers) - 1, True) else _WITHIN

    handles = []
    for at, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(lambda *_, at=at: gone.append((at, False))))
        handles.append(layer.register_forward_hook(lambda *_, at=at: gone.append((at, True))))
    for module in outside:
        own, called = used[id(module)], []
        enter = lambda *_, called=called: called.append(phase())
        # What is around the stack has its weights at hand in every layer.
        leave = lambda *_, own=own, called=called: own.add(now if (now := phase()) == called.pop() else _WITHIN)
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with torch.inference_mode():
            for single in passes:
                gone.clear()
                list(one_by_one([single]))
                if gone != [(at, left) for at in range(len(layers)) for left in (False, True)]:
                    raise Unfit(name, "layers that are not gone through once, in their order", "a stack of layers")
    finally:
        for handle in handles:
            handle.remove()
    if any(_WITHIN in phases or not phases for phases in used.values()):
        raise Unfit(name, "weights used beside the layers", "a stack of layers, and weights before and after it")
    before = tuple(module for module in outside if _BEFORE in used[id(module)])
    return Course(name, layers, before, tuple(module for module in outside if _AFTER in used[id(module)]))


def storage_of(tensor: torch.Tensor) -> int:
    """What tensors have in common that are views of one another."""
    return tensor.untyped_storage().data_ptr()


def _own(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers of a module that are not a part's of it."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
