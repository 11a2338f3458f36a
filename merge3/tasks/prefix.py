"""The tokens that all questions begin with, read once: their keys and values, as far as they have been read.

What follows a prefix needs of it, at every layer, that layer's keys and values and no more. So rows can be under way
while the prefix is, one layer behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from merge3.tasks.forward import takes_logits_to_keep


class Prefix(Sequence):
    """(keys, values) of each layer that has been read, [1, heads, tokens, width] each.

    prefix = Prefix(model, tokens, device)
    prefix.read()
    model(**inputs, past_key_values=prefix.before(rows), use_cache=True)
    """

    def __init__(self, model, tokens: tuple[int, ...], device: torch.device | str):
        from transformers import DynamicCache

        self.model, self.tokens, self.device = model, tokens, device
        self._cache = DynamicCache(config=model.config)

    def read(self) -> list:
        """Once per candidate: a forward of the prefix alone, which answers nothing."""
        ids = torch.tensor([self.tokens], device=self.device)
        keep = {"logits_to_keep": 1} if takes_logits_to_keep(self.model) else {}
        self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **keep)
        return []

    def before(self, rows: int):
        """A cache that has the prefix in every one of so many rows."""
        from transformers import DynamicCache

        cache = DynamicCache()
        cache.layer_class_to_replicate = None
        cache.layers = [_behind(self, layer, rows) for layer in range(len(self))]
        return cache

    def __len__(self) -> int:
        return len(self._cache.layers)

    def __getitem__(self, layer):
        if isinstance(layer, slice):
            return [self[at] for at in range(*layer.indices(len(self)))]
        if not self._cache.layers[layer].is_initialized:
            raise IndexError(f"layer {layer} of the prefix has not been read yet")
        return self._cache.layers[layer].keys, self._cache.layers[layer].values


def prefix_cache(model, prefix: tuple[int, ...], device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of a prefix, [1, heads, tokens, width] per layer; none of no prefix."""
    if not prefix:
        return []
    kept = Prefix(model, prefix, device)
    kept.read()
    return kept[:]


def _behind(prefix: Prefix, layer: int, rows: int):
    """A layer's cache that has the prefix in every row, and keeps nothing of what it is given: one forward reads it."""
    from transformers.cache_utils import DynamicLayer

    class Behind(DynamicLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            pairs = zip(prefix[layer], (key_states, value_states))
            return tuple(torch.cat([before.expand(rows, -1, -1, -1), own], -2) for before, own in pairs)

        def get_seq_length(self):
            return len(prefix.tokens)

    return Behind()
