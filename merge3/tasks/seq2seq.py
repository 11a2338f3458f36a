"""Encoder-decoder models: the encoder reads the prompt, once; choices and continuations are the decoder's.

The decoder starts with its start token and sees of the prompt what the encoder made of it. A choice's tokens are those
of the choice alone, without special tokens around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from merge3.errors import CheckpointError, ItemsError
from merge3.tasks.forward import ahead, right_padded
from merge3.tasks.requests import Choices, Likelihoods, batches


def is_pair(model) -> bool:
    """Whether a model has an encoder for the prompt and a decoder for the answer."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


class Steps:
    """See decoder.Steps; the prompts, right padded, are read at the first step."""

    def __init__(self, model, inputs: dict[str, torch.Tensor]):
        self.model, self.mask = model, inputs["attention_mask"]
        self._given: dict[str, Any] = {"input_ids": inputs["input_ids"]}
        self._cache, self._forced = None, _setting(model, "forced_bos_token_id")
        self._next = self.mask.new_full((len(self.mask), 1), start_token(model))

    def logits(self) -> torch.Tensor:
        """Of the next token: float32 [rows, vocabulary]."""
        output = self.model(
            **self._given,
            attention_mask=self.mask,
            decoder_input_ids=self._next,
            past_key_values=self._cache,
            use_cache=True,
        )
        if "input_ids" in self._given:
            self._given = {"encoder_outputs": _encoded(output.encoder_last_hidden_state)}
        self._cache, logits = output.past_key_values, output.logits[:, -1].float()
        if self._forced is not None:  # the language to write in, say; logits that are no numbers stay so
            chosen = torch.where(logits.isfinite().any(-1), 0.0, torch.nan)
            logits = torch.full_like(logits, -torch.inf)
            logits[:, self._forced], self._forced = chosen, None
        return logits

    def append(self, tokens: torch.Tensor) -> None:
        """The next token of every row: int64 [rows]."""
        self._next = tokens[:, None]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone: their places, int64."""
        self.mask = self.mask[rows]
        self._given = {"encoder_outputs": _encoded(self._given["encoder_outputs"].last_hidden_state[rows])}
        self._cache.batch_select_indices(rows)


@dataclass
class Batch:
    """prompts: the encoder's inputs, a row for each request. owner: which of them each choice answers, int64
    [choices]; inputs: the decoder's, int64 [choices, longest]; tokens: what is to follow each input, -1 behind a
    choice's end; lengths: of the choices, int64."""

    asked: list[tuple[int, Choices]]
    prompts: dict[str, torch.Tensor]
    owner: torch.Tensor
    inputs: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor


class PairedRows:
    """Each prompt encoded once, each choice a row of the decoder. A Question whose results are Likelihoods, sums in
    float32. Raises ItemsError for margins of a model that writes a token first which nobody asks it for."""

    def __init__(self, requests: Sequence[Choices], model, device, batch_tokens: int, pad: int = 0):
        first = _setting(model, "forced_bos_token_id")
        if first is not None and any(request.margins for request in requests):
            found = f"answers shown to a {type(model).__name__}, whose texts all begin with token {first}"
            raise ItemsError("items", found, "items of kind generate")
        start = start_token(model)
        self.batches = [_prepared(asked, start, device, pad) for asked in batches(requests, _width, batch_tokens)]

    @torch.inference_mode()
    def __call__(self, model) -> Iterator[tuple[int, Likelihoods | None]]:
        """(index of a request, its likelihoods, None where the logits are NaN or infinite)"""
        for batch in self.batches:
            first = batch.inputs[: len(batch.asked), :1]  # the start token: all rows have the same
            output = model(**batch.prompts, decoder_input_ids=first, use_cache=False)
            logits = output.logits[batch.owner].float()
            if batch.inputs.shape[1] > 1:
                encoded = _encoded(output.encoder_last_hidden_state[batch.owner])
                mask = batch.prompts["attention_mask"][batch.owner]
                logits = model(
                    encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=batch.inputs, use_cache=False
                ).logits.float()
            normalizer = logits.logsumexp(-1)
            log_p = logits.gather(-1, batch.tokens.clamp(min=0)[..., None])[..., 0] - normalizer
            # An infinite logit leaves the other tokens -inf, which is no likelihood. NaN is NaN already.
            log_p = torch.where(normalizer == torch.inf, torch.nan, log_p)
            sums = torch.where(batch.tokens < 0, 0.0, log_p).sum(1).cpu()
            greedy = ((logits.argmax(-1) == batch.tokens) | (batch.tokens < 0)).all(1).cpu()
            margins = _margins(logits, batch) if any(request.margins for _, request in batch.asked) else None
            begin = 0
            for index, request in batch.asked:
                own = slice(begin, begin + len(request.choices))
                begin = own.stop
                said = greedy[own] if request.greedy else None, margins[own] if request.margins else None
                found = Likelihoods(sums[own], batch.lengths[own], *said)
                yield index, None if found.sums.isnan().any() else found


def _margins(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """See Likelihoods, float32 [choices]. logits: float32 [choices, longest, vocabulary]."""
    tokens = batch.tokens.clamp(min=0).flatten()
    margins = ahead(logits.flatten(0, 1), torch.arange(len(tokens), device=tokens.device), tokens)
    return margins.view(batch.tokens.shape).masked_fill(batch.tokens < 0, torch.inf).amin(1).cpu()


def _prepared(asked: list[tuple[int, Choices]], start: int, device, pad: int) -> Batch:
    prompts = right_padded([request.tokens for _, request in asked], pad, device)
    owner, choices = [], []
    for row, (_, request) in enumerate(asked):
        owner += [row] * len(request.choices)
        choices += request.choices
    width = max(map(len, choices))
    inputs = [[start, *choice[:-1], *[pad] * (width - len(choice))] for choice in choices]
    tokens = [[*choice, *[-1] * (width - len(choice))] for choice in choices]
    to = lambda data: torch.tensor(data, device=device)
    lengths = torch.tensor([len(choice) for choice in choices])
    return Batch(asked, prompts, to(owner), to(inputs), to(tokens), lengths)


def _width(request: Choices) -> int:
    return len(request.tokens) + len(request.choices) * max(map(len, request.choices))


def _encoded(states: torch.Tensor):
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states)


def start_token(model) -> int:
    """What a decoder starts with. Raises CheckpointError where nothing says it."""
    start = _setting(model, "decoder_start_token_id")
    if start is None:
        start = _setting(model, "bos_token_id")
    if start is None:
        found = f"no decoder_start_token_id of {type(model).__name__}"
        raise CheckpointError("config.json", found, "the token that its decoder starts with")
    return start


def _setting(model, name: str) -> int | None:
    """As its generation configuration has it, else its configuration."""
    found = getattr(getattr(model, "generation_config", None), name, None)
    return getattr(model.config, name, None) if found is None else found
