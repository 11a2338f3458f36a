"""Item kinds, one row each: how an item's answer is checked, what it asks of a model, and what the result is worth.

A new kind is a file with these functions and a row here; a kind is known by name nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from merge3.tasks import (
    choice,
    classify,
    forced,
    generate,
    generate_until,
    loglikelihood,
    loglikelihood_rolling,
    rank,
)
from merge3.tasks.documents import Raw
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
    target: (item, request, reader) -> what a supervised loss learns: token ids of the right answer as it follows the
    prompt, or the index of the right label. None: there is nothing to learn. Raises ItemsError naming the item.
    raw: of kinds whose answers a judge has to weigh, who stays with the driver: (item, the results of all its requests)
    -> what the judge is told. Such a kind has no metrics, several requests an item, and does not stand in item files.
    """

    keys: tuple[str, ...]
    metrics: Mapping[str, Callable[[Item, Any], float]]
    answer: Callable[[Any, Sequence[str], str, str], int | str | tuple[str, ...]]
    request: Callable[[Item, Reader], Any]
    asks: Literal["loglikelihoods", "generate", "logits", "embeddings"]
    resolve: Callable[[Item, Mapping[str, int]], Item] = as_it_is
    raw: Callable[[Item, Sequence[Any]], Raw] | None = None
    target: Callable[[Item, Any, Reader], tuple[int, ...] | int] | None = None

    @property
    def default(self) -> str:
        """The metric of an item that names none."""
        return next(iter(self.metrics))

    def requests(self, item: Item, reader: Reader) -> tuple:
        """All that an item asks of the model. Raises ItemsError naming the item."""
        found = self.request(item, reader)
        return (found,) if self.raw is None else found

    def response(self, item: Item, result: Any) -> float:
        """What a result is worth by the item's metric: in [0, 1]."""
        return self.metrics[item.metric or self.default](item, result)


def _in_files(own: ModuleType, keys: tuple[str, ...], asks: str, **more: Any) -> Kind:
    return Kind(keys, own.METRICS, own.answer, own.request, asks, **more)


def _judged(own: ModuleType, asks: str) -> Kind:
    return Kind((), {}, own.answer, own.request, asks, raw=own.raw)


KINDS: dict[str, Kind] = {
    "choice": _in_files(choice, ("choices", "image"), "loglikelihoods", target=choice.target),
    "generate": _in_files(generate, ("max_tokens", "stop", "image"), "generate", target=generate.target),
    "classify": _in_files(classify, ("image",), "logits", resolve=classify.resolve, target=classify.target),
    "rank": _in_files(rank, ("choices",), "embeddings"),
    "forced": _in_files(forced, (), "loglikelihoods"),
    "loglikelihood": _judged(loglikelihood, "loglikelihoods"),
    "loglikelihood_rolling": _judged(loglikelihood_rolling, "loglikelihoods"),
    "generate_until": _judged(generate_until, "generate"),
}


def writes(item: Item) -> bool:
    """Whether an item asks for a text."""
    return KINDS[item.kind].asks == "generate"


def in_files() -> dict[str, Kind]:
    """The rows that item files may name."""
    return {name: kind for name, kind in KINDS.items() if kind.raw is None}
