"""What every way of asking shares: logits where they are needed, what is no answer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from merge3.errors import ItemsError


class LogitsError(ItemsError):
    """A model whose logits are NaN or infinite where an item is scored: no answer, right or wrong. Of an encoder it is
    the states of a text, pooled: NaN, infinite, or all zero.

    That is: NaN or +inf among the logits of a scored position, or none above -inf, or a log-likelihood that is NaN.
    Some logits of -inf are legal: models exclude words so.
    """

    reason = "logits"


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The last dimension's argmax, int64 [...] of logits [..., n]; -1 where they are NaN, have +inf or nothing above
    -inf. An argmax finds NaN and +inf before anything else, so its value tells of the whole row."""
    best = logits.argmax(-1)
    return torch.where(logits.gather(-1, best[..., None])[..., 0].isfinite(), best, -1)


def ahead(logits: torch.Tensor, at: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How far tokens are ahead of the likeliest other one, [n]: the logarithm of the odds between the two, 0 or more
    where greedy decoding writes the token and 0 or less where it does not. logits: [places, vocabulary]; at: which
    place predicts each token, tokens: their ids, int64 [n]."""
    best, first = logits.topk(2)
    rivals = torch.where(first[at, 0] == tokens, best[at, 1], best[at, 0])
    return logits[at, tokens] - rivals


def takes_logits_to_keep(model) -> bool:
    """Whether forward computes the head only where asked. It is most of a small model's work."""
    return _takes(type(model), "logits_to_keep")


def without_cache(model) -> dict[str, bool]:
    """What tells a forward to keep nothing for tokens to come, of a model that would."""
    return {"use_cache": False} if _takes(type(model), "use_cache") else {}


@functools.cache  # asked at every forward, and inspecting takes as long as a small one
def _takes(kind: type, argument: str) -> bool:
    return argument in inspect.signature(kind.forward).parameters


def last_logits(model, count: int, **inputs) -> torch.Tensor:
    """Logits of the last `count` positions: float32 [rows, count, vocabulary]."""
    return last_logits_of(model, count, **inputs)[1]


def last_logits_of(model, count: int, **inputs):
    """(what the forward gave, logits of the last `count` positions, float32 [rows, count, vocabulary])"""
    if takes_logits_to_keep(model):
        inputs["logits_to_keep"] = count
    output = model(**inputs)
    return output, output.logits[:, -count:].float()


class Places:
    """Some positions of a forward, whose logits alone are needed. places: into the batch's positions, row after row.

    The head is given their hidden states alone, in one block: most positions of a batch are asked nothing, and a
    product over rows of a view is several times slower than the same product over a block.
    """

    def __init__(self, model, places: torch.Tensor):
        self.model, self.places = model, places
        self.head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self._picked: list[torch.Tensor] = []

    @contextmanager
    def picked(self) -> Iterator[None]:
        """While it lasts, the head is given no more than that. It can be left and entered again between layers."""
        if self.head is None:
            yield
            return
        handle = self.head.register_forward_pre_hook(self._pick)
        try:
            yield
        finally:
            handle.remove()

    def logits(self, **inputs) -> torch.Tensor:
        """Of one forward, while they are picked: float32 [places, vocabulary]."""
        self._picked.clear()
        logits = self.model(**inputs).logits
        if self.head is None:
            return logits.flatten(0, 1)[self.places].float()
        if len(self._picked) != 1 or len(logits) != 1:
            asked = f"the head of a {type(self.model).__name__} was asked {len(self._picked)} times"
            raise RuntimeError(f"{asked}, for {logits.shape}")
        return logits[0].float()

    def _pick(self, module, arguments):
        self._picked.append(arguments[0].flatten(0, 1)[self.places][None])
        return (self._picked[-1], *arguments[1:])


def logits_at(model, places: torch.Tensor, **inputs) -> torch.Tensor:
    """Logits of some positions; see Places."""
    at = Places(model, places)
    with at.picked():
        return at.logits(**inputs)


def right_padded(rows: list[tuple[int, ...]], pad: int, device) -> dict[str, torch.Tensor]:
    """Token ids of different lengths as a forward's inputs: input_ids and attention_mask, int64 [rows, the longest]."""
    width = max(map(len, rows))
    ids = [[*row, *[pad] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
