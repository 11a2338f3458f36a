"""Ask a live model a fixed set of items; get one response (0..1) per item, in order."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch

from merge3.errors import ItemsError
from merge3.tasks.choice import ChoiceScorer, PlainChoiceScorer
from merge3.tasks.classify import ClassifyScorer, ImageScorer
from merge3.tasks.forward import LogitsError
from merge3.tasks.generate import GenerateScorer
from merge3.tasks.items import Item, place
from merge3.tasks.prompts import Group, encode, positions

BATCH_TOKENS = 4096  # padded tokens per forward
# Found once per live model: a search that renews its items prepares new ones every generation.
_TOKENIZERS: WeakKeyDictionary = WeakKeyDictionary()  # model -> {folder: tokenizer}
_HONOURS: WeakKeyDictionary = WeakKeyDictionary()  # model -> {has a prefix: honours masks of one's own}


class Scorer:
    """Items tokenised, batched and masked once for a model's architecture; `score` as often as it changes.

    model: the live model (its weights do not matter here). folder: where its tokenizer files are.
    """

    def __init__(self, items: Sequence[Item], model, folder: str | Path, chat: bool = False, batch_tokens: int = BATCH_TOKENS):
        self.items = list(items)
        config, device, dtype = model.config, next(model.parameters()).device, next(model.parameters()).dtype
        self.scorers = []
        images = [(i, item) for i, item in enumerate(items) if item.image]
        texts = [item for item in items if not item.image]
        labels = dict(getattr(config, "label2id", None) or {})
        _check_kinds(items, model)
        if images:
            self.scorers.append(ImageScorer(images, device, Path(folder), labels))
        if not texts:
            return
        if images:
            raise ItemsError("items", "texts and images together", "one kind of input per run")
        tokenizers = _TOKENIZERS.setdefault(model, {})
        if str(folder) not in tokenizers:
            tokenizers[str(folder)] = load_tokenizer(folder)
        tokenizer = tokenizers[str(folder)]
        pad = tokenizer.pad_token_id or 0
        limit = positions(config)
        for group in encode(items, tokenizer, "choice", chat, limit):
            self.scorers.append(_choice(group, model, device, dtype, batch_tokens, pad))
        end = model.generation_config.eos_token_id if getattr(model, "generation_config", None) else None
        end = end if end is not None else tokenizer.eos_token_id
        end = tuple(end) if isinstance(end, (list, tuple)) else (end,) if end is not None else ()
        for group in encode(items, tokenizer, "generate", chat, limit):
            self.scorers.append(GenerateScorer(group, device, tokenizer, batch_tokens, end, pad))
        for group in encode(items, tokenizer, "classify", chat, limit):
            self.scorers.append(ClassifyScorer(group, device, batch_tokens, pad, labels))

    def score(self, model) -> np.ndarray:
        """Responses of the model as it is now: float64 [items]. Raises LogitsError where it has no answer."""
        responses = np.full(len(self.items), np.nan)
        for scorer in self.scorers:
            for index, value in scorer.score(model).items():
                responses[index] = value
        assert not np.isnan(responses).any(), "an item was left without a response"
        return responses


def load_tokenizer(folder: str | Path):
    """The checkpoint's tokenizer; ItemsError if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ItemsError(folder, f"no usable tokenizer ({reason})", "tokenizer files beside the base model") from None


def _choice(group: Group, model, device, dtype: torch.dtype, batch_tokens: int, pad: int) -> ChoiceScorer:
    """The shared scorer if this architecture honours its masks (tried on a few items), else the plain one."""
    known = _HONOURS.setdefault(model, {})
    if bool(group.prefix) not in known:
        honours = _honours_masks(Group(group.prefix, group.prompts[:3]), model, device, dtype, batch_tokens, pad)
        if honours is None:  # these weights cannot tell: the plain one is right for any, and the next items try again
            return PlainChoiceScorer(group, device, dtype, batch_tokens, pad)
        known[bool(group.prefix)] = honours
        if not honours:
            warnings.warn(
                f"{type(model).__name__} does not honour masks of one's own: each choice is scored in a row of its own, "
                "without a shared prefix, which is slower",
                stacklevel=2,
            )
    scorer = ChoiceScorer if known[bool(group.prefix)] else PlainChoiceScorer
    return scorer(group, device, dtype, batch_tokens, pad)


def _honours_masks(sample: Group, model, device, dtype: torch.dtype, batch_tokens: int, pad: int) -> bool | None:
    """None where the model's weights give no finite logits, whatever the mask."""
    try:
        plain = PlainChoiceScorer(sample, device, dtype, batch_tokens, pad).loglikelihoods(model)
    except LogitsError:
        return None
    try:
        shared = ChoiceScorer(sample, device, dtype, batch_tokens, pad).loglikelihoods(model)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return False
    by_index = {index: values for index, _, values in shared}
    return all(torch.allclose(v, by_index[i], atol=1e-3 if dtype == torch.float32 else 0.1) for i, _, v in plain)


def _check_kinds(items: Sequence[Item], model) -> None:
    classifier = "Classification" in type(model).__name__
    for item in items:
        if (item.kind == "classify") != classifier:
            raise ItemsError(
                place(item), f"kind {item.kind!r} for a {type(model).__name__}",
                "classify for classification heads, choice or generate for language models",
            )  # fmt: skip
