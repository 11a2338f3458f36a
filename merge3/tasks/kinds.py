"""Item kinds, one row each: how an item's answer is checked, what it asks of a model, and what the result is worth.

A new kind is a file with these functions and a row here; a kind is known by name nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from merge3.tasks import choice, classify, generate
from merge3.tasks.items import Item
from merge3.tasks.prompts import Reader


def as_it_is(item: Item, labels: Mapping[str, int]) -> Item:
    """What `resolve` does where results name the answer as the item does."""
    return item


@dataclass(frozen=True)
class Kind:
    """One kind's functions.

    keys: what it reads of an item, beside what all have (id, task, kind, prompt, answer, metric).
    metrics: name -> metric(item, result), a response in [0, 1]; the first is the default.
    answer: (the answer as given, choices, metric, where) -> as the Item holds it, which it takes again as it is (items
    are checked anew where they arrive). Raises ItemsError naming `where`.
    request: (item, reader) -> what the model is asked. Raises ItemsError naming the item.
    asks: which of an LM's functions takes such requests.
    resolve: (item, labels of the head) -> the item as its results will name the answer. Raises ItemsError.
    """

    keys: tuple[str, ...]
    metrics: Mapping[str, Callable[[Item, Any], float]]
    answer: Callable[[Any, Sequence[str], str, str], int | str | tuple[str, ...]]
    request: Callable[[Item, Reader], Any]
    asks: Literal["loglikelihoods", "generate", "logits"]
    resolve: Callable[[Item, Mapping[str, int]], Item] = as_it_is

    @property
    def default(self) -> str:
        """The metric of an item that names none."""
        return next(iter(self.metrics))

    def response(self, item: Item, result: Any) -> float:
        """What a result is worth by the item's metric: in [0, 1]."""
        return self.metrics[item.metric or self.default](item, result)


KINDS: dict[str, Kind] = {
    "choice": Kind(("choices", "image"), choice.METRICS, choice.answer, choice.request, "loglikelihoods"),
    "generate": Kind(("max_tokens", "stop", "image"), generate.METRICS, generate.answer, generate.request, "generate"),
    "classify": Kind(("image",), classify.METRICS, classify.answer, classify.request, "logits", classify.resolve),
}
