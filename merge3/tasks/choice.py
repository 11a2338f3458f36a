"""Kind `choice`: the likeliest of several texts after a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from merge3.errors import ItemsError
from merge3.tasks.images import seen
from merge3.tasks.items import Item, place, shown
from merge3.tasks.prompts import Reader
from merge3.tasks.requests import Choices, Likelihoods


def answer(given, choices: Sequence[str], metric: str, where: str) -> int:
    """The right choice's index, of an index or the choice itself. Raises ItemsError for fewer than two choices, equal
    ones, or an answer that is none of them."""
    if len(choices) < 2:
        raise ItemsError(where, f"{len(choices)} choices", "at least 2")
    for i, choice in enumerate(choices):
        if choice in choices[:i]:
            found = f"choices[{choices.index(choice)}] and choices[{i}] are both {shown(choice)}"
            raise ItemsError(where, found, "different choices: of equal ones neither is the likelier")
    if isinstance(given, str) and given in choices:
        return choices.index(given)
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(choices):
        return given
    expected = f"one of the choices, or an index below {len(choices)}"
    raise ItemsError(where, f"answer is {shown(given)}", expected, _meant(given, choices))


def request(item: Item, reader: Reader) -> Choices:
    """The prompt's tokens, and each choice's as they follow it. Raises ItemsError where a prompt or a choice has none,
    or two choices have the same."""
    text, tokens, *image = seen(item, reader) if item.image else reader.prompt(item)
    before = reader.tokens(text) if image else tokens  # with the image's places not yet filled
    choices = tuple(reader.following(text, before, choice) for choice in item.choices)
    name = lambda i: f"choices[{i}] {shown(item.choices[i])}"
    for i, choice in enumerate(choices):
        if not choice:
            raise ItemsError(place(item), f"{name(i)} without tokens", "text the tokenizer knows")
        if choice in choices[:i]:
            found = f"{name(choices.index(choice))} and {name(i)} have the same tokens"
            raise ItemsError(place(item), found, "choices that the tokenizer tells apart")
    return Choices(tokens, choices, image=image[0] if image else {})


def target(item: Item, asked: Choices, reader: Reader) -> tuple[int, ...]:
    """The right choice's token ids."""
    return asked.choices[item.answer]


def acc_norm(item: Item, found: Likelihoods) -> float:
    """1.0 if the right choice has the highest log-likelihood per token, else 0.0."""
    return _right((found.sums / found.lengths).float(), item)


def acc(item: Item, found: Likelihoods) -> float:
    """1.0 if the right choice has the highest log-likelihood in total, else 0.0."""
    return _right(found.sums.float(), item)


METRICS = {"acc_norm": acc_norm, "acc": acc}


def _right(values: torch.Tensor, item: Item) -> float:
    best = int(values.argmax())
    # Where every choice is impossible none is the likeliest.
    return float(best == item.answer and bool(values[best] > -torch.inf))


def _meant(given, choices: Sequence[str]) -> str:
    """A hint where an answer is nearly one: a letter, a number as text, a choice but for its white space."""
    if not isinstance(given, str):
        return ""
    for i, choice in enumerate(choices):
        if given.strip() == choice.strip():
            return f"choices[{i}] is {shown(choice)}"
        if given.strip() in (str(i), chr(ord("A") + i)):
            return f"index {i}, a number, if choices[{i}] is meant"
    return ""
