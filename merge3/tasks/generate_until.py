"""Kind `generate_until`: documents of lm-eval's that ask for a greedy continuation."""

from __future__ import annotations

from collections.abc import Sequence

from merge3.errors import ItemsError
from merge3.tasks import documents
from merge3.tasks.documents import Raw
from merge3.tasks.items import Item, place, shown
from merge3.tasks.prompts import Reader
from merge3.tasks.requests import Start, Written


def answer(given, choices: Sequence[str], metric: str, where: str) -> str:
    """None; see documents.no_answer."""
    return documents.no_answer(given, choices, metric, where)


def request(item: Item, reader: Reader) -> tuple[Start, ...]:
    """The contexts' tokens, and where each text ends at the latest. Raises ItemsError where one has none."""
    starts, end = [], documents.stop_tokens(reader, item.stop)
    for context, _ in item.asks:
        tokens = documents.encoded(reader, context, reader.tokenizer.bos_token)
        if not tokens:
            raise ItemsError(place(item), f"context {shown(context)} without tokens", "text the tokenizer knows")
        starts.append(Start(tokens, item.max_tokens, item.stop, end))
    return tuple(starts)


def raw(item: Item, found: Sequence[Written]) -> Raw:
    """The text written after every context."""
    return tuple(written.text for written in found)
