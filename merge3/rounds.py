"""Registrations as subjects meet them: checked, tokenised, and put in rounds of items that one model answers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from merge3.errors import BadInput
from merge3.fitness import Answered, check_objectives, estimates, judged, lengths_needed
from merge3.live.heads import own_heads
from merge3.live.slot import Slot
from merge3.packaging import chat_template, template_key
from merge3.pool import Pool
from merge3.protocol import Evaluation, Subject, Varied
from merge3.recipe import Recipe, nearest
from merge3.registration import Registration
from merge3.space import Space, SpaceDefinition
from merge3.tasks import Item, Scorer
from merge3.tasks.score import Answers
from merge3.variants import Variants

_SCORERS = 64  # prepared sets of items kept: races and checks ask ever new ones
_REGISTRATIONS = 64


class Round(NamedTuple):
    """The items of one task: their positions among the registration's, the endpoint whose head answers (None: the
    merge's own), what asks; whose variant answers, where there is one for each task."""

    task: str
    positions: list[int]
    head: str | None
    scorer: Scorer
    variant: str | None = None


class Prepared(NamedTuple):
    """A registration as candidates meet it: its space, if it has one, and its rounds."""

    space: Space | None
    rounds: list[Round]


class Rounds:
    """What was prepared for a slot, remembered. It knows nobody who holds it: an engine goes, models and all, with the
    last who uses it."""

    def __init__(self, slot: Slot):
        self.slot, self.pool = slot, slot.pool
        self._prepared: OrderedDict[tuple, Prepared] = OrderedDict()
        self._scorers: OrderedDict[tuple, Scorer] = OrderedDict()
        self._packed: dict[str, Variants] = {}

    def prepare(
        self, asked: Registration, subject: Subject | None, space_of: Callable[[SpaceDefinition], Space]
    ) -> Prepared:
        """A task's head is its own, else its variant's, else the endpoint's asked, else the merge's. The chat template
        is that of the recipe asked, else that of the space's recipes. Raises BadInput for what evaluating would."""
        varied, endpoint, recipe = self._parted(subject)
        key = _key(asked, varied, endpoint, recipe)
        if key not in self._prepared:
            check_objectives(asked)
            self.check_heads(asked)
            space = None if asked.space is None else space_of(asked.space)
            spoken = recipe or (space and space.uniform_recipe())
            template = chat_template(spoken, self.pool) if asked.chat and spoken is not None else None
            self._prepared[key] = Prepared(space, self._grouped(asked, varied, endpoint, template))
            while len(self._prepared) > _REGISTRATIONS:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(key)
        return self._prepared[key]

    def refused(self, asked: Registration, subject: Subject | None) -> BadInput | None:
        """What is wrong with a subject of many variants, and with no other: a recipe that does not compile, a folder
        without variants, a task without one. Where it was prepared, nothing is."""
        varied, endpoint, recipe = self._parted(subject)
        if varied is not None and _key(asked, varied, endpoint, recipe) not in self._prepared:
            try:
                self._answering(asked, varied)
            except BadInput as error:
                return error
        return None

    def _parted(self, subject: Subject | None) -> tuple[Varied | None, str | None, Recipe | None]:
        varied = subject if isinstance(subject, Varied) else None
        subject = varied.subject if varied is not None else subject
        endpoint = subject if isinstance(subject, str) and subject in self.pool.endpoints else None
        return varied, endpoint, subject if isinstance(subject, Recipe) else None

    def packed(self, endpoint: str) -> Variants:
        """The variants in an endpoint's folder, their heads lent to the slot as `endpoint:task`. Raises CheckpointError
        where there are none."""
        if endpoint not in self._packed:
            check_endpoint(self.pool, "endpoint", endpoint)
            variants = Variants.open(self.pool.endpoints[endpoint].path, self.pool.device)
            self.slot.lend(variants, endpoint)
            self._packed[endpoint] = variants
        return self._packed[endpoint]

    def check_heads(self, asked: Registration) -> None:
        """Raises BadInput for a head of a model that is not there."""
        for task, head in asked.heads.items():
            if head not in self.slot.lent_heads:
                check_endpoint(self.pool, f"heads: {task}", head)

    def _grouped(
        self, asked: Registration, varied: Varied | None, endpoint: str | None, template: str | None
    ) -> list[Round]:
        variants: list[str | None] = [None] * len(asked.items)
        heads: dict[str, str] = {}
        if varied is not None:
            variants, heads = self._answering(asked, varied)
        groups: dict[tuple[str, str | None], list[int]] = {}
        for at, (item, variant) in enumerate(zip(asked.items, variants)):
            groups.setdefault((item.task, variant), []).append(at)
        rounds = []
        for (task, variant), positions in groups.items():
            head = asked.heads.get(task) or heads.get(variant) or endpoint
            items = tuple(asked.items[i] for i in positions)
            scorer = self._scorer(items, head, asked.system(task), template)
            rounds.append(Round(task, positions, head, scorer, variant))
        return sorted(rounds, key=lambda one: variants.index(one.variant))  # a variant is brought in once

    def _answering(self, asked: Registration, varied: Varied) -> tuple[list[str], dict[str, str]]:
        """(whose variant answers, of each item; variant -> its own head). Raises BadInput for a task without one."""
        tasks = tuple(item.task for item in asked.items) if varied.tasks is None else varied.tasks
        if len(tasks) != len(asked.items):
            raise BadInput("tasks", f"{len(tasks)} for {len(asked.items)} items", "one for each item")
        if isinstance(varied.subject, Recipe):
            known = self.slot.compile(varied.subject).tasks
            heads = known if own_heads(self.pool) else {}
        else:
            variants = self.packed(varied.subject)
            own = self.pool.heads.get(varied.subject)
            known, heads = variants.tasks, {task: f"{varied.subject}:{task}" for task in variants.tasks if own}
        for task in dict.fromkeys(tasks):
            if task not in known:
                raise BadInput("task", f"no variant {task!r}", ", ".join(known), nearest(task, known))
        return list(tasks), heads

    def _scorer(self, items: tuple[Item, ...], head: str | None, system: str | None, template: str | None) -> Scorer:
        key = (items, head if self.pool.heads or self.slot.lent_heads else None, system, template)
        if key not in self._scorers:
            self.slot.use_head(head)  # the labels are the head's
            folder, chat = self.pool.words.folder(template), system is not None
            self._scorers[key] = Scorer(items, self.slot.model, folder, chat, system=system or "")
            while len(self._scorers) > _SCORERS:
                self._scorers.popitem(last=False)
        return self._scorers[key]


