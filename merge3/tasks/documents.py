"""Documents of lm-eval's tasks as a model is asked them: their texts as tokens, as lm-eval's own HFLM encodes them.

A document is an item with asks, pairs of texts, in place of a prompt and an answer. What its answers are worth only
lm-eval can say, in the driver's process; here they stay raw.
"""

from __future__ import annotations

from collections.abc import Sequence

from merge3.errors import ItemsError
from merge3.tasks.items import Item, place, shown
from merge3.tasks.prompts import Reader

DEFAULT_LENGTH = 2048  # positions that HFLM assumes where neither model nor tokenizer names any
_UNLIMITED = 10**9  # a tokenizer without a limit of its own names 10 ** 30

# What a document's asks come to, one entry per ask: (log-likelihood, whether greedy decoding gives it), a
# log-likelihood, or a text.
Raw = tuple


def no_answer(given, choices: Sequence[str], metric: str, where: str) -> str:
    """Documents have no answer of ours. Raises ItemsError for one."""
    if given not in ("", None):
        raise ItemsError(where, f"answer is {shown(given)}", "none: lm-eval's task judges a document's answers")
    return ""


def prefix_token(item: Item, reader: Reader) -> int:
    """The token that stands before a text without context: begin-of-text, else end-of-text. Raises ItemsError."""
    token = _first_token(reader)
    if token is None:
        raise ItemsError(place(item), "a tokenizer without begin-of-text and end-of-text tokens", "one of the two")
    return token


def _first_token(reader: Reader) -> int | None:
    begin = reader.tokenizer.bos_token_id
    return reader.tokenizer.eos_token_id if begin is None else begin


def _first_text(reader: Reader) -> str | None:
    token = _first_token(reader)
    return None if token is None else reader.tokenizer.decode(token)


def encoded(reader: Reader, text: str, first: str | None) -> tuple[int, ...]:
    """Token ids with the tokenizer's special tokens, unless the text begins with `first`: a chat template writes
    them itself."""
    special = not (first and text.startswith(first))
    return tuple(reader.tokenizer(text, add_special_tokens=special)["input_ids"])


def following(
    item: Item, reader: Reader, context: str, continuations: Sequence[str]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """(the context's tokens, each continuation's as they follow it). White space at the end of a context belongs to
    what follows. Raises ItemsError where one has no tokens."""
    kept = context.rstrip()
    texts = [context[len(kept) :] + continuation for continuation in continuations]
    alone = lambda text: tuple(reader.tokenizer(text, add_special_tokens=False)["input_ids"])
    if context == "":
        (more,) = (alone(text) for text in texts)  # one at a time: see by_context
        token = prefix_token(item, reader)
        start, found = (more[:1], (more[1:],)) if more[:1] == (token,) else ((token,), (more,))
    else:
        first = _first_text(reader)
        start = encoded(reader, kept, first)
        whole = lambda text: encoded(reader, kept + text, first)[len(start) :]
        found = tuple(alone(text) if reader.apart else whole(text) for text in texts)
    if not start:
        raise ItemsError(place(item), f"{shown(context)} without tokens", "text the tokenizer knows")
    for text, more in zip(texts, found):
        if not more:
            raise ItemsError(place(item), f"{shown(text)} without tokens", "text the tokenizer knows")
    return start, found


def by_context(item: Item) -> list[list[int]]:
    """Indices of the asks that share a context, which is computed once for all of them; those without any alone."""
    groups: dict[object, list[int]] = {}
    for at, (context, _) in enumerate(item.asks):
        groups.setdefault(context or at, []).append(at)
    return list(groups.values())


def longest(reader: Reader) -> int:
    """How many positions a window of a long text has."""
    if reader.limit is not None:
        return reader.limit
    limit = getattr(reader.tokenizer, "model_max_length", None)
    return limit if isinstance(limit, int) and limit < _UNLIMITED else DEFAULT_LENGTH


def stop_tokens(reader: Reader, stop: Sequence[str]) -> tuple[int, ...]:
    """The tokens that end a text beside the model's own: the tokenizer's end-of-text, and stop texts that are special
    tokens, which no decoded text shows."""
    tokenizer = reader.tokenizer
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in stop:
        if text in tokenizer.all_special_tokens:
            found.append(tokenizer.convert_tokens_to_ids(text))
    return tuple(dict.fromkeys(found))
