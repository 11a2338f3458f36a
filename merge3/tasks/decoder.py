"""The greedy decoder: prompts share their prefix's cache, rows that have ended leave the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from merge3.tasks.forward import expanded, last_logits, likeliest, prefix_cache
from merge3.tasks.requests import Start, Written, batches


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


def greedy(
    model,
    batch: Batch,
    tokenizer,
    end: frozenset[int],
    prefix: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
) -> Iterator[tuple[int, list[int] | None]]:
    """(row, the tokens it has written so far) after each of them; (row, None) where its logits are NaN or infinite.

    A row ends at a token of `end` or of its own end, which is not written, at its max_tokens, after a stop text, or
    without usable logits. One forward per token of the longest row. To be run in inference mode.
    """
    ids, mask, positions = batch.ids, batch.mask, batch.positions
    cache, alive = expanded(prefix, len(ids)), list(range(len(ids)))
    written: list[list[int]] = [[] for _ in batch.asked]
    if cache is None:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
    while True:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits = last_logits(model, 1, **inputs, past_key_values=cache, use_cache=True)
        tokens = likeliest(logits[:, -1])
        going = []
        for at, (row, token) in enumerate(zip(alive, tokens.tolist())):
            if token < 0:
                yield row, None
            elif token not in end and token not in batch.asked[row][1].end:
                written[row].append(token)
                yield row, written[row]
                if not _ended(batch.asked[row][1], written[row], tokenizer):
                    going.append(at)
        if not going:
            return
        if len(going) < len(alive):
            keep = torch.tensor(going, device=ids.device)
            cache.batch_select_indices(keep)
            tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
            alive = [alive[at] for at in going]
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
        positions = positions[:, -1:] + 1


class Continuations:
    """Batches of prompts, continued. A Question whose results are Written."""

    def __init__(
        self,
        prefix: tuple[int, ...],
        requests: Sequence[Start],
        device,
        tokenizer,
        end: frozenset[int],
        batch_tokens: int,
        pad: int = 0,
    ):
        self.prefix, self.device, self.tokenizer, self.end = prefix, device, tokenizer, end
        width = lambda request: len(request.tokens) + request.max_tokens
        self.batches = [left_padded(b, len(prefix), device, pad) for b in batches(requests, width, batch_tokens)]

    @torch.inference_mode()
    def __call__(self, model) -> Iterator[tuple[int, Written | None]]:
        """(index of a request, what was written, None where the logits are NaN or infinite)"""
        prefix = prefix_cache(model, self.prefix, self.device)
        for batch in self.batches:
            written: dict[int, list[int] | None] = {}
            for row, tokens in greedy(model, batch, self.tokenizer, self.end, prefix):
                written[row] = tokens
                if tokens is None:  # said at once: whoever asks may want no more
                    yield batch.asked[row][0], None
            for row, (index, request) in enumerate(batch.asked):
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
