"""The last representation of items: what a live model's head is given where a loss asks it.

Of a text that is continued these are the states at each place where a token of the answer is predicted; of choices at
each place of each choice; of a classifier the one that its logits come from, pooled or picked as the model does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from merge3.errors import BadInput
from merge3.learn.distributions import Asked, batches, before_head, log_probabilities
from merge3.live.hooks import head_of
from merge3.tasks.forward import LogitsError
from merge3.tasks.items import place


@torch.no_grad()
def features(model, asked: Sequence[Asked], name: str, limit: int = 4096) -> list[torch.Tensor]:
    """Of each item: float32 [places, width], on the CPU. name: of the model, for messages. limit: padded tokens of a
    forward pass.

    Raises LogitsError where they are NaN or infinite, BadInput for a model without a head that the logits come from.
    """
    found: list[torch.Tensor] = []
    for batch in batches(range(len(asked)), asked, limit):
        own = [asked[at] for at in batch]
        given = _picked(model, own) if own[0].head is not None else _predicting(model, own)
        for one, states in zip(own, given):
            if not states.isfinite().all():
                at = f"{name}: {place(one.item)}"
                raise LogitsError(at, "representations that are NaN or infinite", "numbers")
            found.append(states.float().cpu())
    return found


def _predicting(model, asked: Sequence[Asked]) -> list[torch.Tensor]:
    """The rows of each item, one after the other."""
    states, _ = _at_head(model, lambda: log_probabilities(model, asked))
    places = [sum(max(1, len(answer)) for answer in one.answers) for one in asked]
    return list(states.flatten(0, -2).split(places))


def _picked(model, asked: Sequence[Asked]) -> list[torch.Tensor]:
    """One row of each item. Where a head is given every token the model itself picks one: the one whose logits it
    gives."""
    inputs = before_head(model, asked)
    logits = []
    states, given = _at_head(model, lambda: logits.append(model(**inputs).logits))
    if not logits[0].isfinite().all():
        return [torch.full((1, states.shape[-1]), torch.nan)] * len(asked)
    if states.dim() == 2:
        states, given = states[:, None], given[:, None]
    same = given.dim() == 3 and (given == logits[0][:, None]).all(-1)  # [items, tokens]
    if given.dim() != 3 or not same.any(-1).all():
        expected = "one whose logits are what its last linear layer gives"
        raise BadInput("surgery", f"a {type(model).__name__}, whose logits are something else", expected)
    at = same.int().argmax(-1)
    return list(states[torch.arange(len(asked), device=at.device), at][:, None])


def _at_head(model, forward) -> tuple[torch.Tensor, torch.Tensor]:
    """(what a forward gives to the head, what the head makes of it)"""
    seen = []
    # A forward hook is told the input after all others before the head have had it: the one that picks places too.
    handle = head_of(model).register_forward_hook(lambda head, given, out: seen.append((given[0], out)))
    try:
        forward()
    finally:
        handle.remove()
    if len(seen) != 1:
        raise BadInput("surgery", f"a {type(model).__name__}, which asks its head {len(seen)} times", "once a forward")
    return seen[0]
