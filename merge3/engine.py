"""The engine: what a search needs, whoever provides it. LocalEngine does it in this process.

A driver says once, in a Registration, what subjects are asked and how answers count, and then which subjects; weights,
prompts and the space never cross again. Several engines may stand behind this protocol.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from merge3.errors import BadInput, ConfigError
from merge3.export import check_recipe, merge_to_disk
from merge3.fitness import check_objectives, estimates, judged
from merge3.learn.fit import Fit, FitStep, prepare, steps
from merge3.learn.fitting import Fitting, State
from merge3.learn.lessons import TaskToLearn
from merge3.learn.surgery import Operation, Surgery, operate
from merge3.live.heads import own_heads
from merge3.live.hooks import Adapter, adapted
from merge3.live.slot import Slot
from merge3.memory import enough_memory
from merge3.methods import METHODS
from merge3.packaging import chat_template, template_key
from merge3.pool import Pool
from merge3.program import compile, tied_outputs
from merge3.protocol import Engine, Evaluation, Operated, PoolInfo, Subject
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.space import Space, SpaceDefinition
from merge3.tasks import Item, LogitsError, Scorer
from merge3.tasks.score import Answers

_SCORERS = 64  # prepared sets of items kept: races and checks ask ever new ones
_REGISTRATIONS = 64

__all__ = ["Engine", "Evaluation", "LocalEngine", "Operated", "PoolInfo", "Subject"]


class _Round(NamedTuple):
    """The items of one task: their positions among the registration's, the endpoint whose head answers (None: the
    merge's own), what asks."""

    task: str
    positions: list[int]
    head: str | None
    scorer: Scorer


class _Prepared(NamedTuple):
    """A registration as candidates meet it: its space, if it has one, and a round per task."""

    space: Space | None
    rounds: list[_Round]


