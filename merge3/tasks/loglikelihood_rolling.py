"""Kind `loglikelihood_rolling`: documents of lm-eval's that ask how likely a whole text is, however long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from merge3.errors import ItemsError
from merge3.tasks import documents
from merge3.tasks.documents import Raw
from merge3.tasks.items import Item, place, shown
from merge3.tasks.prompts import Reader
from merge3.tasks.requests import Choices, Likelihoods


@dataclass(frozen=True)
class Window(Choices):
    """A piece of a text after the tokens before it. Its last token is predicted and never an input."""

    def length(self) -> tuple[int, str]:
        """(positions, what takes them)"""
        positions = len(self.tokens) + len(self.choices[0]) - 1
        return positions, f"a window of {positions} tokens"


def answer(given, choices: Sequence[str], metric: str, where: str) -> str:
    """None; see documents.no_answer."""
    return documents.no_answer(given, choices, metric, where)


def request(item: Item, reader: Reader) -> tuple[Window, ...]:
    """Windows that predict every token of every text once. Raises ItemsError where one has none."""
    prefix, windows = documents.prefix_token(item, reader), []
    for _, text in item.asks:
        tokens = documents.encoded(reader, text, reader.tokenizer.decode(prefix))
        if not tokens:
            raise ItemsError(place(item), f"{shown(text)} without tokens", "text the tokenizer knows")
        windows += [Window(before, (own,)) for before, own in _windows(tokens, prefix, documents.longest(reader))]
    return tuple(windows)


def raw(item: Item, found: Sequence[Likelihoods]) -> Raw:
    """The log-likelihood of the document's text: that of all its windows."""
    return (sum(float(likelihoods.sums[0]) for likelihoods in found),)


def _windows(tokens: tuple[int, ...], prefix: int, length: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(context, tokens to predict), inputs of at most `length` tokens. The first window is predicted from the prefix
    on; each other one takes as many tokens of context as it has room for, and one at least."""
    done = min(length, len(tokens))
    yield (prefix,), tokens[:done]
    while done < len(tokens):
        end = done + min(length, len(tokens) - done)
        yield tokens[end - length - 1 : done], tokens[done:end]
        done = end
