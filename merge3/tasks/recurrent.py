"""Models with a state that each token changes (Mamba, hybrids of it and attention), one token after the other.

What a row has read cannot be taken back, and padding would be read like any token: prompts of one length make a batch,
and no prefix is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from merge3.tasks.forward import last_logits_of
from merge3.tasks.requests import Start, batches
from merge3.tasks.state import memory, state


class Steps:
    """See decoder.Steps; over prompts of one length. ids: int64 [rows, tokens]."""

    def __init__(self, model, ids: torch.Tensor):
        self.model, self.ids = model, ids
        self._resumes = state(model).resumes  # if not, the whole row is read again
        self._name, self._kept = "", None

    def logits(self) -> torch.Tensor:
        """Of the next token: float32 [rows, vocabulary]."""
        kept = {} if self._kept is None else {self._name: self._kept}
        output, last = last_logits_of(self.model, 1, input_ids=self.ids, use_cache=self._resumes, **kept)
        if self._resumes:
            self._name, self._kept = memory(output)
        return last[:, -1]

    def append(self, tokens: torch.Tensor) -> None:
        """The next token of every row: int64 [rows]."""
        tokens = tokens[:, None]
        self.ids = tokens if self._kept is not None else torch.cat([self.ids, tokens], 1)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone: their places, int64."""
        self.ids = self.ids[rows]
        if self._kept is not None:
            self._kept.reorder_cache(rows)


def even_batches(
    requests: Sequence[Start], width: Callable[[Any], int], limit: int
) -> Iterator[list[tuple[int, Start]]]:
    """As requests.batches, of prompts of one length each."""
    lengths: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        lengths.setdefault(len(request.tokens), []).append(index)
    for _, indices in sorted(lengths.items()):
        for batch in batches([requests[index] for index in indices], width, limit):
            yield [(indices[at], request) for at, request in batch]
