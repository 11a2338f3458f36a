"""Adapters on the last representation of a live model: z' = z − U·ReLU(D·z), before its head (Surgery, 2402.02705).

The head is the module whose output is the logits. What it is given is changed place by place, so all else that stands
before a head (positions that are picked, a prefix that is shared, a cache) works with an adapter as without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from merge3.errors import BadInput


class Adapter(NamedTuple):
    """down: D, [rank, width]; up: U, [width, rank]; float32."""

    down: torch.Tensor
    up: torch.Tensor

    def changed(self, states: torch.Tensor) -> torch.Tensor:
        """z' of states z [.., width]; float32."""
        states = states.float()
        return states - (states @ self.down.T).relu() @ self.up.T

    def to(self, device: torch.device | str) -> Adapter:
        """The same there."""
        return Adapter(self.down.to(device), self.up.to(device))


def head_of(model: torch.nn.Module) -> torch.nn.Module:
    """What turns the last representation into logits: the output embeddings of a language model, the last linear layer
    outside the backbone of a classifier. Raises BadInput for a model without (encoders, a headless classifier)."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        return output
    backbone = getattr(model, "base_model", model)
    inside = {id(module) for module in backbone.modules()}
    found = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and id(m) not in inside]
    if not found:
        expected = "a language model or a classifier, whose last representation a head is given"
        raise BadInput("surgery", f"a {type(model).__name__} without a head", expected)
    return found[-1]


def width_of(model: torch.nn.Module) -> int:
    """How many numbers the head is given. Raises BadInput as `head_of`."""
    return head_of(model).weight.shape[-1]


@contextmanager
def adapted(model: torch.nn.Module, adapter: Adapter | None) -> Iterator[None]:
    """While it lasts the head is given what the adapter makes of the last representation; None: the model as it is.

    Computed in float32 and rounded to the model's dtype. Raises BadInput for an adapter of another width.

        with adapted(model, adapters.tasks["math"]):
            model.generate(**inputs)
    """
    if adapter is None:
        yield
        return
    head, width = head_of(model), width_of(model)
    if adapter.down.shape[-1] != width:
        expected = f"{width}, as the head of this {type(model).__name__} is given"
        raise BadInput("surgery", f"an adapter of width {adapter.down.shape[-1]}", expected, "adapters fit one merge")
    there = adapter.to(head.weight.device)

    def change(module, arguments):
        states, *others = arguments
        return (there.changed(states).to(states.dtype), *others)

    handle = head.register_forward_pre_hook(change)
    try:
        yield
    finally:
        handle.remove()
