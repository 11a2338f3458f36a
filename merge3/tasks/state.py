"""What a model keeps between tokens, which decides how its questions may share work."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

_MEMORIES = ("past_key_values", "cache_params")  # what transformers' models call what they keep
# Found once per live model: its architecture does not change.
_KNOWN: WeakKeyDictionary = WeakKeyDictionary()  # model -> State


@dataclass(frozen=True)
class State:
    """keys: whether what a model keeps is a key and a value of every token and nothing else, as attention has it; a
    state that each token changes cannot be shared by rows that go on differently, and padding goes into it.
    resumes: whether a forward goes on from what another one left. window: how many positions a layer looks back, itself
    included; None where all of them do without end. causal: whether tokens see none after them. placed: whether it is
    told the tokens' positions, so that others may stand between a beginning and what follows it."""

    keys: bool
    resumes: bool = True
    window: int | None = None
    causal: bool = True
    placed: bool = True

    def shares(self, positions: int) -> bool:
        """Whether rows can have so many positions at their beginning in common, computed once."""
        sees = self.window is None or positions <= self.window  # the last of them sees the first, in every layer
        return self.keys and self.causal and self.placed and sees


def state(model) -> State:
    """What this model keeps, by what a forward of two tokens leaves."""
    if model not in _KNOWN:
        found, sure = _found(model)
        if not sure:  # these weights cannot tell: the next ones are asked again
            return found
        _KNOWN[model] = found
    return _KNOWN[model]


def memory(output) -> tuple[str, Any]:
    """(the argument by which a forward takes what another one left, that); ("", None) where it leaves nothing that rows
    can be taken from."""
    for name in _MEMORIES:
        kept = output.get(name)
        if hasattr(kept, "reorder_cache"):
            return name, kept
    return "", None


@torch.inference_mode()
def _found(model) -> tuple[State, bool]:
    """(the state, whether the logits are numbers, which tell whether it is causal)"""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    ids = torch.tensor([[0, 0], [0, 1]], device=next(model.parameters()).device)
    parameters = inspect.signature(model.forward).parameters
    try:
        output = model(input_ids=ids, use_cache=True)
    except (TypeError, ValueError, RuntimeError):
        return State(keys=False, resumes=False), True  # takes no memory at all
    first = output.logits[:, 0].float()
    sure = bool(first.isfinite().all())
    causal = not sure or torch.allclose(first[0], first[1], rtol=1e-2, atol=1e-3)
    name, kept = memory(output)
    layers = getattr(kept, "layers", None) or ()
    keys = name == "past_key_values" and all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers)
    if not keys or not layers:
        return State(keys=False, resumes=bool(name), causal=causal), sure
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    if "local" in (getattr(model.config, "attention_layers", None) or ()):  # GPT-Neo's windows are in no cache
        windows.append(model.config.window_size)
    return State(True, True, min(windows, default=None), causal, "position_ids" in parameters), sure
