"""Attention of many rows to one prefix, whose keys and values lie in memory once instead of once for each row.

A softmax over the prefix and a row's own tokens is the mean of the softmax over each, weighted by what each adds up to:
out = a · out_prefix + (1 − a) · out_own, a = sigmoid(lse_prefix − lse_own), where lse is the log of the sum of a part's
exponentials. The part over the prefix is one product over all rows' queries at once. (Hydragen, Juravsky et al. 2024,
arXiv 2402.05099, equation 3.) On the CPU, where torch's attention tells its lse; elsewhere rows bring copies.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch

NAME = "merge3_shared_prefix"  # as transformers knows this attention
# What a layer's attention may be told beside what is used here, without which its result would be another one.
_ELSEWHERE = ("softcap", "s_aux", "position_bias", "sinks", "cu_seq_lens_q")


_READING: ContextVar[SharedPrefix] = ContextVar(NAME)


class Unsupported(RuntimeError):
    """A model whose attention is not softmax(QKᵀ · scale + mask) V over all its layers."""


class SharedPrefix:
    """Keys and values of a prefix, [1, heads, tokens, width] of every layer, before a model's rows.

    Forwards inside `before_rows()` see it before every row's own tokens, and take 4D masks of their own over the
    latter. It can be left and entered again between layers.
    """

    def __init__(self, model, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]):
        _register()
        self.layers, self.read = layers, set()  # read: by which layers it was
        attending = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "config")]
        self._configs = list({id(m.config): m.config for m in attending}.values())

    @contextmanager
    def before_rows(self) -> Iterator[None]:
        """See SharedPrefix."""
        before = [config._attn_implementation for config in self._configs]
        token = _READING.set(self)
        try:
            for config in self._configs:
                config._attn_implementation = NAME
            yield
        finally:
            _READING.reset(token)
            for config, name in zip(self._configs, before):
                config._attn_implementation = name

    def anew(self) -> SharedPrefix:
        """The same for another forward, whose layers are counted for themselves."""
        other = copy.copy(self)
        other.read = set()
        return other

    def check(self) -> None:
        """After a forward. Raises Unsupported where a layer has not read the prefix in it."""
        read, self.read = self.read, set()
        if len(read) != len(self.layers):
            raise Unsupported(f"{len(read)} of {len(self.layers)} layers read the prefix")


def possible(model) -> bool:
    """Whether it is worth a try: on the CPU, and not on a model that never asks transformers how to attend."""
    return next(model.parameters()).device.type == "cpu"


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **others):
    """See transformers' AttentionInterface. query: [rows, heads, width, d]; key, value: [rows, groups, own, d].

    attention_mask: float [rows, 1, width, own], or None where every token sees all of its row's own. Returns
    ([rows, width, heads, d], None).
    """
    odd = [name for name in _ELSEWHERE if others.get(name) is not None]
    if odd or query.shape[-1] != value.shape[-1]:
        raise Unsupported(f"attention with {odd[0] if odd else 'values of another width'}")
    now = _READING.get()
    now.read.add(module.layer_idx)
    keys, values = now.layers[module.layer_idx]
    rows, heads, width, d = query.shape
    groups = key.shape[1]
    each = heads // groups  # queries of one group have keys and values in common
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own = query.reshape(rows, groups, each * width, d)
    together = own.transpose(0, 1).reshape(1, groups, rows * each * width, d)
    far, far_lse = attend(together, keys, values, scale=scaling)
    far = far.view(groups, rows, each * width, d).transpose(0, 1)
    far_lse = far_lse.reshape(groups, rows, each * width).transpose(0, 1)
    mask = attention_mask
    if mask is not None and each > 1:
        mask = mask.repeat(1, 1, each, 1)
    near, near_lse = attend(own, key, value, attn_mask=mask, scale=scaling)
    share = torch.sigmoid(far_lse - near_lse)[..., None]
    whole = torch.lerp(near.float(), far.float(), share).to(query.dtype)
    return whole.view(rows, heads, width, d).transpose(1, 2).contiguous(), None


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if NAME not in AttentionInterface._global_mapping:
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
