"""Kind `forced`: a text that the model is shown token by token (teacher forcing): would it write it, and how surely?

One forward tells, where writing takes one for every token. The text is taken as it stands, with the space before it
and, where that matters, with what ends it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from merge3.errors import ItemsError
from merge3.tasks.items import Item, place, shown
from merge3.tasks.prompts import Reader
from merge3.tasks.requests import Choices, Likelihoods


def answer(given, choices: Sequence[str], metric: str, where: str) -> tuple[str, ...]:
    """Accepted texts, of one text or a list of them. Raises ItemsError for what is neither."""
    texts = given if isinstance(given, (list, tuple)) else (given,)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ItemsError(where, f"answer is {shown(given)}", "a text, as it follows the prompt, or a list of them")
    return tuple(texts)


def request(item: Item, reader: Reader) -> Choices:
    """The prompt's tokens, and each accepted text's as they follow it. Raises ItemsError where one has none."""
    text, tokens = reader.prompt(item)
    found: dict[tuple[int, ...], None] = {}
    for accepted in item.answer:
        more = reader.following(text, tokens, accepted)
        if not more:
            raise ItemsError(place(item), f"answer {shown(accepted)} without tokens", "text the tokenizer knows")
        found[more] = None  # texts of the same tokens are one
    return Choices(tokens, tuple(found), greedy=item.metric != "margin", margins=True)


def exact(item: Item, found: Likelihoods) -> float:
    """1.0 if greedy decoding would write one of the accepted texts, else 0.0."""
    return float(bool(found.greedy.any()))


def margin(item: Item, found: Likelihoods) -> float:
    """p / (p + q) of the accepted text that is the surest, at its least sure token, q being the likeliest other one's
    chance there: 1/2 or more where `exact` is 1, 1/2 or less where it is 0."""
    ahead = float(found.margins.max())
    return 1.0 / (1.0 + math.exp(-ahead)) if ahead > -700.0 else 0.0  # there exp is no longer a float's


METRICS = {"exact": exact, "margin": margin}
