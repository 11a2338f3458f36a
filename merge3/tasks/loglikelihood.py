"""Kind `loglikelihood`: documents of lm-eval's that ask how likely texts are after others, its multiple choice too."""

from __future__ import annotations

from collections.abc import Sequence

from merge3.tasks import documents
from merge3.tasks.documents import Raw
from merge3.tasks.items import Item
from merge3.tasks.prompts import Reader
from merge3.tasks.requests import Choices, Likelihoods


def answer(given, choices: Sequence[str], metric: str, where: str) -> str:
    """None; see documents.no_answer."""
    return documents.no_answer(given, choices, metric, where)


def request(item: Item, reader: Reader) -> tuple[Choices, ...]:
    """One request per context, with all that is asked after it. Raises ItemsError where a text has no tokens."""
    requests = []
    for own in documents.by_context(item):
        continuations = [item.asks[at][1] for at in own]
        start, found = documents.following(item, reader, item.asks[own[0]][0], continuations)
        requests.append(Choices(start, found, greedy=True))
    return tuple(requests)


def raw(item: Item, found: Sequence[Likelihoods]) -> Raw:
    """(log-likelihood, whether greedy decoding would write it) of every ask, in order."""
    answers: list[tuple[float, bool] | None] = [None] * len(item.asks)
    for own, likelihoods in zip(documents.by_context(item), found):
        for at, value, greedy in zip(own, likelihoods.sums.tolist(), likelihoods.greedy.tolist()):
            answers[at] = value, greedy
    return tuple(answers)
