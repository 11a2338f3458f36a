"""From items to token ids, once per run: prompts, choices, the prefix that a task's prompts share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from merge3.errors import ItemsError
from merge3.tasks.items import Item, place, shown

MIN_PREFIX = 8  # shorter shared prefixes are not worth a forward of their own
# Families whose position ids start after the padding token's id: so many of their positions are never used.
_OFFSET = {
    "camembert", "data2vec-text", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
}  # fmt: skip


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


def positions(config) -> int | None:
    """How many tokens a model takes, by its transformers configuration; None where nothing limits them."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:  # absent, or -1 where positions are relative
        return None
    if getattr(config, "model_type", "") in _OFFSET:
        limit -= (getattr(config, "pad_token_id", None) or 0) + 1
    return limit


def encode(
    items: Sequence[Item], tokenizer, kind: str, chat: bool = False, max_length: int | None = None
) -> list[Group]:
    """Tokenise the items of one kind; one group per task. chat: wrap prompts in the chat template.

    Raises ItemsError naming the item whose tokens exceed max_length, or whose choices are no different tokens.
    """
    groups = []
    chosen = [(i, item) for i, item in enumerate(items) if item.kind == kind]
    for task in dict.fromkeys(item.task for _, item in chosen):
        prompts = []
        for index, item in chosen:
            if item.task != task:
                continue
            tokens, choices = tokens_of(item, tokenizer, chat)
            _check(item, tokens, choices)
            longest, what = length(item, tokens, choices)
            if max_length is not None and longest > max_length:
                raise ItemsError(
                    place(item), what, f"at most {max_length}, the model's positions",
                    "--skip-too-long leaves such items out; in a configuration `too_long: skip` or `truncate_left`",
                )  # fmt: skip
            prompts.append(Prompt(index, item, tokens, choices))
        groups.append(_share_prefix(prompts))
    return groups


def tokens_of(item: Item, tokenizer, chat: bool = False) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """(the prompt's tokens, those of every choice)"""
    text, special = item.prompt, True
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ItemsError("apply_chat_template", "the tokenizer has no chat template", "one that has, or false")
        message = [{"role": "user", "content": item.prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        special = False  # the template writes them
    tokens = tuple(tokenizer(text, add_special_tokens=special)["input_ids"])
    choices = item.choices if item.kind == "choice" else ()
    return tokens, tuple(_continuation(tokenizer, text, tokens, c, special) for c in choices)


def length(item: Item, tokens: Sequence[int], choices: Sequence[Sequence[int]]) -> tuple[int, str]:
    """(how many positions an item takes, what for)"""
    prompt = f"prompt of {len(tokens)} tokens"
    if item.kind == "generate":
        more, what = item.max_tokens, f"max_tokens {item.max_tokens}"
    elif choices:
        more = max(map(len, choices))
        what = f"longest choice of {more}"
    else:
        return len(tokens), prompt
    return len(tokens) + more, f"{prompt} + {what} = {len(tokens) + more}"


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


def _check(item: Item, tokens: Sequence[int], choices: Sequence[tuple[int, ...]]) -> None:
    """A prompt and choices must have tokens, and no two choices the same."""
    name = lambda i: f"choices[{i}] {shown(item.choices[i])}"
    if not tokens:
        raise ItemsError(place(item), f"prompt {shown(item.prompt)} without tokens", "text the tokenizer knows")
    for i, choice in enumerate(choices):
        if not choice:
            raise ItemsError(place(item), f"{name(i)} without tokens", "text the tokenizer knows")
        if choice in choices[:i]:
            found = f"{name(choices.index(choice))} and {name(i)} have the same tokens"
            raise ItemsError(place(item), found, "choices that the tokenizer tells apart")


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
