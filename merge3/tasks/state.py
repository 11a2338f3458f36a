"""What a model keeps between tokens, which decides how its questions may share work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

_MEMORIES = ("past_key_values", "cache_params")  # what transformers' models call what they keep
# Found once per live model: its architecture does not change.
_KNOWN: WeakKeyDictionary = WeakKeyDictionary()  # model -> State


@dataclass(frozen=True)
class State:
    """keys: whether it is a key and a value of every token and nothing else, as attention has it; a state that each
    token changes cannot be shared by rows that go on differently, and padding goes into it. window: how many positions
    a layer looks back, itself included; None where all of them do without end."""

    keys: bool
    window: int | None = None

    def sees(self, positions: int) -> bool:
        """Whether the last of so many positions still sees the first, in every layer."""
        return self.window is None or positions <= self.window


def state(model) -> State:
    """What this model keeps, by what a forward of one token leaves."""
    if model not in _KNOWN:
        _KNOWN[model] = _found(model)
    return _KNOWN[model]


def memory(output) -> tuple[str, Any]:
    """(the argument by which a forward takes what another one left, that); ("", None) where it leaves nothing."""
    for name in _MEMORIES:
        if (kept := output.get(name)) is not None:
            return name, kept
    return "", None


@torch.inference_mode()
def _found(model) -> State:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    device = next(model.parameters()).device
    try:
        name, kept = memory(model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=True))
    except (TypeError, ValueError, RuntimeError):
        return State(keys=False)  # takes no memory at all
    layers = getattr(kept, "layers", None)
    if name != "past_key_values" or not layers:
        return State(keys=False)
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return State(keys=False)
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return State(keys=True, window=min(windows, default=None))
