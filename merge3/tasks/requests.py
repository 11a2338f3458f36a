"""What an LM is asked and what it answers: token ids and pixels in, likelihoods, texts and logits out.

A request holds what one question needs and nothing of what its answer is worth: no items, no metrics. `length` says
how many positions it takes, and what for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch

MIN_PREFIX = 8  # shorter shared prefixes are not worth a forward of their own
# Called with the live model, as often as its weights change: (index of a request, its result) as batches are done;
# None is the result where the model's logits are NaN or infinite (see likeliest).
Question = Callable[[Any], Iterator[tuple[int, Any]]]


class Pass(NamedTuple):
    """One forward of a live model. run: does it, and tells (index of a request, its result) of what it answers. around:
    entered while this forward, and no other one, is under way. positions: that it computes, about; keeps: whether their
    keys and values stay for other passes."""

    run: Callable[[], list[tuple[int, Any]]]
    around: Callable[[], AbstractContextManager] = nullcontext
    positions: int = 0
    keeps: bool = False


class InPasses(Protocol):
    """A Question that is asked by a number of forwards, none of which waits for the end of another: each needs of those
    before it what they left in the layer that it is in."""

    def passes(self, model) -> list[Pass]:
        """The forwards of this model, in their order."""


def one_by_one(passes: Sequence[Pass]) -> Iterator[tuple[int, Any]]:
    """What passes tell, each done before the next begins."""
    for single in passes:
        with single.around():
            found = single.run()
        yield from found


@dataclass(frozen=True)
class Choices:
    """How likely is each choice after the prompt? tokens: the prompt's, at least one; choices: each one's, likewise.
    greedy: whether to say, too, which choices greedy decoding would write; margins: by how much, of choices that are no
    rivals of one another, after prompts without an image. image: what the forward takes of an image in the prompt
    beside its tokens, by name; see vision.py."""

    tokens: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    greedy: bool = False
    margins: bool = False
    image: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def length(self) -> tuple[int, str]:
        """(positions, what takes them)"""
        return _sum(self.tokens, "longest choice of", max(map(len, self.choices)))


@dataclass(frozen=True)
class Start:
    """What follows the prompt, greedily? At most max_tokens tokens, up to the first of the texts in `stop`, or of the
    tokens in `end`, which end it beside the model's own. image: as of Choices."""

    tokens: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    end: tuple[int, ...] = ()
    image: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def length(self) -> tuple[int, str]:
        """(positions, what takes them)"""
        return _sum(self.tokens, "max_tokens", self.max_tokens)


@dataclass(frozen=True)
class Text:
    """What does the head say of a text? tokens: at least one."""

    tokens: tuple[int, ...]

    def length(self) -> tuple[int, str]:
        """(positions, what takes them)"""
        return len(self.tokens), f"prompt of {len(self.tokens)} tokens"


@dataclass(frozen=True)
class Image:
    """What does the head say of an image? pixels: float32 [channels, height, width]."""

    pixels: torch.Tensor

    def length(self) -> tuple[int, str]:
        """(positions, what takes them): none of a text's."""
        return 0, "an image"


@dataclass(frozen=True)
class Texts:
    """Where does an encoder place texts? tokens: each text's, at least one; skipped: how many of each text's first
    tokens are read and not pooled; poolings: of tasks/embeddings.py, joined."""

    tokens: tuple[tuple[int, ...], ...]
    skipped: tuple[int, ...]
    poolings: tuple[str, ...]

    def length(self) -> tuple[int, str]:
        """(positions, what takes them)"""
        longest = max(map(len, self.tokens))
        at = [len(tokens) for tokens in self.tokens].index(longest)
        return longest, f"{'prompt' if at == 0 else f'choices[{at - 1}]'} of {longest} tokens"


@dataclass(frozen=True)
class Likelihoods:
    """sums: log-likelihoods of each choice's tokens in total, float32 or float64 [choices], -inf where it is
    impossible; lengths: how many tokens each has, int64 [choices]. greedy: whether each of its tokens is the likeliest
    where it stands, bool [choices]; margins: the least of how far its tokens are ahead of the likeliest other one where
    they stand, in natural logarithms of their odds, float32 [choices]. Both None where nobody asked."""

    sums: torch.Tensor
    lengths: torch.Tensor
    greedy: torch.Tensor | None = None
    margins: torch.Tensor | None = None


@dataclass(frozen=True)
class Written:
    """text: cut before a stop text, special tokens left out; tokens: all that were written, end-of-text left out."""

    text: str
    tokens: tuple[int, ...]


def taken(request: Any, apart: bool = False) -> tuple[int, str]:
    """(positions, what takes them). apart: a decoder has positions of its own for what follows a prompt."""
    whole, what = request.length()
    if not apart:
        return whole, what
    prompt = len(request.tokens)
    sides = (prompt, f"prompt of {prompt} tokens"), (whole - prompt, f"{whole - prompt} tokens after a prompt")
    return max(sides)


def share_prefix(requests: Sequence[Any]) -> tuple[tuple[int, ...], list[Any]]:
    """(the first tokens that all requests have, or none where that is not worth it, the requests without them)

    The last token of each prompt stays out of the prefix: its logits are the answer's.
    """
    first = requests[0].tokens
    length = min(len(request.tokens) for request in requests) - 1
    for request in requests:
        length = next((i for i in range(length) if request.tokens[i] != first[i]), length)
    if length < MIN_PREFIX or len(requests) < 2:
        return (), list(requests)
    return first[:length], [replace(request, tokens=request.tokens[length:]) for request in requests]


def batches(requests: Sequence[Any], width: Callable[[Any], int], limit: int) -> Iterator[list[tuple[int, Any]]]:
    """(index, request) sorted by width, in batches of at most `limit` padded tokens. width(request): tokens of a row.

    A request wider than that has a batch of its own.
    """
    batch: list[tuple[int, Any]] = []
    for index, request in sorted(enumerate(requests), key=lambda entry: (width(entry[1]), entry[0])):
        if batch and (len(batch) + 1) * width(request) > limit:
            yield batch
            batch = []
        batch.append((index, request))
    if batch:
        yield batch


def _sum(tokens: Sequence[int], what: str, more: int) -> tuple[int, str]:
    return len(tokens) + more, f"prompt of {len(tokens)} tokens + {what} {more} = {len(tokens) + more}"
