"""The greedy decoder: prompts share their prefix's cache, rows that have ended leave the batch. What a model keeps
between tokens is its Steps' affair: here those of models with keys and values; see seq2seq.py and recurrent.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from merge3.tasks.forward import last_logits, likeliest
from merge3.tasks.prefix import prefix_cache
from merge3.tasks.requests import Start, Written
from merge3.tasks.shared_prefix import SharedPrefix


@dataclass
class Batch:
    """Left-padded prompts after `past` tokens of a shared prefix: ids and positions, int64 [rows, width];
    mask, int64 [rows, past + width]."""

    asked: list[tuple[int, Start]]
    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor


def left_padded(asked: list[tuple[int, Start]], past: int, device, pad: int = 0) -> Batch:
    """A batch of (index, request), whose last tokens stand side by side."""
    width = max(len(request.tokens) for _, request in asked)
    ids = torch.full((len(asked), width), pad)
    mask = torch.ones(len(asked), past + width, dtype=torch.long)
    for row, (_, request) in enumerate(asked):
        gap = width - len(request.tokens)
        ids[row, gap:] = torch.tensor(request.tokens)
        mask[row, past : past + gap] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    return Batch(asked, ids.to(device), mask.to(device), positions.to(device))


def end_tokens(model, tokenizer) -> frozenset[int]:
    """The tokens that end a text: the model's generation configuration names them, else the tokenizer."""
    end = model.generation_config.eos_token_id if getattr(model, "generation_config", None) else None
    if end is None:
        end = tokenizer.eos_token_id
    if end is None:
        return frozenset()
    return frozenset(end if isinstance(end, (list, tuple)) else (end,))


class Steps(Protocol):
    """A batch of prompts before a model, one token after the other: what differs between kinds of models."""

    def logits(self) -> torch.Tensor:
        """Of the next token: float32 [rows, vocabulary]."""

    def append(self, tokens: torch.Tensor) -> None:
        """The next token of every row: int64 [rows]."""

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone: their places, int64."""


class Padded:
    """Steps over left-padded prompts, for models that keep a key and a value of every token and no more.
    prefix: those of the tokens before all prompts."""

    def __init__(self, model, batch: Batch, prefix: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()):
        self.model, self.ids, self.mask, self.positions = model, batch.ids, batch.mask, batch.positions
        from merge3.tasks.roomy import roomy_cache  # which loads transformers

        room = batch.mask.shape[1] + max(request.max_tokens for _, request in batch.asked)
        self.cache = roomy_cache(model.config, room, prefix)

    def logits(self) -> torch.Tensor:
        """See Steps."""
        inputs = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}
        return last_logits(self.model, 1, **inputs, past_key_values=self.cache, use_cache=True)[:, -1]

    def append(self, tokens: torch.Tensor) -> None:
        """See Steps."""
        self.ids = tokens[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        self.positions = self.positions[:, -1:] + 1

    def keep(self, rows: torch.Tensor) -> None:
        """See Steps."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]


class Once:
    """See decoder.Steps; left-padded prompts after a prefix that all rows read where it lies."""

    def __init__(self, model, batch: Batch, prefix: Sequence[tuple[torch.Tensor, torch.Tensor]]):
        from merge3.tasks.roomy import roomy_cache

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
            found = last_logits(self.model, 1, **inputs, past_key_values=self._cache, use_cache=True)[:, -1]
        self._prefix.check()
        return found

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


def greedy(
    steps: Steps, asked: list[tuple[int, Start]], tokenizer, end: frozenset[int]
) -> Iterator[tuple[int, list[int] | None]]:
    """(row, the tokens it has written so far) after each of them; (row, None) where its logits are NaN or infinite.

    A row ends at a token of `end` or of its own end, which is not written, at its max_tokens, after a stop text, or
    without usable logits. One forward per token of the longest row. To be run in inference mode.
    """
    alive = list(range(len(asked)))
    written: list[list[int]] = [[] for _ in asked]
    while True:
        tokens = likeliest(steps.logits())
        going = []
        for at, (row, token) in enumerate(zip(alive, tokens.tolist())):
            if token < 0:
                yield row, None
            elif token not in end and token not in asked[row][1].end:
                written[row].append(token)
                yield row, written[row]
                if not _ended(asked[row][1], written[row], tokenizer):
                    going.append(at)
        if not going:
            return
        if len(going) < len(alive):
            keep = torch.tensor(going, device=tokens.device)
            steps.keep(keep)
            tokens = tokens[keep]
            alive = [alive[at] for at in going]
        steps.append(tokens)


class Continuations:
    """Batches of prompts, continued. A Question whose results are Written.

    batches: each with what begins it, (the live model, keys and values of `prefix`, which all prompts have before them)
    -> its Steps.
    """

    def __init__(
        self,
        batches: Sequence[tuple[list[tuple[int, Start]], Callable[[Any, Any], Steps]]],
        tokenizer,
        end: frozenset[int],
        prefix: tuple[int, ...] = (),
        device=None,
    ):
        self.batches, self.tokenizer, self.end, self.prefix, self.device = batches, tokenizer, end, prefix, device

    @torch.inference_mode()
    def __call__(self, model) -> Iterator[tuple[int, Written | None]]:
        """(index of a request, what was written, None where the logits are NaN or infinite)"""
        prefix = prefix_cache(model, self.prefix, self.device)
        for asked, begin in self.batches:
            written: dict[int, list[int] | None] = {}
            for row, tokens in greedy(begin(model, prefix), asked, self.tokenizer, self.end):
                written[row] = tokens
                if tokens is None:  # said at once: whoever asks may want no more
                    yield asked[row][0], None
            for row, (index, request) in enumerate(asked):
                tokens = written.get(row, [])
                if tokens is not None:
                    text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                    yield index, Written(cut(text, request.stop), tuple(tokens))


def cut(text: str, stop: Sequence[str]) -> str:
    """Text before the first of the stop texts."""
    ends = [text.index(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text


def _ended(request: Start, written: list[int], tokenizer) -> bool:
    if len(written) >= request.max_tokens:
        return True
    if not request.stop:
        return False
    text = tokenizer.decode(written, skip_special_tokens=True)
    return any(s in text for s in request.stop)
