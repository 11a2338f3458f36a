"""Kind `rank`: which of several texts has the embedding most like the prompt's?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from merge3.errors import ItemsError
from merge3.tasks import choice
from merge3.tasks.items import Item, place, shown
from merge3.tasks.prompts import Reader
from merge3.tasks.requests import Texts


def answer(given, choices: Sequence[str], metric: str, where: str) -> int:
    """The right text's index, of an index or the text itself. Raises ItemsError for fewer than two texts, equal ones,
    or an answer that is none of them."""
    return choice.answer(given, choices, metric, where)


def request(item: Item, reader: Reader) -> Texts:
    """The prompt's tokens and each choice's, after the prompts that the checkpoint has for queries and for texts.
    Raises ItemsError where a text has no tokens, two choices have the same, or a chat template is wanted."""
    if reader.chat:
        found = f"{place(item)} is embedded, not continued"
        raise ItemsError("apply_chat_template", found, "false: embedders have prompts of their own")
    says = reader.sentences
    texts = [(f"prompt {shown(item.prompt)}", says.query, item.prompt)]
    texts += [(f"choices[{i}] {shown(text)}", says.passage, text) for i, text in enumerate(item.choices)]
    tokens, skipped = [], []
    for name, before, text in texts:
        found, left_out = reader.embedded(before, text)
        if len(found) <= left_out:
            raise ItemsError(place(item), f"{name} without tokens", "text the tokenizer knows")
        if tokens and found in tokens[1:]:
            also = texts[1 + tokens[1:].index(found)][0]
            found = f"{also} and {name} have the same tokens"
            raise ItemsError(place(item), found, "choices that the tokenizer tells apart")
        tokens.append(found)
        skipped.append(left_out)
    return Texts(tuple(tokens), tuple(skipped), says.poolings)


def acc(item: Item, found: torch.Tensor) -> float:
    """1.0 if the right text's cosine to the prompt is above all others', else 0.0. found: embeddings
    [1 + texts, width], the prompt's first."""
    return float(_place(item, found) == 1)


def mrr(item: Item, found: torch.Tensor) -> float:
    """1 / the right text's place among all, the most similar first; of equal ones it is the last."""
    return 1.0 / _place(item, found)


METRICS = {"acc": acc, "mrr": mrr}


def _place(item: Item, found: torch.Tensor) -> int:
    unit = torch.nn.functional.normalize(found.double(), dim=1)
    cosines = unit[1:] @ unit[0]
    return int((cosines >= cosines[item.answer]).sum())
