"""Items that a model has no positions for: left out, or their prompts cut from the left, before anyone is asked.

Whoever drives does this once, so that every stage (search, held-out, calibration) sees the same items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from merge3.errors import ItemsError
from merge3.tasks.images import MARK
from merge3.tasks.items import Item, place, shown
from merge3.tasks.kinds import KINDS
from merge3.tasks.prompts import Reader, load_tokenizer, positions
from merge3.tasks.requests import taken

POLICIES = ("error", "skip", "truncate_left")


@dataclass(frozen=True)
class Fitted:
    """items: what can be asked. skipped, truncated: task -> how many. notes: a line for people per task and deed."""

    items: list[Item]
    skipped: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def fit_to_model(
    items: Sequence[Item], folder: str | Path, policy: str, chat: bool = False, system: str = ""
) -> Fitted:
    """As fit_items, for the checkpoint in a folder: its tokenizer, its configuration's positions."""
    if policy == "error" or not any(map(_reads, items)):
        return Fitted(list(items))
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0][:200]
        expected = "the model's, which says how long items may be"
        raise ItemsError(folder, f"no usable config.json ({reason})", expected) from None
    embedded = any(KINDS[item.kind].asks == "embeddings" for item in items)
    limit, apart = positions(config, folder if embedded else None), bool(getattr(config, "is_encoder_decoder", False))
    return fit_items(items, load_tokenizer(folder), limit, policy, chat, system, apart, Path(folder))


def fit_items(
    items: Sequence[Item],
    tokenizer,
    limit: int | None,
    policy: str,
    chat: bool = False,
    system: str = "",
    apart: bool = False,
    folder: Path | None = None,
) -> Fitted:
    """Items that fit into `limit` tokens; None: all do. policy: of POLICIES, where `error` leaves it to the Scorer.
    apart: prompts and what follows them each have as many, as in models with an encoder and a decoder. folder: of the
    checkpoint, where items are embedded, or a processor says how many tokens an image takes.

    Raises ItemsError where a task loses all its items, or cutting a prompt does not help.
    """
    if policy not in POLICIES:
        raise ItemsError("too_long", f"found {policy!r}", ", ".join(POLICIES))
    reader = Reader(tokenizer, chat, folder, limit, system, apart)
    kept: list[Item] = []
    long: dict[str, list[str]] = {}  # task -> the items that are too long, with what makes them so
    for item in items:
        longest, what = 0, ""
        if limit is not None and policy != "error" and _reads(item):
            longest, what = _length(item, reader)
        if limit is None or longest <= limit:
            kept.append(item)
            continue
        long.setdefault(item.task, []).append(f"{place(item)}: {what}")
        if policy == "truncate_left":
            kept.append(_cut(item, reader, limit))
    left = {item.task for item in kept}
    notes = []
    for task, reasons in long.items():
        total = sum(item.task == task for item in items)
        if task not in left:
            found = f"all of its {total} items are too long, the first: {reasons[0]}"
            raise ItemsError(f"task {shown(task)}", found, f"at most {limit} tokens")
        deed = "skipped" if policy == "skip" else "cut from the left"
        many = f"{len(reasons)} of {total} items {deed}, too long for {limit} positions"
        notes.append(f"task {shown(task)}: {many}; the first: {reasons[0]}")
    counts = {task: len(reasons) for task, reasons in long.items()}
    return Fitted(kept, counts if policy == "skip" else {}, counts if policy == "truncate_left" else {}, notes)


def _reads(item: Item) -> bool:
    """Whether a prompt takes positions: an image alone takes none."""
    return not item.image or KINDS[item.kind].asks != "logits"


def _length(item: Item, reader: Reader) -> tuple[int, str]:
    """(how many positions an item takes, what for)"""
    return max(taken(request, reader.apart) for request in KINDS[item.kind].requests(item, reader))


def _cut(item: Item, reader: Reader, limit: int) -> Item:
    """The item with a shorter prompt. Text is cut, not token ids: what the tokenizer or a chat template puts in
    front of a prompt stays there, and an item remains what it is on its way to a daemon."""
    if not item.asks:
        return _shortened(item, reader, limit)
    cut = {}  # what is asked after one context is compared: it stays one
    for context in {context for context, _ in item.asks}:
        own = tuple(ask for ask in item.asks if ask[0] == context)
        cut[context] = _start(_shortened(replace(item, asks=own), reader, limit))
    return replace(item, asks=tuple((cut[context], more) for context, more in item.asks))


def _shortened(item: Item, reader: Reader, limit: int) -> Item:
    """An item with one prompt, or asks after one context, of at most `limit` positions. Raises ItemsError."""
    shorter, what = item, ""
    if item.image and MARK in item.prompt:
        found = f"too long, and `{MARK}` stands in its prompt, which would be cut from the left"
        raise ItemsError(place(item), found, f"at most {limit} tokens", "`too_long: skip` leaves it out")
    while _start(shorter) or not what:  # what stands without context may fit as it is
        longest, how = _length(shorter, reader)
        what = what or how
        if longest <= limit:
            return shorter
        shorter = _starting(shorter, _without(_start(shorter), longest - limit, reader.tokenizer))
    raise ItemsError(
        place(item),
        f"{what}, and nothing would be left of its prompt",
        f"at most {limit}, the model's positions",
        "`too_long: skip` leaves it out",
    )


def _start(item: Item) -> str:
    return item.asks[0][0] if item.asks else item.prompt


def _starting(item: Item, text: str) -> Item:
    if item.asks:
        return replace(item, asks=tuple((text, more) for _, more in item.asks))
    return replace(item, prompt=text)


def _without(text: str, count: int, tokenizer) -> str:
    """A text without its first `count` tokens, and at least one character."""
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        end = offsets[count - 1][1] if count < len(offsets) else len(text)
    else:  # no offsets: the same share of its characters
        end = round(len(text) * count / max(count, len(tokenizer(text, add_special_tokens=False)["input_ids"])))
    return text[max(end, 1) :]
