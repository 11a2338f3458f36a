"""Losses, a row each: what of an item is asked, and what the answer costs.

`ask` says which distributions an item is learned from; `cost` makes a number of them, the mean over their places.
SuperMerge (2412.10416): cross-entropy with the right answers. AdaMerging (2310.02575, equation 5): Shannon entropy.
Expert Merging (2509.25712): the divergence from what the task's own expert says; here of its outputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from merge3.errors import ItemsError
from merge3.learn.distributions import Asked, Tokens, of_answer, of_choices, of_labels, of_next
from merge3.tasks.items import Item, place
from merge3.tasks.kinds import KINDS
from merge3.tasks.prompts import Reader
from merge3.tasks.requests import Choices, Image, Start, Text

Target = torch.Tensor | None


@dataclass(frozen=True)
class Loss:
    """ask: (item, its request, the reader, what the expert wrote) -> what is asked. target: (item, request, reader) ->
    int64 [places], of losses with labels. cost: (log-probabilities, target) -> a scalar. expert: whether targets are
    the distributions of the task's own expert, and its writing is asked where a text is continued."""

    ask: Callable[[Item, Any, Reader, Tokens | None], Asked]
    cost: Callable[[torch.Tensor, Target], torch.Tensor]
    target: Callable[[Item, Any, Reader], torch.Tensor] | None = None
    expert: bool = False


def _labelled(item: Item, request: Any, reader: Reader, written: Tokens | None) -> Asked:
    right = _right(item, request, reader)
    return of_answer(item, request, right) if isinstance(right, tuple) else of_labels(item, request)


def _labels(item: Item, request: Any, reader: Reader) -> torch.Tensor:
    right = _right(item, request, reader)
    return torch.tensor(right if isinstance(right, tuple) else [right])


def _right(item: Item, request: Any, reader: Reader) -> Tokens | int:
    _check_label(item)
    return KINDS[item.kind].target(item, request, reader)


def _check_label(item: Item) -> None:
    if KINDS[item.kind].target is None:
        raise ItemsError(place(item), f"kind {item.kind!r}, which has no label to learn", _named())


def check_labels(loss: Loss, items: Iterable[Item]) -> None:
    """Raises ItemsError for the first item without a label, of a loss that learns them."""
    for item in items if loss.target is not None else ():
        _check_label(item)


def _unlabelled(item: Item, request: Any, reader: Reader, written: Tokens | None) -> Asked:
    """Over choices or labels; of a text over each token that an expert wrote, or over the next one."""
    match request:
        case Choices() if len(request.choices) > 1 and not request.margins:  # these are no rivals of one another
            return of_choices(item, request)
        case Start():
            return of_answer(item, request, written) if written else of_next(item, request)
        case Text() | Image():
            return of_labels(item, request)
    raise ItemsError(place(item), f"kind {item.kind!r}, which gives no distribution to learn from", _named())


def _named() -> str:
    return "an item of kind " + " or ".join(name for name, kind in KINDS.items() if kind.target is not None)


def cross_entropy(log_p: torch.Tensor, target: Target) -> torch.Tensor:
    """Mean over places of −log p of the right one."""
    return -log_p.gather(-1, target[:, None]).mean()


def entropy(log_p: torch.Tensor, target: Target) -> torch.Tensor:
    """Mean over places of −Σ p log p, where what a model excludes (−inf) adds nothing."""
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1).mean()


def divergence(log_p: torch.Tensor, target: Target) -> torch.Tensor:
    """Mean over places of KL(expert ‖ merge) = Σ p_e (log p_e − log p). target: the expert's log-probabilities."""
    own = target.exp()
    return (own * (target - log_p).masked_fill(own == 0, 0.0)).sum(-1).mean()


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(_labelled, cross_entropy, target=_labels),
    "entropy": Loss(_unlabelled, entropy),
    "expert_kl": Loss(_unlabelled, divergence, expert=True),
}
