"""One vector per text: the states of an encoder, pooled. Each distinct text is embedded once per candidate.

    pool(states h_1..h_n of a text's tokens) = mean: Σ h_i / n    mean_sqrt_len_tokens: Σ h_i / √n    cls: h_1
    weightedmean: Σ i·h_i / Σ i    lasttoken: h_n    max: of each dimension

Sums over tokens are in float32, whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from merge3.tasks.forward import right_padded
from merge3.tasks.requests import Texts, batches

# (states float32 [texts, tokens, width], which count float32 [texts, tokens, 1]) -> [texts, width]. Of cls and
# lasttoken all tokens count: these two are tokens that are there whatever is left out.
Pooling = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _mean(states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return (states * counts).sum(1) / counts.sum(1)


def _mean_sqrt(states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return (states * counts).sum(1) / counts.sum(1).sqrt()


def _weighted(states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    numbers = torch.arange(1, states.shape[1] + 1, device=states.device, dtype=states.dtype)
    return _mean(states, counts * numbers[None, :, None])


def _max(states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return states.masked_fill(counts == 0, -torch.inf).amax(1)


def _first(states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return states[:, 0]


def _last(states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    numbers = torch.arange(states.shape[1], device=states.device)
    last = (counts[:, :, 0] * numbers).argmax(1)
    return states[torch.arange(len(states), device=states.device), last]


POOLINGS: dict[str, Pooling] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted,
    "lasttoken": _last,
}


def pooled(states: torch.Tensor, counts: torch.Tensor, poolings: Sequence[str]) -> torch.Tensor:
    """states: [texts, tokens, width]; counts: 1 where a token counts, [texts, tokens]; poolings: names of POOLINGS.
    Returns float32 [texts, width · poolings]."""
    states, counts = states.float(), counts[:, :, None].float()
    return torch.cat([POOLINGS[name](states, counts) for name in poolings], 1)


@dataclass
class Batch:
    """places: of its texts in the table. inputs: of the forward. counts: which tokens are pooled, 0 or 1, int64
    [texts, tokens]."""

    places: list[int]
    inputs: dict[str, torch.Tensor]
    counts: torch.Tensor


class Embeddings:
    """Texts before an encoder. A Question whose results are embeddings, float32 [a request's texts, width], on the CPU.

    Requests share texts: each distinct one is in one batch, and embedded once per candidate. use_cache: False where the
    model would keep keys and values that nobody reads.
    """

    def __init__(self, requests: Sequence[Texts], device, batch_tokens: int, pad: int = 0, use_cache: bool = True):
        self.poolings = requests[0].poolings
        assert all(request.poolings == self.poolings for request in requests), "one checkpoint pools in one way"
        places: dict[tuple[tuple[int, ...], int], int] = {}  # (tokens, how many of them are left out) -> its row
        self.rows = []
        for request in requests:
            keys = zip(request.tokens, request.skipped)
            self.rows.append([places.setdefault(key, len(places)) for key in keys])
        self.count, self.batches, distinct = len(places), [], list(places)
        self.settings = {} if use_cache else {"use_cache": False}
        for batch in batches(distinct, lambda text: len(text[0]), batch_tokens):
            inputs = right_padded([tokens for _, (tokens, _) in batch], pad, device)
            counts = inputs["attention_mask"].clone()
            for row, (_, (_, skipped)) in enumerate(batch):
                counts[row, :skipped] = 0
            self.batches.append(Batch([place for place, _ in batch], inputs, counts))

    @torch.inference_mode()
    def __call__(self, model) -> Iterator[tuple[int, torch.Tensor | None]]:
        """(index of a request, its texts' embeddings, None where one is not finite or has no direction)"""
        table = None
        for batch in self.batches:
            states = model(**batch.inputs, **self.settings).last_hidden_state
            found = pooled(states, batch.counts, self.poolings).cpu()
            if table is None:
                table = found.new_empty(self.count, found.shape[1])
            table[batch.places] = found
        lengths = table.norm(dim=1)
        usable = lengths.isfinite() & (lengths > 0)
        for index, rows in enumerate(self.rows):
            yield index, table[rows] if usable[rows].all() else None
