"""Ask a live model a fixed set of items; get one response (0..1) per item, in order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from merge3.errors import ItemsError
from merge3.tasks.documents import Raw
from merge3.tasks.forward import LogitsError
from merge3.tasks.items import Item, place
from merge3.tasks.kinds import KINDS, Kind, in_files, writes
from merge3.tasks.lm import BATCH_TOKENS, HEADS, LM, has_head, who_answers
from merge3.tasks.prompts import Reader, load_tokenizer, positions
from merge3.tasks.requests import Pass, Question, taken
from merge3.tasks.seq2seq import is_pair
from merge3.tasks.vision import refusal, sees, shapes_of

# Found once per live model: a search that renews its items prepares new ones every generation.
_TOKENIZERS: WeakKeyDictionary = WeakKeyDictionary()  # model -> {folder: tokenizer}


@dataclass(frozen=True)
class Asked:
    """The items of one kind and task, resolved, with their indices among all, and the question that asks them.
    owners: which of the items each request is of, in the items' order."""

    kind: Kind
    indices: list[int]
    items: list[Item]
    owners: list[int]
    question: Question


class Answers(NamedTuple):
    """responses: float64 [items], NaN where a judge has to say; raw: position -> what it is told, for those.
    lengths: tokens written for each, the mean where an item asks for several texts, NaN where it asks for none."""

    responses: np.ndarray
    raw: dict[int, Raw]
    lengths: np.ndarray


class Scorer:
    """Items tokenised, batched and masked once for a model's architecture; `score` as often as it changes.

    model: the live model (its weights do not matter here). folder: where its tokenizer files are. chat: wrap prompts in
    the chat template; system: its system message. batch_tokens: padded tokens per forward. Raises ItemsError naming an
    item that cannot be asked.

        scorer = Scorer(read_items("items.jsonl"), model, "checkpoint")
        responses = scorer.score(model)
    """

    def __init__(
        self,
        items: Sequence[Item],
        model,
        folder: str | Path,
        chat: bool = False,
        batch_tokens: int = BATCH_TOKENS,
        system: str = "",
    ):
        self.items = list(items)
        reader = reader_of(items, model, folder, chat, system)
        lm = LM(model, reader.tokenizer, batch_tokens)
        self.asked = [_asked(own, items, reader, lm, model.config) for own in _groups(items)]

    def score(self, model) -> np.ndarray:
        """Responses of the model as it is now: float64 [items]. Raises LogitsError where it has no answer, ItemsError
        where items need a judge."""
        answers = self.ask(model)
        for at in answers.raw:
            raise ItemsError(place(self.items[at]), f"kind {self.items[at].kind!r}", "a judge; see `ask`")
        return answers.responses

    def ask(self, model) -> Answers:
        """What the model as it is now answers. Raises LogitsError where it has no answer."""
        return self.judged(asked.question(model) for asked in self.asked)

    @property
    def in_passes(self) -> bool:
        """Whether no question waits for answers before it goes on, as texts do that are written."""
        return all(hasattr(asked.question, "passes") for asked in self.asked)

    def passes(self, model) -> list[list[Pass]]:
        """The forwards that ask each question, where all are `in_passes`; what they tell is for `judged`."""
        return [asked.question.passes(model) for asked in self.asked]

    def judged(self, told: Iterable[Iterable[tuple[int, Any]]]) -> Answers:
        """What answers are worth. told: of each question in turn, (index of a request, its result). Raises LogitsError
        where there is none."""
        responses, raw, lengths = np.full(len(self.items), np.nan), {}, np.full(len(self.items), np.nan)
        for asked, answered in zip(self.asked, told):
            results: list[Any] = [None] * len(asked.owners)
            for at, result in answered:
                item = asked.items[asked.owners[at]]
                if result is None:
                    what = "states" if asked.kind.asks == "embeddings" else "logits"
                    hint = "weights that overflow, or a dtype too small for them"
                    raise LogitsError(place(item), f"the model's {what} are NaN or infinite here", "numbers", hint)
                results[at] = result
            own: dict[int, list[Any]] = {}
            for owner, result in zip(asked.owners, results):
                own.setdefault(owner, []).append(result)
            for owner, found in own.items():
                index, item = asked.indices[owner], asked.items[owner]
                if writes(item):
                    lengths[index] = sum(len(written.tokens) for written in found) / len(found)
                if asked.kind.raw is None:
                    responses[index] = asked.kind.response(item, found[0])
                else:
                    raw[index] = asked.kind.raw(item, found)
        assert np.isnan(responses).sum() == len(raw), "an item was left without a response"
        return Answers(responses, raw, lengths)


