"""How this model writes: which Steps its prompts take, in which batches, with which of their beginning shared."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from merge3.tasks import recurrent, seq2seq
from merge3.tasks.decoder import Continuations, Padded, Prepared, left_padded
from merge3.tasks.forward import right_padded
from merge3.tasks.requests import Start, batches, share_prefix
from merge3.tasks.state import state


def continuations(
    model, requests: Sequence[Start], tokenizer, end: frozenset[int], device, batch_tokens: int, pad: int = 0
) -> Continuations:
    """The Question that continues these prompts, whatever kind of model this is."""
    if seq2seq.is_pair(model):
        prepared = []
        for asked in batches(requests, _width, batch_tokens):
            inputs = right_padded([request.tokens for _, request in asked], pad, device)
            prepared.append(Prepared(asked, lambda model, prefix, inputs=inputs: seq2seq.Steps(model, inputs)))
        return Continuations(prepared, tokenizer, end)
    known = state(model)
    if not known.keys:
        prepared = []
        for asked in recurrent.even_batches(requests, _width, batch_tokens):
            ids = torch.tensor([request.tokens for _, request in asked], device=device)
            prepared.append(Prepared(asked, lambda model, prefix, ids=ids: recurrent.Steps(model, ids)))
        return Continuations(prepared, tokenizer, end)
    prefix, rest = share_prefix(requests)
    if not known.shares(len(prefix) + 1):
        prefix, rest = (), list(requests)
    prepared = []
    for asked in batches(rest, _width, batch_tokens):
        batch = left_padded(asked, len(prefix), device, pad)
        prepared.append(Prepared(asked, lambda model, kept, batch=batch: Padded(model, batch, kept)))
    return Continuations(prepared, tokenizer, end, prefix, device)


def _width(request: Start) -> int:
    return len(request.tokens) + request.max_tokens