class LocalEngine:
    """Pool, slot and scorers in this process.

        engine = LocalEngine(Pool.open("base", ["math", "code"]))
        (evaluation,) = engine.evaluate(Registration(tuple(read_items("items.jsonl"))), ["math"])

    dtype: of the live model; what the recipes to come will be exported in (default: the endpoints').
    slot: one that this engine shares with others, which then take turns.
    """

    def __init__(self, pool: Pool, dtype: torch.dtype | None = None, slot: Slot | None = None):
        self.pool, self.slot = pool, slot or Slot(pool, dtype)
        self._spaces: dict[str, Space] = {}
        self._prepared: OrderedDict[tuple, _Prepared] = OrderedDict()
        self._scorers: OrderedDict[tuple, Scorer] = OrderedDict()
        self._fit: tuple[tuple[Registration, Fit] | None, Fitting | None] = None, None

    def info(self) -> PoolInfo:
        """See Engine."""
        parameters = sum(int(np.prod(t.shape)) for t in self.pool.base_checkpoint.tensors.values())
        return PoolInfo(
            tuple(self.pool.endpoints),
            self.pool.content_hashes(),
            parameters,
            dict(self.pool.kept),
            str(self.pool.device),
            self.pool.searched,
            warnings=tuple(self.pool.warnings),
            notes=tuple(self.pool.notes),
            own_heads=own_heads(self.pool),
            tied=tied_outputs(self.pool, self.pool.searched),
        )

    def prepare(self, registration: Registration, recipe: Recipe | None = None) -> None:
        """See Engine."""
        self._prepare(registration, recipe)

    def space(self, definition: SpaceDefinition) -> Space:
        """The space over this pool's layout, its statistics computed. Raises ConfigError where models do not fit it."""
        key = definition.hash()
        if key not in self._spaces:
            space = Space(definition, self.pool.searched)
            self._check_depths(space)
            self._prefetch(space)
            self._spaces[key] = space
        return self._spaces[key]

    def evaluate(self, registration: Registration, subjects: Sequence[Subject]) -> Iterator[Evaluation]:
        """See Engine."""
        for index, subject in enumerate(subjects):
            adapters: Mapping[str, Adapter] = {}
            if isinstance(subject, Operated):
                subject, adapters = subject.subject, subject.adapters
            prepared = self._prepare(registration, subject)  # what is wrong with items is raised
            yield self._evaluate(registration, prepared, index, subject, adapters)

    def _evaluate(
        self, asked: Registration, prepared: _Prepared, index: int, subject: Subject, adapters: Mapping[str, Adapter]
    ) -> Evaluation:
        start = time.perf_counter()
        recipe_hash, swap = "", 0.0
        responses, raw, error = None, {}, None
        values = stderrs = np.full(len(asked.objectives), np.nan)
        try:
            recipe = self._recipe(prepared.space, subject)
            recipe_hash = recipe.hash() if recipe is not None else ""
            before = time.perf_counter()
            with enough_memory(self.pool.device):
                if recipe is None:
                    self.slot.load(subject)
                else:
                    self.slot.swap(recipe, asked.seed, "candidate" if isinstance(subject, np.ndarray) else "recipe")
                swap = time.perf_counter() - before
                answers = self._ask(prepared.rounds, len(asked.items), adapters)
            responses = judged(asked, answers)
            if responses is None:
                responses, raw = answers
            else:
                values, stderrs = estimates(asked, responses)
        except LogitsError as problem:
            at = f"{subject}: {problem.where}" if isinstance(subject, str) else problem.where
            error = LogitsError(at, problem.found, problem.expected, problem.hint)
        except BadInput as problem:
            error = problem
        seconds = time.perf_counter() - start
        return Evaluation(index, recipe_hash, responses, asked.objectives, values, stderrs, seconds, swap, error, raw)

    def fit(
        self,
        registration: Registration,
        fit: Fit,
        state: State | None = None,
        told: Callable[[str], None] = lambda line: None,
        seconds: float = math.inf,
    ) -> Iterator[FitStep]:
        """See Engine. seconds: end with the first step that is done later, and say what it can be continued from; what
        was prepared for a fit is kept for when the same two objects are given again, or until `forget_fit`."""
        with enough_memory(self.pool.device):
            fitting = self._fitting(registration, fit)
            told(fitting.room.describe())
            yield from steps(fit, fitting, state, seconds)

    def forget_fit(self) -> None:
        """Give up what was prepared for a fit, and the room it took: what experts said takes memory."""
        self._fit = None, None
        self.pool.reserve(0)

    def _fitting(self, asked: Registration, fit: Fit) -> Fitting:
        """Prepared once; only the last one is kept."""
        known, fitting = self._fit
        if known != (asked, fit):
            self.forget_fit()  # room before another
            tasks, folder = self._to_learn(asked, fit.recipe, fit.experts)
            fitting = prepare(self.slot, fit, tasks, folder)
            self._fit = (asked, fit), fitting
        return fitting

    def operate(self, registration: Registration, recipe: Recipe, surgery: Surgery) -> Operation:
        """See Engine."""
        tasks, folder = self._to_learn(registration, recipe, surgery.experts)
        with enough_memory(self.pool.device):
            return operate(self.slot, recipe, tasks, surgery.settings, folder)

    def _to_learn(
        self, asked: Registration, recipe: Recipe, experts: Mapping[str, str]
    ) -> tuple[list[TaskToLearn], Path]:
        """(every task of a registration, the folder of the tokenizer that reads its items)"""
        self._check_heads(asked)
        template = chat_template(recipe, self.pool) if asked.chat else None
        tasks = []
        for task, positions in asked.tasks().items():
            items = [asked.items[i] for i in positions]
            tasks.append(TaskToLearn(task, items, asked.heads.get(task), experts.get(task), asked.system(task)))
        return tasks, self.pool.words.folder(template)

    def _recipe(self, space: Space | None, subject: Subject) -> Recipe | None:
        """The recipe of a genome, or the one given; None for an endpoint."""
        if isinstance(subject, Recipe):
            return subject
        if isinstance(subject, str):
            self._check_endpoint("endpoint", subject)
            return None
        if space is None:
            raise BadInput(
                "genome", "these items were registered without a space", "a recipe, or a registration with a space"
            )
        return space.recipe(subject)

    def check(self, recipe: Recipe) -> None:
        """See Engine."""
        self.slot.compile(recipe)
        check_recipe(recipe, self.pool)

    def export(self, recipe: Recipe, directory: Path, seed: int = 0) -> dict:
        """See Engine."""
        return merge_to_disk(recipe, directory, self.pool, seed)

    def close(self) -> None:
        """Nothing to give up: pool and slot go with the process."""

    def _check_heads(self, asked: Registration) -> None:
        for task, head in asked.heads.items():
            if head not in self.slot.lent_heads:
                self._check_endpoint(f"heads: {task}", head)

    def _check_endpoint(self, where: str, name: str) -> None:
        if name not in self.pool.endpoints:
            raise BadInput(where, f"found {name!r}", ", ".join(self.pool.endpoints))

    def _prepare(self, asked: Registration, subject: Subject | None) -> _Prepared:
        """Checked, tokenised and remembered. A task's head is its own, else the endpoint's asked, else the merge's.
        The chat template is that of the recipe asked, else that of the space's recipes."""
        endpoint = subject if isinstance(subject, str) and subject in self.pool.endpoints else None
        recipe = subject if isinstance(subject, Recipe) else None
        key = (asked, endpoint, template_key(recipe) if asked.chat else None)
        if key not in self._prepared:
            check_objectives(asked)
            self._check_heads(asked)
            space = None if asked.space is None else self.space(asked.space)
            spoken = recipe or (space and space.uniform_recipe())
            template = chat_template(spoken, self.pool) if asked.chat and spoken is not None else None
            rounds = []
            for task, positions in asked.tasks().items():
                head = asked.heads.get(task) or endpoint
                items = tuple(asked.items[i] for i in positions)
                rounds.append(_Round(task, positions, head, self._scorer(items, head, asked.system(task), template)))
            self._prepared[key] = _Prepared(space, rounds)
            while len(self._prepared) > _REGISTRATIONS:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(key)
        return self._prepared[key]

    def _scorer(self, items: tuple[Item, ...], head: str | None, system: str | None, template: str | None) -> Scorer:
        key = (items, head if self.pool.heads else None, system, template)
        if key not in self._scorers:
            self.slot.use_head(head)  # the labels are the head's
            folder, chat = self.pool.words.folder(template), system is not None
            self._scorers[key] = Scorer(items, self.slot.model, folder, chat, system=system or "")
            while len(self._scorers) > _SCORERS:
                self._scorers.popitem(last=False)
        return self._scorers[key]

    def _ask(self, rounds: list[_Round], count: int, adapters: Mapping[str, Adapter]) -> Answers:
        responses, raw = np.empty(count), {}
        for task, positions, head, scorer in rounds:
            self.slot.use_head(head)
            with adapted(self.slot.model, adapters.get(task)):
                answers = scorer.ask(self.slot.model)
            responses[positions] = answers.responses
            raw |= {positions[at]: found for at, found in answers.raw.items()}
        return Answers(responses, raw)

    def _check_depths(self, space: Space) -> None:
        """A space's layer ranges are the base's: of a deeper model the rest would be lost without a word."""
        depth = space.layout.layers
        for model in space.definition.models:
            found = self.pool.layouts[model].layers if model in self.pool.layouts else depth
            if found != depth:
                raise ConfigError(
                    "genome: models", f"{model} has {found} layers, the base {depth}", "models of equal depth"
                )

    def _prefetch(self, space: Space) -> None:
        """What every value that a search can name needs, for all tensors in one pass over the weights."""
        method = METHODS[space.definition.method]
        wanted = [method.prefetch_search[gene] for gene in space.genes if gene in method.prefetch_search]
        if wanted:
            jobs = compile(space.uniform_recipe(), self.pool).jobs
            for prefetch in wanted:
                prefetch(jobs, self.pool.statistics)
