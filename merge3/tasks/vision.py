"""Prompts with an image in them, before a model that has eyes: how likely choices are, and what follows greedily.

Everything is transformers' own: its forward, its generate, on what the checkpoint's processor made. What is ours is the
batching, and that the eyes are asked once per image as long as their weights stay as they are: what they said is kept
and said again, in the place of the model's own `get_image_features`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from merge3.tasks.decoder import cut
from merge3.tasks.eyes import Eyes, Said, eyes_of
from merge3.tasks.forward import last_logits, likeliest
from merge3.tasks.requests import Choices, Likelihoods, Start, Written, batches


def sees(model) -> bool:
    """Whether a model continues texts with images in them."""
    return hasattr(model.base_model, "get_image_features") and model.can_generate()


@torch.inference_mode()
def refusal(model, request: Choices | Start) -> str:
    """Why a model cannot take a prompt with its image, such as pixels of another size; empty where it can."""
    first = next(model.parameters())
    rows = _Rows([(0, request)], first.dtype, 0)
    try:
        last_logits(model, 1, **rows.inputs(first.device))
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return str(error).strip().split("\n")[0][:200]
    return ""


def shapes_of(request: Choices | Start) -> tuple:
    """Of a request's image: what must be equal but for first dimensions to share a batch, or to be taken alike."""
    return tuple((name, tuple(t.shape[1:])) for name, t in sorted(request.image.items()) if not _per_token(name))


