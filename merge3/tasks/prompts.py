"""From items to token ids, once per run: prompts, choices, the prefix that a task's prompts share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from merge3.errors import ItemsError
from merge3.tasks.items import Item

MIN_PREFIX = 8  # shorter shared prefixes are not worth a forward of their own


@dataclass(frozen=True)
class Prompt:
    """index: of the item among all. tokens: after the shared prefix, at least one. choices: token ids."""

    index: int
    item: Item
    tokens: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Group:
    """Prompts whose first tokens (`prefix`, maybe none) are the same."""

    prefix: tuple[int, ...]
    prompts: tuple[Prompt, ...]


def encode(items: Sequence[Item], tokenizer, kind: str, chat: bool = False, max_length: int | None = None) -> list[Group]:
    """Tokenise the items of one kind; one group per task. chat: wrap prompts in the chat template.

    Raises ItemsError naming the item whose tokens exceed max_length.
    """
    groups = []
    chosen = [(i, item) for i, item in enumerate(items) if item.kind == kind]
    for task in dict.fromkeys(item.task for _, item in chosen):
        prompts = []
        for index, item in chosen:
            if item.task != task:
                continue
            text, special = item.prompt, True
            if chat:
                message = [{"role": "user", "content": item.prompt}]
                text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
                special = False  # the template writes them
            tokens = tuple(tokenizer(text, add_special_tokens=special)["input_ids"])
            choices = tuple(_continuation(tokenizer, text, tokens, c, special) for c in item.choices)
            longest = len(tokens) + max((len(c) for c in choices), default=0)
            if kind == "generate":
                longest += item.max_tokens
            if not tokens or any(not c for c in choices):
                raise ItemsError(f"item {item.id!r}", "a prompt or choice without tokens", "text the tokenizer knows")
            if max_length is not None and longest > max_length:
                raise ItemsError(f"item {item.id!r}", f"{longest} tokens", f"at most {max_length}, the model's positions")
            prompts.append(Prompt(index, item, tokens, choices))
        groups.append(_share_prefix(prompts))
    return groups


def batches(prompts: Sequence[Prompt], width, limit: int) -> Iterator[list[Prompt]]:
    """Prompts sorted by length, in batches of at most `limit` padded tokens. width(prompt): tokens of a row."""
    batch = []
    for prompt in sorted(prompts, key=lambda p: (width(p), p.index)):
        if batch and (len(batch) + 1) * width(prompt) > limit:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _continuation(tokenizer, text: str, tokens: tuple[int, ...], choice: str, special: bool) -> tuple[int, ...]:
    """The choice's tokens as they follow the prompt; alone if the tokenizer would merge the two."""
    whole = tuple(tokenizer(text + choice, add_special_tokens=special)["input_ids"])
    if len(whole) > len(tokens) and whole[: len(tokens)] == tokens:
        return whole[len(tokens) :]
    return tuple(tokenizer(choice, add_special_tokens=False)["input_ids"])


def _share_prefix(prompts: list[Prompt]) -> Group:
    # The last token of each prompt stays out of the prefix: its logits are the answer's.
    length = min(len(p.tokens) for p in prompts) - 1
    first = prompts[0].tokens
    for p in prompts:
        length = next((i for i in range(length) if p.tokens[i] != first[i]), length)
    if length < MIN_PREFIX or len(prompts) < 2:
        return Group((), tuple(prompts))
    shorter = tuple(Prompt(p.index, p.item, p.tokens[length:], p.choices) for p in prompts)
    return Group(first[:length], shorter)