def _key(asked: Registration, varied: Varied | None, endpoint: str | None, recipe: Recipe | None) -> tuple:
    answering = None if varied is None else (recipe and recipe.hash(), varied.tasks)
    return asked, endpoint, template_key(recipe) if asked.chat else None, answering


def check_endpoint(pool: Pool, where: str, name: str) -> None:
    """Raises BadInput for a name that is no endpoint's."""
    if name not in pool.endpoints:
        raise BadInput(where, f"found {name!r}", ", ".join(pool.endpoints))


def evaluation(
    asked: Registration, index: int, recipe_hash: str, answers: Answers | BadInput, cost: float, swap_seconds: float
) -> Evaluation:
    """What a subject's answers come to, or why there are none. cost: of the recipe, to a space that counts it."""
    responses, raw, lengths, error = None, {}, None, None
    values = stderrs = np.full(len(asked.objectives), np.nan)
    try:
        if isinstance(answers, BadInput):
            raise answers
        responses, lengths = judged(asked, answers), answers.lengths if lengths_needed(asked) else None
        if responses is None:
            responses, raw = answers.responses, answers.raw
        else:
            values, stderrs = estimates(asked, Answered(responses, answers.lengths, cost))
    except BadInput as problem:
        error = problem
    found = recipe_hash, responses, asked.objectives, values, stderrs, 0.0, swap_seconds, error, raw, lengths, cost
    return Evaluation(index, *found)
