"""A cache of keys and values with room for all that will be written.

transformers' own joins old and new keys anew for every token, prefix and all, which for short answers to long prompts
takes longer than the model does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]  # keys and values of a prefix, [1, heads, tokens, width] each


STEP = 256  # tokens to write that there is room for at first: few answers are as long as they may be


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, written where they stay. room: tokens there can be at most. start: those of a
    prefix, copied into every row."""

    def __init__(self, room: int, start: tuple[torch.Tensor, torch.Tensor] | None = None):
        super().__init__()
        self._room, self._start = room, start
        self._used = 0 if start is None else start[0].shape[-2]
        self._whole: list[torch.Tensor] = []

    def update(self, key_states, value_states, *args, **kwargs):
        """See DynamicLayer."""
        if not self._whole:
            self._begin(key_states, value_states)
        end = self._used + key_states.shape[-2]
        if end > self._whole[0].shape[2]:
            self._move(slice(None), min(self._room, 2 * end))
        for whole, new in zip(self._whole, (key_states, value_states)):
            whole[:, :, self._used : end] = new
        return self._show(end)

    def get_seq_length(self) -> int:
        """See DynamicLayer; a prefix counts before anything is written."""
        return self._used

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """See DynamicLayer."""
        self._move(indices, self._whole[0].shape[2])
        self._show(self._used)

    def _move(self, rows: torch.Tensor | slice, room: int) -> None:
        for at, whole in enumerate(self._whole):
            kept = whole[rows, :, : self._used]
            self._whole[at] = whole.new_empty(*kept.shape[:2], room, kept.shape[3])
            self._whole[at][:, :, : self._used] = kept

    def _begin(self, *states: torch.Tensor) -> None:
        self.dtype, self.device, self.is_initialized = states[0].dtype, states[0].device, True
        for which, new in enumerate(states):
            rows, heads, tokens, width = new.shape
            room = min(self._room, self._used + tokens + STEP)
            self._whole.append(new.new_empty(rows, heads, room, width))
            if self._start is not None:
                self._whole[which][:, :, : self._used] = self._start[which]

    def _show(self, used: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._used = used
        self.keys, self.values = (whole[:, :, :used] for whole in self._whole)
        return self.keys, self.values


def token_bytes(model) -> int:
    """Bytes of the keys and values of one token, as a decoder's configuration has them; 0 where it does not say."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    layers, hidden = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not (heads and layers and hidden):
        return 0
    width = getattr(config, "head_dim", None) or hidden // heads
    return 2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * width * model.dtype.itemsize


def roomy_cache(config, room: int, start: Layers = ()) -> DynamicCache:
    """A cache for rows that begin with a prefix. Layers with a window of their own stay transformers'."""
    cache = DynamicCache() if start else DynamicCache(config=config)
    if start:
        cache.layers = [RoomyLayer(room, layer) for layer in start]
    else:
        cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
