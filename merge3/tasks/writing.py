"""How this model writes: which Steps its prompts take, in which batches, with which of their beginning shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch

from merge3.tasks import recurrent, seq2seq
from merge3.tasks.decoder import Continuations, Once, Padded, left_padded
from merge3.tasks.forward import right_padded
from merge3.tasks.prefix import prefix_cache
from merge3.tasks.requests import Start, batches, share_prefix
from merge3.tasks.roomy import token_bytes
from merge3.tasks.shared_prefix import possible
from merge3.tasks.state import state

KEPT = (
    2 << 30
)  # bytes of keys and values that a batch on a GPU may keep; a fixed number, so that answers are the same bits
_ONCE: WeakKeyDictionary = WeakKeyDictionary()  # model -> whether prompts read a prefix where it lies


def continuations(
    model, requests: Sequence[Start], tokenizer, end: frozenset[int], device, batch_tokens: int, pad: int = 0
) -> Continuations:
    """The Question that continues these prompts, whatever kind of model this is."""
    if seq2seq.is_pair(model):
        begins = []
        for asked in batches(requests, _width, batch_tokens):
            inputs = right_padded([request.tokens for _, request in asked], pad, device)
            begins.append((asked, lambda model, prefix, inputs=inputs: seq2seq.Steps(model, inputs)))
        return Continuations(begins, tokenizer, end)
    known = state(model)
    if not known.keys:
        begins = []
        for asked in recurrent.even_batches(requests, _width, batch_tokens):
            ids = torch.tensor([request.tokens for _, request in asked], device=device)
            begins.append((asked, lambda model, prefix, ids=ids: recurrent.Steps(model, ids)))
        return Continuations(begins, tokenizer, end)
    prefix, rest = share_prefix(requests)
    if not known.shares(len(prefix) + 1):
        prefix, rest = (), list(requests)
    steps = Padded
    if prefix and known.shares(len(prefix) + max(map(_width, rest))):
        steps = Once if _reads_once(model, prefix, rest[:2], device, pad) else Padded
    begins, width = [], _width
    if prefix and steps is Padded and torch.device(device).type != "cpu":
        width = _with_copies(len(prefix), batch_tokens, token_bytes(model))
    for asked in batches(rest, width, batch_tokens):
        batch = left_padded(asked, len(prefix), device, pad)
        begins.append((asked, lambda model, kept, batch=batch: steps(model, batch, kept)))
    return Continuations(begins, tokenizer, end, prefix, device)


@torch.inference_mode()
def _reads_once(model, prefix: tuple[int, ...], requests: Sequence[Start], device, pad: int) -> bool:
    """Whether prompts give the same logits where they read the prefix as it lies (see shared_prefix.py) as after
    copies of it: tried on a few, a token further too. Found once per live model."""
    if model not in _ONCE:
        if not possible(model):
            return False
        batch = left_padded(list(enumerate(requests)), len(prefix), device, pad)
        kept = prefix_cache(model, prefix, device)
        close = {"atol": 1e-3 if kept[0][0].dtype == torch.float32 else 0.1}
        copied, once = Padded(model, batch, kept), Once(model, batch, kept)
        try:
            first, second = copied.logits(), once.logits()
            if not first.isfinite().all():  # these weights cannot tell: the next requests try again
                return False
            same = torch.allclose(first, second, **close)
            for steps in (copied, once):
                steps.append(first.argmax(-1))
            _ONCE[model] = same and torch.allclose(copied.logits(), once.logits(), **close)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
            _ONCE[model] = False
    return _ONCE[model]


def _width(request: Start) -> int:
    return len(request.tokens) + request.max_tokens


def _with_copies(prefix: int, batch_tokens: int, each: int) -> Callable[[Start], int]:
    """The width of a row that brings its copy of a prefix, so that a batch keeps at most KEPT bytes. each: bytes of
    keys and values of one token."""
    most = max(1, KEPT // max(1, each))
    return lambda request: max(_width(request), -(-(prefix + _width(request)) * batch_tokens // most))
