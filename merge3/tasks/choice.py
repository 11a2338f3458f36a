"""Multiple choice by log-likelihood, each distinct token computed once.

A row holds one item: its prompt after the shared prefix, then all its choices side by side. A mask lets
each choice see the prefix, its prompt and itself, and position ids restart at each choice, so one row
gives what a plain loop computes in as many rows as there are choices. The last token of a choice is
never an input: nothing follows it. Masks and ids are made once per run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from merge3.tasks.forward import expanded, last_logits, not_finite, prefix_cache
from merge3.tasks.prompts import Group, Prompt, batches


@dataclass
class Batch:
    """inputs: of the model's forward. positions, tokens, owner, length: per scored token, the logit row
    and position that predict it, the token, and which (row, choice) it belongs to."""

    prompts: list[Prompt]
    inputs: dict[str, torch.Tensor]
    tail: int  # positions whose logits are needed, at the end of each row
    rows: torch.Tensor
    positions: torch.Tensor
    tokens: torch.Tensor
    owner: torch.Tensor
    lengths: torch.Tensor


class ChoiceScorer:
    """Scores the choice items of one task."""

    def __init__(self, group: Group, device, dtype: torch.dtype, batch_tokens: int, pad: int = 0):
        self.prefix, self.device = group.prefix, device
        self.batches = [self._prepare(b, dtype, pad) for b in batches(group.prompts, _width, batch_tokens)]

    @torch.inference_mode()
    def score(self, model) -> dict[int, float]:
        """item index -> 1.0 if the right choice is the likeliest, else 0.0. Raises LogitsError."""
        results = {}
        for index, item, values in self.loglikelihoods(model):
            best = int(values.argmax())
            # Where every choice is impossible none is the likeliest.
            results[index] = float(best == item.answer and bool(values[best] > -torch.inf))
        return results

    @torch.inference_mode()
    def loglikelihoods(self, model) -> list[tuple[int, object, torch.Tensor]]:
        """(index, item, [choices]) with log-likelihoods, per token where the metric is acc_norm. Raises LogitsError."""
        prefix, results = prefix_cache(model, self.prefix, self.device), []
        for batch in self.batches:
            logits = last_logits(
                model, batch.tail, past_key_values=expanded(prefix, len(batch.prompts)), use_cache=bool(prefix),
                **batch.inputs,
            )  # fmt: skip
            normalizer = logits.logsumexp(-1)[batch.rows, batch.positions]
            log_p = logits[batch.rows, batch.positions, batch.tokens] - normalizer
            # An infinite logit leaves the other tokens -inf, which is no likelihood. NaN is NaN already.
            log_p = torch.where(normalizer == torch.inf, torch.nan, log_p)
            sums = torch.zeros(len(batch.lengths), device=self.device).index_add_(0, batch.owner, log_p).cpu()
            start = 0
            for prompt in batch.prompts:
                values = sums[start : start + len(prompt.choices)]
                if values.isnan().any():
                    raise not_finite(prompt.item)
                if prompt.item.metric == "acc_norm":
                    values = values / batch.lengths[start : start + len(prompt.choices)]
                start += len(prompt.choices)
                results.append((prompt.index, prompt.item, values))
        return results

    def _prepare(self, prompts: Sequence[Prompt], dtype: torch.dtype, pad: int) -> Batch:
        past = len(self.prefix)
        left = max(len(p.tokens) for p in prompts)
        right = max(_choice_inputs(p) for p in prompts)
        width = left + right
        ids = torch.full((len(prompts), width), pad)
        position_ids = torch.zeros(len(prompts), width, dtype=torch.long)
        # Padding sees itself alone: a row of nothing but masked scores would be NaN.
        visible = torch.zeros(len(prompts), width, past + width, dtype=torch.bool)
        visible[:, torch.arange(width), past + torch.arange(width)] = True
        rows, positions, tokens, owner, lengths = [], [], [], [], []
        for row, prompt in enumerate(prompts):
            start = left - len(prompt.tokens)
            ids[row, start:left] = torch.tensor(prompt.tokens)
            position_ids[row, start:left] = past + torch.arange(len(prompt.tokens))
            visible[row, start:, :past] = True
            visible[row, start:left, past + start : past + left] = torch.ones(left - start, left - start).tril().bool()
            at = left
            for choice in prompt.choices:
                inner = len(choice) - 1
                if inner:
                    ids[row, at : at + inner] = torch.tensor(choice[:-1])
                    position_ids[row, at : at + inner] = past + len(prompt.tokens) + torch.arange(inner)
                    visible[row, at : at + inner, past + start : past + left] = True
                    visible[row, at : at + inner, past + at : past + at + inner] = torch.ones(inner, inner).tril().bool()
                # Token 0 is predicted by the prompt's last position, token j by the choice's j - 1.
                rows += [row] * len(choice)
                positions += [0, *(at - left + 1 + j for j in range(inner))]
                tokens += choice
                owner += [len(lengths)] * len(choice)
                lengths.append(len(choice))
                at += inner
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
        to = lambda data: torch.as_tensor(data).to(self.device)
        inputs = {"input_ids": to(ids), "position_ids": to(position_ids), "attention_mask": to(mask[:, None])}
        return Batch(
            list(prompts), inputs, right + 1, to(rows), to(positions), to(tokens), to(owner), torch.tensor(lengths)
        )


class PlainChoiceScorer(ChoiceScorer):
    """One row per choice, right padded, no sharing: for models that take no mask of their own."""

    def __init__(self, group: Group, device, dtype: torch.dtype, batch_tokens: int, pad: int = 0):
        self.prefix, self.device, self.pad = group.prefix, device, pad
        widest = lambda p: len(p.choices) * (len(self.prefix) + len(p.tokens) + max(map(len, p.choices)))
        self.batches = list(batches(group.prompts, widest, batch_tokens))

    @torch.inference_mode()
    def loglikelihoods(self, model) -> list[tuple[int, object, torch.Tensor]]:
        results = []
        for prompts in self.batches:
            starts = [(*self.prefix, *p.tokens) for p in prompts]
            rows = [(*start, *choice) for start, p in zip(starts, prompts) for choice in p.choices]
            width = max(map(len, rows))
            ids = torch.tensor([[*row, *[self.pad] * (width - len(row))] for row in rows], device=self.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
            log_p = iter(model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1).cpu())
            for start, prompt in zip(starts, prompts):
                values = []
                for choice, row in zip(prompt.choices, log_p):
                    total = sum(float(row[len(start) - 1 + j, token]) for j, token in enumerate(choice))
                    values.append(total / len(choice) if prompt.item.metric == "acc_norm" else total)
                if any(map(math.isnan, values)):  # log_softmax makes a whole row NaN if a logit is NaN or +inf
                    raise not_finite(prompt.item)
                results.append((prompt.index, prompt.item, torch.tensor(values)))
        return results


def _choice_inputs(prompt: Prompt) -> int:
    return sum(len(choice) - 1 for choice in prompt.choices)


def _width(prompt: Prompt) -> int:
    return len(prompt.tokens) + _choice_inputs(prompt)
