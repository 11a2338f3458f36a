"""What a loss is made of: the distributions that a live model gives for one item, with gradients.

Of a text these are over the vocabulary, at each place where a token of the answer is predicted; of choices one over
the choices, by their log-likelihoods; of a head one over its labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from merge3.errors import ItemsError
from merge3.tasks.forward import logits_at, right_padded, without_cache
from merge3.tasks.items import Item, place
from merge3.tasks.requests import Choices, Image, Start, Text
from merge3.tasks.seq2seq import is_pair, start_token

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """One item as a loss asks it.

    prompt, answers: token ids; the distributions are those of each token of the one answer, or with `choose` the one
    over all answers; of an empty answer that of the next token. head: what a head is given instead.
    """

    item: Item
    prompt: Tokens = ()
    answers: tuple[Tokens, ...] = ()
    choose: bool = False
    head: Text | Image | None = None

    @property
    def rows(self) -> int:
        """Rows of a forward pass that it takes."""
        return max(1, len(self.answers))

    @property
    def width(self) -> int:
        """Tokens of its longest row; of an image none."""
        if self.head is not None:
            return self.head.length()[0]
        return len(self.prompt) + max(len(answer) for answer in self.answers)


def of_answer(item: Item, request: Choices | Start, answer: Tokens) -> Asked:
    """The distributions at each token of an answer. Raises ItemsError for a prompt with an image in it."""
    return Asked(item, _text(item, request).tokens, (answer,))


def of_next(item: Item, request: Start) -> Asked:
    """The distribution of the token after the prompt."""
    return Asked(item, _text(item, request).tokens, ((),))


def of_choices(item: Item, request: Choices) -> Asked:
    """The distribution over an item's choices."""
    return Asked(item, _text(item, request).tokens, request.choices, choose=True)


def of_labels(item: Item, request: Text | Image) -> Asked:
    """The distribution over a head's labels."""
    return Asked(item, head=request)


def log_probabilities(model, asked: Sequence[Asked]) -> list[torch.Tensor]:
    """Of each item: float32 [places, vocabulary], [1, choices] or [1, labels]; one forward pass."""
    device = next(model.parameters()).device
    if asked[0].head is not None:
        inputs = before_head(model, asked)
        return list(model(**inputs, **without_cache(model)).logits.float().log_softmax(-1)[:, None])
    rows = [(one.prompt, answer) for one in asked for answer in one.answers]
    logits = iter(_logits(model, rows, device))
    found = []
    for one in asked:
        of_rows = [next(logits).log_softmax(-1) for _ in one.answers]
        if not one.choose:
            found += of_rows
            continue
        sums = []
        for answer, row in zip(one.answers, of_rows):
            sums.append(row.gather(-1, torch.tensor(answer, device=device)[:, None]).sum())
        found.append(torch.stack(sums).log_softmax(-1)[None])
    return found


def before_head(model, asked: Sequence[Asked]) -> dict[str, torch.Tensor]:
    """Inputs of a forward whose logits are a head's, a row of each item."""
    heads, device = [one.head for one in asked], next(model.parameters()).device
    if isinstance(heads[0], Image):
        return {"pixel_values": torch.stack([head.pixels for head in heads]).to(device)}
    return _padded(model, [head.tokens for head in heads], device)


def _padded(model, rows: Sequence[Tokens], device) -> dict[str, torch.Tensor]:
    """With the model's own padding: a causal classifier finds the end of a text by it."""
    return right_padded(list(rows), getattr(model.config, "pad_token_id", None) or 0, device)


def batches(asked: Sequence[int], of: Sequence[Asked], limit: int) -> Iterator[list[int]]:
    """Places of items, in order, in batches of at most `limit` padded tokens; one item is never divided."""
    batch: list[int] = []
    rows = width = 0
    for at in asked:
        wider = max(width, of[at].width)
        if batch and (rows + of[at].rows) * wider > limit:
            yield batch
            batch, rows, wider = [], 0, of[at].width
        batch.append(at)
        rows, width = rows + of[at].rows, wider
    if batch:
        yield batch


def _logits(model, rows: Sequence[tuple[Tokens, Tokens]], device) -> list[torch.Tensor]:
    """Where each token of a row's answer is predicted, or the next token is where there is none: float32 [places,
    vocabulary]. The last token is never an input: nothing follows it."""
    counts = [max(1, len(answer)) for _, answer in rows]
    if is_pair(model):
        start = start_token(model)
        fed = [(start, *answer[:-1]) for _, answer in rows]
        firsts = [0] * len(rows)
        decoded = _padded(model, fed, device)["input_ids"]
        inputs: dict[str, Any] = _padded(model, [prompt for prompt, _ in rows], device)
        inputs["decoder_input_ids"] = decoded
    else:
        fed = [(*prompt, *answer[:-1]) for prompt, answer in rows]
        firsts = [len(prompt) - 1 for prompt, _ in rows]
        inputs = _padded(model, fed, device)
    width = max(map(len, fed))
    places = []
    for row, (first, count) in enumerate(zip(firsts, counts)):
        places += range(row * width + first, row * width + first + count)
    logits = logits_at(model, torch.tensor(places, device=device), **without_cache(model), **inputs)
    return list(logits.split(counts))


def _text(item: Item, request: Choices | Start) -> Choices | Start:
    if request.image:
        raise ItemsError(place(item), "an image in a prompt", "texts alone, or images of a classifier, to learn from")
    return request
