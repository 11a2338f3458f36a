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

POLICIES = ("error", "skip", "truncate_left")


@dataclass(frozen=True)
class Fitted:
    """items: what can be asked. skipped, truncated: task -> how many. notes: a line for people per task and deed."""

    items: list[Item]
    skipped: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def fit_to_model(items: Sequence[Item], folder: str | Path, policy: str, chat: bool = False) -> Fitted:
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
    return fit_items(items, load_tokenizer(folder), positions(config), policy, chat, Path(folder))


def fit_items(
    items: Sequence[Item], tokenizer, limit: int | None, policy: str, chat: bool = False, folder: Path | None = None
) -> Fitted:
    """Items that fit into `limit` tokens; None: all do. policy: of POLICIES, where `error` leaves it to the Scorer.
    folder: the checkpoint's, whose processor says how many tokens an image takes.

    Raises ItemsError where a task loses all its items, or cutting a prompt does not help.
    """
    if policy not in POLICIES:
        raise ItemsError("too_long", f"found {policy!r}", ", ".join(POLICIES))
    reader = Reader(tokenizer, chat, folder)
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
    return KINDS[item.kind].request(item, reader).length()


def _cut(item: Item, reader: Reader, limit: int) -> Item:
    """The item with a shorter prompt. Text is cut, not token ids: what the tokenizer or a chat template puts in
    front of a prompt stays there, and an item remains what it is on its way to a daemon."""
    shorter, what = item, ""
    if item.image and MARK in item.prompt:
        found = f"too long, and `{MARK}` stands in its prompt, which would be cut from the left"
        raise ItemsError(place(item), found, f"at most {limit} tokens", "`too_long: skip` leaves it out")
    while shorter.prompt:
        longest, how = _length(shorter, reader)
        what = what or how
        if longest <= limit:
            return shorter
        shorter = replace(shorter, prompt=_without(shorter.prompt, longest - limit, reader.tokenizer))
    raise ItemsError(
        place(item),
        f"{what}, and nothing would be left of its prompt",
        f"at most {limit}, the model's positions",
        "`too_long: skip` leaves it out",
    )


def _without(text: str, count: int, tokenizer) -> str:
    """A text without its first `count` tokens, and at least one character."""
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        end = offsets[count - 1][1] if count < len(offsets) else len(text)
    else:  # no offsets: the same share of its characters
        end = round(len(text) * count / max(count, len(tokenizer(text, add_special_tokens=False)["input_ids"])))
    return text[max(end, 1) :]
