"""Greedy text from a live model, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from merge3.errors import BadInput, ItemsError
from merge3.tasks.decoder import end_tokens, greedy
from merge3.tasks.forward import LogitsError
from merge3.tasks.lm import writes
from merge3.tasks.prompts import Reader, load_tokenizer, positions
from merge3.tasks.requests import Start
from merge3.tasks.writing import continuations


@torch.inference_mode()
def continuation(model, folder: Path, prompt: str, max_tokens: int, chat: bool = False) -> Iterator[str]:
    """Pieces of the continuation, each at least one whole character. max_tokens: 0 for as many as fit, up to 64."""
    if not writes(model):
        raise BadInput("generate", f"a {type(model).__name__}", "a language model")
    tokenizer = load_tokenizer(folder)
    if chat and not tokenizer.chat_template:
        raise ItemsError(folder, "no chat template", "a tokenizer that has one, or chat off")
    reader = Reader(tokenizer, chat)
    ids = reader.tokens(reader.wrapped(prompt))
    limit = positions(model.config)
    if not ids:
        raise BadInput("prompt", "no tokens", "text")
    if limit and len(ids) + max(1, max_tokens) > limit:
        raise BadInput("prompt", f"{len(ids)} tokens and {max(1, max_tokens)} to come", f"at most {limit} in all")
    start = Start(ids, max_tokens or min(64, (limit or 64) - len(ids)))
    end, device = end_tokens(model, tokenizer), next(model.parameters()).device
    ((asked, begin),) = continuations(model, [start], tokenizer, end, device, 1).batches
    count, shown = 0, ""
    for _, written in greedy(begin(model, []), asked, tokenizer, end):
        if written is None:
            raise LogitsError("generate", f"the model's logits are NaN or infinite after {count} tokens", "numbers")
        count = len(written)
        text = tokenizer.decode(written, skip_special_tokens=True)
        if not text.endswith("\ufffd") and text != shown:  # the rest of a character may come with the next token
            yield text[len(shown) :]
            shown = text