def alike(requests: Sequence[Choices] | Sequence[Start], also: Callable[[Any], Any]) -> list[list[int]]:
    """Indices of the requests that may share a batch: whose images have equal shapes, and `also` is equal."""
    groups: dict[Any, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault((shapes_of(request), also(request)), []).append(index)
    return list(groups.values())


class SeenChoices:
    """Choices after prompts with images: every choice in a row of its own, right padded. A Question whose results are
    Likelihoods, sums in float64.

    All first choices of a batch are asked, then all second ones, and so on: images stay as they are. Choices whose
    inputs are the same, such as those of one token, are asked once.
    """

    def __init__(self, requests: Sequence[Choices], device, dtype: torch.dtype, batch_tokens: int, pad: int = 0):
        self.device, self.batches = device, []
        for group in alike(requests, lambda request: len(request.choices)):
            own = [requests[i] for i in group]
            for batch in batches(own, lambda r: len(r.tokens) + max(map(len, r.choices)), batch_tokens):
                asked = [(group[at], request) for at, request in batch]
                same: dict[tuple, list[int]] = {}
                for i in range(len(batch[0][1].choices)):
                    same.setdefault(tuple(request.choices[i][:-1] for _, request in asked), []).append(i)
                rounds = [(_Rows(asked, dtype, pad, choice=own[0]), own) for own in same.values()]
                self.batches.append((asked, rounds, Said()))

    @torch.inference_mode()
    def __call__(self, model) -> Iterator[tuple[int, Likelihoods | None]]:
        """(index of a request, its likelihoods, None where the logits are NaN or infinite)"""
        eyes = eyes_of(model)
        eyes.look(model)
        for asked, rounds, said in self.batches:
            sums: dict[int, list[float]] = {}
            for rows, own in rounds:
                shortest = min(len(request.tokens) for _, request in asked)
                with seen(model, eyes, said):
                    logits = last_logits(model, rows.width - shortest + 1, **rows.inputs(self.device)).cpu()
                sums |= {choice: _sums(logits, asked, choice, shortest) for choice in own}
            eyes.hold(said, self)
            for row, (index, request) in enumerate(asked):
                found = torch.tensor([sums[i][row] for i in range(len(sums))], dtype=torch.float64)
                lengths = torch.tensor([len(choice) for choice in request.choices])
                yield index, None if found.isnan().any() else Likelihoods(found, lengths)


def _sums(logits: torch.Tensor, asked: Sequence[tuple[int, Choices]], choice: int, shortest: int) -> list[float]:
    """Each row's log-likelihood of its choice, NaN where there is none. logits: from the end of the shortest prompt."""
    sums = []
    for row, (_, request) in zip(logits, asked):
        start, tokens = len(request.tokens) - shortest, request.choices[choice]
        log_p = row[start : start + len(tokens)].log_softmax(-1)
        sums.append(sum(float(log_p[at, token]) for at, token in enumerate(tokens)))
    return sums


class SeenContinuations:
    """What follows prompts with images, left padded, by transformers' own generate, greedily; of the checkpoint's
    generation settings only where a text ends counts. A Question whose results are Written."""

    def __init__(
        self,
        requests: Sequence[Start],
        device,
        dtype: torch.dtype,
        tokenizer,
        end: frozenset[int],
        batch_tokens: int,
        pad: int = 0,
    ):
        self.device, self.tokenizer, self.end, self.pad, self.batches = device, tokenizer, end, pad, []
        for group in alike(requests, lambda request: None):
            own = [requests[i] for i in group]
            for batch in batches(own, lambda r: len(r.tokens) + r.max_tokens, batch_tokens):
                asked = [(group[at], request) for at, request in batch]
                self.batches.append((asked, _Rows(asked, dtype, pad), Said()))

    @torch.inference_mode()
    def __call__(self, model) -> Iterator[tuple[int, Written | None]]:
        """(index of a request, what was written, None where the logits are NaN or infinite)"""
        eyes = eyes_of(model)
        eyes.look(model)
        for asked, rows, said in self.batches:
            writing = Writing([request for _, request in asked], self.tokenizer, self.end)
            with seen(model, eyes, said), greedily(model, self.end, self.pad):
                model.generate(
                    **rows.inputs(self.device),
                    max_new_tokens=max(request.max_tokens for _, request in asked),
                    logits_processor=[writing.watch],
                    stopping_criteria=[writing.stop],
                )
            eyes.hold(said, self)
            for (index, request), tokens in zip(asked, writing.results()):
                if tokens is None:
                    yield index, None
                    continue
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                yield index, Written(cut(text, request.stop), tuple(tokens))


class Writing:
    """Follows a batch that is being continued: which rows have ended, and where; which had no usable logits."""

    def __init__(self, requests: Sequence[Start], tokenizer, end: frozenset[int]):
        self.requests, self.tokenizer, self.end = requests, tokenizer, end
        self._written: list[list[int]] = [[] for _ in requests]
        self._ended, self._broken = [False] * len(requests), [False] * len(requests)

    def watch(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Before a token is chosen: are the logits numbers?"""
        for row, best in enumerate(likeliest(scores).tolist()):
            if best < 0 and not self._ended[row]:
                self._broken[row] = self._ended[row] = True
        return scores

    def stop(self, ids: torch.Tensor, scores: Any, **_) -> torch.Tensor:
        """After a token was chosen: bool [rows], whether it was a row's last."""
        for row, (token, request) in enumerate(zip(ids[:, -1].tolist(), self.requests)):
            if self._ended[row]:
                continue
            if token in self.end or token in request.end:
                self._ended[row] = True
                continue
            written = self._written[row]
            written.append(token)
            text = self.tokenizer.decode(written, skip_special_tokens=True) if request.stop else ""
            self._ended[row] = len(written) >= request.max_tokens or any(s in text for s in request.stop)
        return torch.tensor(self._ended, device=ids.device)

    def results(self) -> list[list[int] | None]:
        """Each row's tokens, those that end a text left out; None without usable logits."""
        return [None if broken else written for written, broken in zip(self._written, self._broken)]


@contextmanager
def seen(model, eyes: Eyes, said: Said) -> Iterator[None]:
    """In here the eyes are asked only for what is not in `said` yet, or was said with other weights."""
    inner = model.base_model
    original = inner.get_image_features

    @functools.wraps(original)
    def features(*args, **kwargs):
        pixels = next((t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)), None)
        if pixels is None:
            return original(*args, **kwargs)
        eyes.learn(model, original, *args, **kwargs)
        if said.version != eyes.version or not torch.equal(said.pixels, pixels):
            said.version, said.pixels, said.output = eyes.version, pixels, _slim(original(*args, **kwargs))
        return said.output

    features.__signature__ = inspect.signature(original)
    inner.get_image_features = features
    try:
        yield
    finally:
        del inner.get_image_features


@contextmanager
def greedily(model, end: frozenset[int], pad: int) -> Iterator[None]:
    """In here `generate` takes the likeliest token, whatever the checkpoint's generation settings say."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=sorted(end) or None, pad_token_id=pad)
    try:
        yield
    finally:
        model.generation_config = before


class _Rows:
    """A batch as the forward takes it. choice: a choice's number, whose inputs follow the prompt, right padded; None:
    prompts alone, left padded. width: tokens of a row."""

    def __init__(self, asked: Sequence[tuple[int, Any]], dtype: torch.dtype, pad: int, choice: int | None = None):
        requests = [request for _, request in asked]
        lines = [r.tokens if choice is None else (*r.tokens, *r.choices[choice][:-1]) for r in requests]
        self.width = max(map(len, lines))
        ids = torch.full((len(lines), self.width), pad)
        mask = torch.zeros(len(lines), self.width, dtype=torch.long)
        at = [self.width - len(line) if choice is None else 0 for line in lines]
        for row, (line, start) in enumerate(zip(lines, at)):
            ids[row, start : start + len(line)] = torch.tensor(line)
            mask[row, start : start + len(line)] = 1
        self._inputs = {"input_ids": ids, "attention_mask": mask}
        for name in requests[0].image:
            parts = [request.image[name] for request in requests]
            if _per_token(name):
                self._inputs[name] = torch.zeros_like(ids, dtype=parts[0].dtype)
                for row, (part, start) in enumerate(zip(parts, at)):
                    self._inputs[name][row, start : start + part.shape[1]] = part[0]
            else:
                whole = torch.cat(parts)
                self._inputs[name] = whole.to(dtype) if whole.is_floating_point() else whole

    def inputs(self, device) -> Mapping[str, torch.Tensor]:
        """Of the forward, on a device."""
        return {name: tensor.to(device) for name, tensor in self._inputs.items()}


def _per_token(name: str) -> bool:
    return name.endswith("token_type_ids")


def _slim(output: Any) -> Any:
    """Without what no forward reads again: the states of every layer."""
    for name in ("hidden_states", "attentions"):
        if getattr(output, name, None) is not None:
            setattr(output, name, None)
    return output
