"""From items to what a fit learns of them: requests, answers, and what each task's own expert says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from merge3.errors import ItemsError, RecipeError, ResourceError
from merge3.learn.distributions import Asked, batches, log_probabilities
from merge3.learn.fitting import Lesson
from merge3.learn.losses import Loss, Target
from merge3.live.slot import Slot
from merge3.memory import available, shown_size
from merge3.tasks.forward import LogitsError
from merge3.tasks.items import Item, place
from merge3.tasks.kinds import KINDS
from merge3.tasks.lm import LM
from merge3.tasks.prompts import Reader
from merge3.tasks.requests import Start
from merge3.tasks.score import Scorer, reader_of

ANSWER_TOKENS = 64  # of an expert's own answer, at most


@dataclass(frozen=True)
class TaskToLearn:
    """head: the endpoint whose head answers; expert: the one whose outputs are matched; system: message of a chat
    template's prompts, None where no template is applied."""

    name: str
    items: Sequence[Item]
    head: str | None = None
    expert: str | None = None
    system: str | None = None


def lessons(
    slot: Slot, tasks: Sequence[TaskToLearn], loss: Loss, folder: str | Path, over: str = "answer", limit: int = 4096
) -> list[Lesson]:
    """One of each task. folder: of the tokenizer. over: what of an expert's writing is matched, see FitSettings.
    limit: padded tokens of a forward pass.

    Raises ItemsError for an item that cannot be learned from, LogitsError or ItemsError where an expert's answer is no
    number. Overwrites the live model.
    """
    return [_lesson(slot, task, loss, folder, over, limit) for task in tasks]


def _lesson(slot: Slot, task: TaskToLearn, loss: Loss, folder: str | Path, over: str, limit: int) -> Lesson:
    found = questions(slot, task, loss, folder, over)
    targets: list[Target] = [None] * len(found.asked)
    if loss.target is not None:
        pairs = zip(found.items, found.requests)
        targets = [loss.target(item, request, found.reader) for item, request in pairs]
    if loss.expert:
        targets = _said(slot.model, task, found.asked, limit)
    return Lesson(task.name, found.asked, targets, task.head)


class Questions(NamedTuple):
    """Of one task's items: as a loss asks them, as they are resolved, their requests, and what has read them."""

    asked: list[Asked]
    items: list[Item]
    requests: list[Any]
    reader: Reader


def questions(
    slot: Slot, task: TaskToLearn, loss: Loss, folder: str | Path, over: str, where: str = "fit"
) -> Questions:
    """What a loss asks of a task. Where it is about the task's own expert, that is the live model afterwards.

    Raises ItemsError for an item that cannot be learned from, RecipeError for a task without an expert.
    """
    model = slot.model
    slot.use_head(task.head)
    Scorer(task.items, model, folder, task.system is not None, system=task.system or "")  # every item can be asked
    reader = reader_of(task.items, model, folder, task.system is not None, task.system or "")
    labels = dict(getattr(model.config, "label2id", None) or {})
    items, requests = [], []
    for item in task.items:
        kind = KINDS[item.kind]
        items.append(kind.resolve(item, labels))
        found = kind.requests(items[-1], reader)
        if len(found) != 1:
            raise ItemsError(place(item), f"{len(found)} questions", "items with one, to learn from")
        requests.append(found[0])
    written: Mapping[int, tuple[int, ...]] = {}
    if loss.expert:
        if task.expert is None:
            raise RecipeError(f"{where}: items", f"no model for task {task.name!r}", "its expert, as `model`")
        slot.load(task.expert)
        if over == "answer":
            written = _written(model, reader, requests)
    asked = []
    for at, (item, request) in enumerate(zip(items, requests)):
        asked.append(loss.ask(item, request, reader, written.get(at)))
    return Questions(asked, items, requests, reader)


def _written(model, reader: Reader, requests: Sequence[Any]) -> dict[int, tuple[int, ...]]:
    """Position -> what the live model writes after a prompt, with the token that ends it where it ends by itself."""
    at = [i for i, request in enumerate(requests) if isinstance(request, Start) and not request.image]
    if not at:
        return {}
    starts = []
    for i in at:
        most = min(requests[i].max_tokens, ANSWER_TOKENS)
        starts.append(Start(requests[i].tokens, most))
    end, written = reader.tokenizer.eos_token_id, {}
    for index, found in LM(model, reader.tokenizer).generate(starts)(model):
        if found is None:
            continue  # its distributions are refused below
        ended = end is not None and len(found.tokens) < starts[index].max_tokens
        written[at[index]] = (*found.tokens, end) if ended else tuple(found.tokens)
    return written


@torch.no_grad()
def _said(model, task: TaskToLearn, asked: Sequence[Asked], limit: int) -> list[torch.Tensor]:
    """The live model's own log-probabilities: float32, on the CPU. Raises ResourceError where they would take more than
    half of the memory that is free."""
    found: list[torch.Tensor] = []
    for batch in batches(range(len(asked)), asked, limit):
        said = log_probabilities(model, [asked[i] for i in batch])
        if not found:
            _check_memory(task, asked, said[0].shape[-1])
        for at, log_p in zip(batch, said):
            if log_p.isnan().any():
                where = f"{task.expert}: {place(asked[at].item)}"
                raise LogitsError(where, "logits that are NaN or infinite", "numbers")
            found.append(log_p.cpu())
    return found


def _check_memory(task: TaskToLearn, asked: Sequence[Asked], width: int) -> None:
    """width: of a distribution."""
    places = sum(1 if one.choose else max(1, len(answer)) for one in asked for answer in one.answers)
    size, free = 4 * width * places, available(torch.device("cpu")) // 2
    if size > free:
        found = f"what its expert says of {len(asked)} items takes {shown_size(size)} of memory"
        hint = "a smaller per_task, items with a smaller max_tokens, or over: next"
        raise ResourceError(f"fit: task {task.name!r}", found, f"at most {shown_size(free)}", hint)
