"""A live transformers model as tasks ask it, apart from what its answers are worth.

Each of the four functions takes requests, prepares once what no weight changes (batches, masks, the prefix that the
requests share) and returns a Question: asked again whenever the weights have changed. Another engine that offers the
same can stand in its place.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from merge3.errors import ItemsError
from merge3.tasks.decoder import end_tokens
from merge3.tasks.embeddings import Embeddings
from merge3.tasks.forward import likeliest, right_padded
from merge3.tasks.likelihoods import PlainRows, SharedRows
from merge3.tasks.requests import (
    Choices,
    Image,
    Likelihoods,
    Pass,
    Question,
    Start,
    Text,
    Texts,
    batches,
    one_by_one,
    share_prefix,
)
from merge3.tasks.seq2seq import PairedRows, is_pair
from merge3.tasks.shared_prefix import possible
from merge3.tasks.state import state
from merge3.tasks.vision import SeenChoices, SeenContinuations
from merge3.tasks.writing import continuations

BATCH_TOKENS = 4096  # padded tokens per forward
# Of choices on a CPU: what a layer makes of more leaves its caches, which takes longer than what larger products save.
CACHED_TOKENS = 1024
IMAGES = 64  # per forward
# Found once per live model: a search that renews its items prepares new ones every generation.
_ROWS: WeakKeyDictionary = WeakKeyDictionary()  # model -> {has a prefix: what makes the rows of choices}


def has_head(model) -> bool:
    """Whether a model ends in a classification head, which gives logits of a whole input and continues no text."""
    name = type(model).__name__
    return "Classification" in name and "TokenClassification" not in name and "FrameClassification" not in name


def writes(model) -> bool:
    """Whether a model continues a text: a causal one, or one with an encoder for texts and a decoder."""
    return model.can_generate() and model.main_input_name == "input_ids" and not has_head(model)


def is_encoder(model) -> bool:
    """Whether a model ends in states, without any head, and reads nothing but a text: it gives embeddings."""
    inputs = inspect.signature(type(model).forward).parameters
    others = {"pixel_values", "input_features", "decoder_input_ids"} & set(inputs)
    return getattr(model, "base_model", None) is model and "input_ids" in inputs and not others


HEADS = "classification heads"
# Who answers an LM's function, and which models they are; the functions that are not here are language models'.
_ANSWER = {"logits": (HEADS, has_head), "embeddings": ("encoders", is_encoder)}


def who_answers(function: str) -> tuple[str, Callable[[Any], bool]]:
    """(what models that answer one of an LM's functions are called, whether a model is one)"""
    return _ANSWER.get(function, ("language models", writes))


class LM:
    """What can be asked of a live model.

    model: its weights may change between questions, its architecture, device and dtype do not. tokenizer: None where
    only images are asked. batch_tokens: padded tokens per forward.

        question = LM(model, tokenizer).generate([Start((17, 4), max_tokens=8)])
        for index, written in question(model): ...
    """

    def __init__(self, model, tokenizer=None, batch_tokens: int = BATCH_TOKENS):
        first = next(model.parameters())
        self.model, self.device, self.dtype = model, first.device, first.dtype
        self.tokenizer, self.batch_tokens = tokenizer, batch_tokens
        self.pad = 0 if tokenizer is None else tokenizer.pad_token_id or 0
        self.end = frozenset() if tokenizer is None else end_tokens(model, tokenizer)

    def loglikelihoods(self, requests: Sequence[Choices]) -> Question:
        """How likely each choice is after its prompt: results are Likelihoods.

        requests: all with an image, or none. Without, choices of a request stand side by side in one row where this
        architecture honours masks of one's own (tried on a few requests, and a warning if not), else each in a row of
        its own. Of a model with an encoder and a decoder, the encoder reads each prompt once.
        """
        if requests[0].image:
            return SeenChoices(requests, self.device, self.dtype, self.batch_tokens, self.pad)
        if is_pair(self.model):
            return PairedRows(requests, self.model, self.device, self.batch_tokens, self.pad)
        known = state(self.model)
        if not known.causal:
            name = type(self.model).__name__
            raise ItemsError("items", f"choices for a {name}, whose tokens see those after them", "items it writes")
        prefix, rest = share_prefix(requests)
        # With a mask of one's own a layer looks back beyond its window.
        shares = known.shares(max(request.length()[0] for request in requests))
        rows = self._rows(prefix, rest) if shares else PlainRows
        limit = min(self.batch_tokens, CACHED_TOKENS) if self.device.type == "cpu" else self.batch_tokens
        return rows(prefix, rest, self.device, self.dtype, limit, self.pad)

    def generate(self, requests: Sequence[Start]) -> Question:
        """What follows each prompt, greedily: results are Written. As above, all with an image or none."""
        if requests[0].image:
            asking = self.device, self.dtype, self.tokenizer, self.end
            return SeenContinuations(requests, *asking, self.batch_tokens, self.pad)
        how = self.tokenizer, self.end, self.device, self.batch_tokens, self.pad
        return continuations(self.model, requests, *how)

    def logits(self, requests: Sequence[Text] | Sequence[Image]) -> Question:
        """What the head says of texts or images: results are logits [labels] in the model's dtype, on the CPU."""
        prepared = []
        if isinstance(requests[0], Image):
            for start in range(0, len(requests), IMAGES):
                part = requests[start : start + IMAGES]
                pixels = torch.stack([request.pixels for request in part]).to(self.device)
                prepared.append((range(start, start + len(part)), {"pixel_values": pixels}))
            return Heads(prepared)
        # As elsewhere a shared prefix does not count for a batch's tokens; a head is given all of a text.
        _, rest = share_prefix(requests)
        for batch in batches(rest, lambda request: len(request.tokens), self.batch_tokens):
            rows = [requests[index].tokens for index, _ in batch]
            prepared.append(([index for index, _ in batch], right_padded(rows, self.pad, self.device)))
        return Heads(prepared)

    def embeddings(self, requests: Sequence[Texts]) -> Question:
        """Where an encoder places texts: results are embeddings, float32 [a request's texts, width], on the CPU."""
        caches = "use_cache" in inspect.signature(type(self.model).forward).parameters
        return Embeddings(requests, self.device, self.batch_tokens, self.pad, use_cache=not caches)

    def _rows(self, prefix: tuple[int, ...], requests: Sequence[Choices]) -> Callable[..., Question]:
        """The fastest rows by which this architecture gives what it gives by plain ones, which are right for any."""
        known = _ROWS.setdefault(self.model, {})
        if bool(prefix) not in known:
            arguments = (prefix, requests[:3], self.device, self.dtype, self.batch_tokens, self.pad)
            plain = dict(PlainRows(*arguments)(self.model))
            if None in plain.values():  # these weights cannot tell: the next requests try again
                return PlainRows
            # Choices side by side would all change a state: that a mask changes little is then no proof.
            ways = [SharedRows] if state(self.model).keys else []
            if ways and prefix and possible(self.model):
                ways.insert(0, partial(SharedRows, once=True))
            known[bool(prefix)] = next((rows for rows in ways if self._agree(rows(*arguments), plain)), PlainRows)
            if known[bool(prefix)] is PlainRows:
                warnings.warn(
                    f"{type(self.model).__name__} does not honour masks of one's own: each choice is scored in a row "
                    "of its own, without a shared prefix, which is slower",
                    stacklevel=2,
                )
        return known[bool(prefix)]

    def _agree(self, rows: Question, plain: dict[int, Likelihoods]) -> bool:
        """Whether rows give what plain ones did."""
        try:
            shared = dict(rows(self.model))
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
            return False
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.1  # per token: long choices differ by more in all
        for index, expected in plain.items():
            found = shared[index]
            if found is None:
                return False
            difference = found.sums / found.lengths, (expected.sums / expected.lengths).float()
            if not torch.allclose(*difference, atol=tolerance):
                return False
        return True


class Heads:
    """Batches of texts or images before a classification head. A Question whose results are logits."""

    def __init__(self, prepared: list[tuple[Sequence[int], dict[str, torch.Tensor]]]):
        self.batches = prepared

    @torch.inference_mode()
    def __call__(self, model):
        """(index of a request, its logits [labels], None where they are NaN or infinite)"""
        yield from one_by_one(self.passes(model))

    def passes(self, model) -> list[Pass]:
        """See InPasses: a batch each."""
        passes = []
        for indices, inputs in self.batches:
            positions = inputs["input_ids"].numel() if "input_ids" in inputs else _patches(model.config) * len(indices)
            passes.append(Pass(partial(self._ask, model, indices, inputs), positions=positions))
        return passes

    def _ask(self, model, indices: Sequence[int], inputs: dict[str, torch.Tensor]) -> list[tuple[int, Any]]:
        logits = model(**inputs).logits.cpu()
        bests = likeliest(logits).tolist()
        return [(index, None if best < 0 else row) for index, row, best in zip(indices, logits, bests)]


def _patches(config: Any) -> int:
    """How many positions an image takes, about."""
    sides = getattr(config, "image_size", 224), getattr(config, "patch_size", 16)
    image, patch = (side[0] if isinstance(side, list | tuple) else side for side in sides)
    return (image // max(patch, 1)) ** 2 + 1
