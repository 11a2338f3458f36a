"""Surgery's items before anything is fitted: none that was learned from measures, and all of them can be asked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from merge3.checkpoint.layout import Ref
from merge3.errors import RecipeError
from merge3.learn.features import features
from merge3.learn.lessons import TaskToLearn, questions
from merge3.learn.losses import LOSSES
from merge3.live.slot import Slot
from merge3.tasks import Item, Scorer, by_task


def unseen(measuring: Sequence[Item], learned: Sequence[Item], where: str) -> list[Item]:
    """The items that ask nothing which was learned from, whatever task and id it had there.

    Raises RecipeError for a task that keeps none.
    """
    known = {_asked(item) for item in learned}
    kept = [item for item in measuring if _asked(item) not in known]
    left = by_task(kept)
    for task, own in by_task(measuring).items():
        if task not in left:
            found = f"all {len(own)} items of task {task!r} that would measure it are learned from, here or by `fit:`"
            raise RecipeError(f"{where}.heldout", found, "some that are not", "a smaller per_task, or more items")
    return kept


def check_items(
    slot: Slot, learned: Sequence[TaskToLearn], measuring: Sequence[TaskToLearn], folder: str | Path
) -> None:
    """Raises ItemsError, BadInput or LogitsError for what `operate` would refuse of these items and their experts, and
    for what cannot measure. folder: of the tokenizer. Overwrites the live model."""
    for task in measuring:
        slot.use_head(task.head)
        Scorer(task.items, slot.model, folder, task.system is not None, system=task.system or "")
    for task in learned:
        # What experts write is at most what prompts leave room for: that is known without asking them to write.
        asked = questions(slot, task, LOSSES["expert_kl"], folder, "next", "surgery").asked
        slot.use_head(task.head)
        features(slot.model, asked[:1], task.expert)  # shows whether logits are what the head gives
        for name in slot.pool.base_checkpoint.tensors:  # a fit by groups never has all experts in memory
            slot.pool.unmap(Ref(task.expert, name))


def _asked(item: Item) -> tuple:
    """Equal where questions are; an image counts by its bytes."""
    image: str | bytes | None = item.image
    if image is not None and Path(image).is_file():
        image = hashlib.sha256(Path(image).read_bytes()).digest()
    return item.kind, item.prompt, item.choices, image, item.asks
