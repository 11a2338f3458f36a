"""Greedy text from a live model, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from merge3.errors import BadInput, ItemsError
from merge3.tasks.forward import LogitsError, likeliest
from merge3.tasks.score import load_tokenizer


@torch.inference_mode()
def continuation(model, folder: Path, prompt: str, max_tokens: int, chat: bool = False) -> Iterator[str]:
    """Pieces of the continuation, each at least one whole character. max_tokens: 0 for as many as fit, up to 64."""
    if "Classification" in type(model).__name__:
        raise BadInput("generate", f"a {type(model).__name__}", "a language model")
    tokenizer = load_tokenizer(folder)
    if chat:
        if not tokenizer.chat_template:
            raise ItemsError(folder, "no chat template", "a tokenizer that has one, or chat off")
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer(prompt).input_ids
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not ids:
        raise BadInput("prompt", "no tokens", "text")
    if limit and len(ids) + max(1, max_tokens) > limit:
        raise BadInput("prompt", f"{len(ids)} tokens and {max(1, max_tokens)} to come", f"at most {limit} in all")
    max_tokens = max_tokens or min(64, (limit or 64) - len(ids))
    end = getattr(model.generation_config, "eos_token_id", None)
    end = set(end) if isinstance(end, (list, tuple)) else {end, tokenizer.eos_token_id}
    device, cache, written, shown = next(model.parameters()).device, None, [], ""
    feed = torch.tensor([ids], device=device)
    for _ in range(max_tokens):
        out = model(input_ids=feed, past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, int(likeliest(out.logits[0, -1]))
        if token < 0:
            found = f"the model's logits are NaN or infinite after {len(written)} tokens"
            raise LogitsError("generate", found, "numbers")
        if token in end:
            break
        written.append(token)
        text = tokenizer.decode(written, skip_special_tokens=True)
        if not text.endswith("\ufffd") and text != shown:  # the rest of a character may come with the next token
            yield text[len(shown) :]
            shown = text
        feed = torch.tensor([[token]], device=device)
