"""Kind `classify`: the argmax of a head over a text or an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from merge3.errors import ItemsError
from merge3.tasks.items import MOST, Item, place, shown
from merge3.tasks.prompts import Reader
from merge3.tasks.requests import Image, Text


def answer(given, choices: Sequence[str], metric: str, where: str) -> int | str:
    """A label or its index. Raises ItemsError for what is neither."""
    index = isinstance(given, int) and not isinstance(given, bool) and 0 <= given <= MOST
    if index or isinstance(given, str):
        return given
    raise ItemsError(where, f"answer is {shown(given)}", "a label or its index")


def request(item: Item, reader: Reader) -> Text | Image:
    """The prompt's tokens, or the image's pixels. Raises ItemsError where there are none."""
    if item.image:
        return Image(reader.pixels(item))
    _, tokens = reader.prompt(item)
    return Text(tokens)


def resolve(item: Item, labels: Mapping[str, int]) -> Item:
    """The item with its label's index in the head as the answer. labels: label -> index; none: any index will do.
    Raises ItemsError for a label or an index that the head does not have."""
    if isinstance(item.answer, int):
        if labels and not 0 <= item.answer < len(labels):
            raise ItemsError(place(item), f"answer is {item.answer}", f"an index below {len(labels)}")
        return item
    if item.answer not in labels:
        raise ItemsError(place(item), f"answer is {shown(item.answer)}", "one of " + ", ".join(labels))
    return replace(item, answer=labels[item.answer])


def target(item: Item, asked: Text | Image, reader: Reader) -> int:
    """The right label's index, of an item that `resolve` gave."""
    return item.answer


def acc(item: Item, found: torch.Tensor) -> float:
    """1.0 if the right label has the highest logit, else 0.0. found: logits [labels]."""
    return float(int(found.argmax()) == item.answer)


METRICS = {"acc": acc}