def reader_of(items: Sequence[Item], model, folder: str | Path, chat: bool = False, system: str = "") -> Reader:
    """What reads these items for a live model. Raises ItemsError for a kind that the model does not answer."""
    _check_kinds(items, model)
    if has_head(model) and len({bool(item.image) for item in items}) > 1:
        raise ItemsError("items", "texts and images together", "one kind of input per run")
    reads = any(not item.image or KINDS[item.kind].asks != "logits" for item in items)
    tokenizer = _tokenizer(model, folder) if reads else None
    return Reader(tokenizer, chat, Path(folder), positions(model.config), system, is_pair(model))


def _groups(items: Sequence[Item]) -> list[list[int]]:
    """Indices of the items of each kind, in the table's order, and task; those with an image for themselves."""
    groups = []
    for name in KINDS:
        by_task: dict[tuple[str, bool], list[int]] = {}
        for i, item in enumerate(items):
            if item.kind == name:
                by_task.setdefault((item.task, bool(item.image)), []).append(i)
        groups += by_task.values()
    return groups


def _asked(own: list[int], items: Sequence[Item], reader: Reader, lm: LM, config: Any) -> Asked:
    kind = KINDS[items[own[0]].kind]
    limit = positions(config, reader.folder if kind.asks == "embeddings" else None)
    labels = dict(getattr(config, "label2id", None) or {})
    resolved = [kind.resolve(items[i], labels) for i in own]
    requests, owners, tried = [], [], set()
    for owner, item in enumerate(resolved):
        for request in kind.requests(item, reader):
            longest, what = taken(request, reader.apart)
            if limit is not None and longest > limit:
                raise ItemsError(
                    place(item),
                    what,
                    f"at most {limit}, the model's positions",
                    "--skip-too-long leaves such items out; in a configuration `too_long: skip` or `truncate_left`",
                )
            if item.image and kind.asks != "logits" and (shapes := shapes_of(request)) not in tried:
                if reason := refusal(lm.model, request):
                    raise ItemsError(place(item), f"image {item.image} is one that the model cannot take ({reason})")
                tried.add(shapes)
            requests.append(request)
            owners.append(owner)
    return Asked(kind, own, resolved, owners, getattr(lm, kind.asks)(requests))


def _tokenizer(model, folder: str | Path):
    tokenizers = _TOKENIZERS.setdefault(model, {})
    if str(folder) not in tokenizers:
        tokenizers[str(folder)] = load_tokenizer(folder)
    return tokenizers[str(folder)]


def _check_kinds(items: Sequence[Item], model) -> None:
    """Heads are asked for their logits, encoders for their embeddings, language models for the rest; an image is for a
    kind that reads it."""
    answers = {asks: who_answers(asks)[1](model) for asks in {KINDS[item.kind].asks for item in items}}
    for item in items:
        kind = KINDS[item.kind]
        if not answers[kind.asks]:
            kinds: dict[str, list[str]] = {}
            for name, other in in_files().items():
                kinds.setdefault(who_answers(other.asks)[0], []).append(name)
            heads_first = sorted(kinds, key=HEADS.__ne__)
            expected = ", ".join(f"{' or '.join(kinds[who])} for {who}" for who in heads_first)
            raise ItemsError(place(item), f"kind {item.kind!r} for a {type(model).__name__}", expected)
        if item.image and "image" not in kind.keys:
            raise ItemsError(place(item), f"an image, and kind {item.kind!r}", "a kind that reads images")
        if item.image and kind.asks != "logits" and not sees(model):
            raise ItemsError(place(item), f"an image for a {type(model).__name__}", "a vision-language model")
