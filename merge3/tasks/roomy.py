"""Steps of the greedy decoder whose cache has room for all that will be written, after a prefix that lies once.

transformers' own cache joins old and new keys anew for every token, prefix and all, which for short answers to long
prompts takes longer than the model does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from merge3.tasks.decoder import Batch
from merge3.tasks.forward import last_logits
from merge3.tasks.shared_prefix import SharedPrefix

Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]  # keys and values of a prefix, [1, heads, tokens, width] each


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, written where they stay. room: tokens there is room for. start: those of a prefix,
    copied into every row."""

    def __init__(self, room: int, start: tuple[torch.Tensor, torch.Tensor] | None = None):
        super().__init__()
        self._room, self._start, self._used = room, start, 0
        self._whole: list[torch.Tensor] = []

    def update(self, key_states, value_states, *args, **kwargs):
        """See DynamicLayer."""
        if not self._whole:
            self._begin(key_states, value_states)
        end = self._used + key_states.shape[-2]
        for whole, new in zip(self._whole, (key_states, value_states)):
            whole[:, :, self._used : end] = new
        return self._show(end)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """See DynamicLayer."""
        kept = []
        for whole in self._whole:
            rows = whole.new_empty(len(indices), *whole.shape[1:])
            rows[:, :, : self._used] = whole[indices, :, : self._used]
            kept.append(rows)
        self._whole = kept
        self._show(self._used)

    def _begin(self, *states: torch.Tensor) -> None:
        self.dtype, self.device, self.is_initialized = states[0].dtype, states[0].device, True
        for which, new in enumerate(states):
            rows, heads, _, width = new.shape
            self._whole.append(new.new_empty(rows, heads, self._room, width))
            if self._start is not None:
                self._used = self._start[which].shape[-2]
                self._whole[which][:, :, : self._used] = self._start[which]

    def _show(self, used: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._used = used
        self.keys, self.values = (whole[:, :, :used] for whole in self._whole)
        return self.keys, self.values


def roomy_cache(config, room: int, start: Layers = ()) -> DynamicCache:
    """A cache for rows that begin with a prefix. Layers with a window of their own stay transformers'."""
    cache = DynamicCache() if start else DynamicCache(config=config)
    if start:
        cache.layers = [RoomyLayer(room, layer) for layer in start]
    else:
        cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class Once:
    """See decoder.Steps; left-padded prompts after a prefix that all rows read where it lies."""

    def __init__(self, model, batch: Batch, prefix: Layers):
        rows, width = batch.ids.shape
        room = width + max(request.max_tokens for _, request in batch.asked)
        self.model, self.ids, self.positions, self._used = model, batch.ids, batch.positions, 0
        self._prefix, self._cache = SharedPrefix(model, prefix), roomy_cache(model.config, room)
        dtype = prefix[0][0].dtype
        self._hidden = torch.finfo(dtype).min
        padding = batch.mask[:, batch.mask.shape[1] - width :] == 0
        # What each row's later tokens see of its own: all but the padding.
        self._seen = torch.zeros(rows, 1, 1, room, dtype=dtype, device=batch.ids.device)
        self._seen[:, 0, 0, :width].masked_fill_(padding, self._hidden)

    def logits(self) -> torch.Tensor:
        """See Steps."""
        inputs = {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": self._mask()}
        with self._prefix.before_rows():
            return last_logits(self.model, 1, **inputs, past_key_values=self._cache, use_cache=True)[:, -1]

    def append(self, tokens: torch.Tensor) -> None:
        """See Steps."""
        self._used += self.ids.shape[1]
        self.ids, self.positions = tokens[:, None], self.positions[:, -1:] + 1

    def keep(self, rows: torch.Tensor) -> None:
        """See Steps."""
        self._cache.batch_select_indices(rows)
        self._seen, self.positions = self._seen[rows], self.positions[rows]

    def _mask(self) -> torch.Tensor:
        """[rows, 1, tokens, own]"""
        width = self.ids.shape[1]
        if self._used:
            return self._seen[..., : self._used + width]
        later = torch.ones(width, width, dtype=torch.bool, device=self.ids.device).triu(1)
        mask = self._seen[..., :width].repeat(1, 1, width, 1).masked_fill_(later, self._hidden)
        # Padding sees itself alone: a row of nothing but masked scores would be NaN.
        return mask.masked_fill_(torch.eye(width, dtype=torch.bool, device=mask.device), 0.0)
