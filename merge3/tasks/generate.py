"""Greedy generation: prompts share their prefix's cache, finished rows leave the batch."""

from __future__ import annotations

import re
from dataclasses import dataclass

import regex
import torch

from merge3.errors import ItemsError
from merge3.tasks.forward import expanded, last_logits, likeliest, not_finite, prefix_cache
from merge3.tasks.items import Item, place
from merge3.tasks.prompts import Group, Prompt, batches

_PATTERN_SECONDS = 1.0
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass
class Batch:
    """Left-padded prompts: ids and positions [rows, width], mask [rows, prefix + width]."""

    prompts: list[Prompt]
    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor


class GenerateScorer:
    """Answers and scores the generate items of one task."""

    def __init__(self, group: Group, device, tokenizer, batch_tokens: int, end: tuple[int, ...], pad: int = 0):
        self.prefix, self.device, self.tokenizer, self.end = group.prefix, device, tokenizer, set(end)
        self.pad = pad
        self.batches = [
            self._prepare(b) for b in batches(group.prompts, lambda p: len(p.tokens) + p.item.max_tokens, batch_tokens)
        ]

    def score(self, model) -> dict[int, float]:
        """item index -> 1.0 if the answer is right, else 0.0. Raises LogitsError."""
        return {p.index: float(correct(p.item, text)) for p, text in self.answers(model)}

    @torch.inference_mode()
    def answers(self, model) -> list[tuple[Prompt, str]]:
        """Every prompt with its generated text, cut before a stop string."""
        prefix = prefix_cache(model, self.prefix, self.device)
        results = []
        for batch in self.batches:
            results += zip(batch.prompts, self._generate(model, batch, prefix))
        return results

    def _prepare(self, prompts: list[Prompt]) -> Batch:
        past, width = len(self.prefix), max(len(p.tokens) for p in prompts)
        ids = torch.full((len(prompts), width), self.pad)
        mask = torch.ones(len(prompts), past + width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            gap = width - len(prompt.tokens)
            ids[row, gap:] = torch.tensor(prompt.tokens)
            mask[row, past : past + gap] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        return Batch(list(prompts), ids.to(self.device), mask.to(self.device), positions.to(self.device))

    def _generate(self, model, batch: Batch, prefix) -> list[str]:
        ids, mask, positions = batch.ids, batch.mask, batch.positions
        cache, alive = expanded(prefix, len(ids)), list(range(len(ids)))
        written: list[list[int]] = [[] for _ in batch.prompts]
        if cache is None:
            from transformers import DynamicCache

            cache = DynamicCache(config=model.config)
        while True:
            logits = last_logits(
                model, 1, input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            tokens = likeliest(logits[:, -1])
            going = []
            for at, (row, token) in enumerate(zip(alive, tokens.tolist())):
                if token < 0:
                    raise not_finite(batch.prompts[row].item)
                if token not in self.end:
                    written[row].append(token)
                    item = batch.prompts[row].item
                    if len(written[row]) < item.max_tokens and not self._stopped(item, written[row]):
                        going.append(at)
            if not going:
                break
            if len(going) < len(alive):
                keep = torch.tensor(going, device=self.device)
                cache.batch_select_indices(keep)
                tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
                alive = [alive[at] for at in going]
            ids = tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
            positions = positions[:, -1:] + 1
        return [cut(self.tokenizer.decode(w, skip_special_tokens=True), p.item.stop) for w, p in zip(written, batch.prompts)]

    def _stopped(self, item: Item, tokens: list[int]) -> bool:
        if not item.stop:
            return False
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return any(s in text for s in item.stop)


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Text before the first stop string."""
    ends = [text.index(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text


def correct(item: Item, text: str) -> bool:
    """exact: the text but for outer white space; number: its last number; regex: a match anywhere."""
    if item.metric == "exact":
        return text.strip() in {a.strip() for a in item.answer}
    if item.metric == "regex":
        return any(_matches(pattern, text, item) for pattern in item.answer)
    numbers = _NUMBER.findall(text)
    return bool(numbers) and float(numbers[-1].replace(",", "")) in {float(a) for a in item.answer}


def _matches(pattern: str, text: str, item: Item) -> bool:
    """Whether a pattern is found. Some patterns take exponentially long; a candidate does not wait for them."""
    try:
        return regex.search(pattern, text, timeout=_PATTERN_SECONDS, concurrent=True) is not None
    except TimeoutError:
        raise ItemsError(
            place(item), f"its pattern {pattern!r} takes more than {_PATTERN_SECONDS} s on {len(text)} characters",
            "one without nested repetition",
        ) from None  # fmt: skip
