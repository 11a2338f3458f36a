"""The engine: what a search needs, whoever provides it. LocalEngine does it in this process.

A driver says once, in a Registration, what subjects are asked and how answers count, and then which subjects; weights,
prompts and the space never cross again. Several engines may stand behind this protocol.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from merge3.errors import BadInput, ConfigError
from merge3.export import check_recipe, merge_to_disk
from merge3.export_task import check_router, merge_task
from merge3.fitness import Answered, estimates, judged, lengths_needed
from merge3.joined import joined, rehearsed
from merge3.learn.fit import Fit, FitStep, prepare, steps
from merge3.learn.fitting import Fitting, State
from merge3.learn.lessons import TaskToLearn
from merge3.learn.surgery import Operation, Surgery, operate
from merge3.live.heads import own_heads
from merge3.live.hooks import Adapter, adapted
from merge3.live.slot import Slot
from merge3.memory import enough_memory
from merge3.methods import METHODS, VARIANTS
from merge3.packaging import chat_template
from merge3.pool import Pool
from merge3.program import compile, tied_outputs
from merge3.protocol import Engine, Evaluation, Operated, PoolInfo, Question, Subject, Taken, Varied
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.rounds import Prepared, Round, Rounds, check_endpoint
from merge3.space import ParameterSpace, PathSpace, Space, SpaceDefinition
from merge3.space.norms import relative_norms
from merge3.tasks import LogitsError
from merge3.tasks.score import Answers

__all__ = ["Engine", "Evaluation", "LocalEngine", "Operated", "PoolInfo", "Question", "Subject", "Taken", "Varied"]


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
        self._rounds = Rounds(self.slot)
        self._fit: tuple[tuple[Registration, Fit] | None, Fitting | None] = None, None

    def info(self) -> PoolInfo:
        """See Engine."""
        parameters = sum(int(np.prod(t.shape)) for t in self.pool.base_checkpoint.tensors.values())
        return PoolInfo(
            tuple(model for model in self.pool.endpoints if model not in self.pool.joined),
            self.pool.content_hashes(),
            parameters,
            dict(self.pool.kept),
            str(self.pool.device),
            self.pool.searched,
            warnings=tuple(self.pool.warnings),
            notes=tuple(self.pool.notes),
            own_heads=own_heads(self.pool),
            tied=tied_outputs(self.pool, self.pool.searched),
            experts=str(self.pool.compacted.experts),
            losses=tuple(self.pool.compacted.losses),
        )

    def prepare(self, registration: Registration, recipe: Recipe | None = None) -> None:
        """See Engine."""
        self._rounds.prepare(registration, recipe, self.space)

    def space(self, definition: SpaceDefinition) -> Space:
        """The space over this pool's layout, its statistics computed. Raises ConfigError where models do not fit it."""
        key = definition.hash()
        if key not in self._spaces:
            space = Space(definition, self.pool.searched)
            joined(self.pool, space.uniform_recipe())
            self._check_depths(space)
            if isinstance(space, PathSpace):
                self.slot.path.check(space.models)
            else:
                self._prefetch(space)
            self._spaces[key] = space
        return self._spaces[key]

    def evaluate(self, registration: Registration, subjects: Sequence[Subject]) -> Iterator[Evaluation]:
        """See Engine."""
        for index, subject in enumerate(subjects):
            adapters: Mapping[str, Adapter] = {}
            stored = isinstance(subject, str)
            if isinstance(subject, Taken):
                subject, stored = subject.subject, subject.stored
                if isinstance(subject, Recipe) and subject.method in VARIANTS:
                    raise BadInput("subject", f"a recipe of {subject.method}, taken of other weights", "one model")
            if isinstance(subject, Operated):
                subject, adapters = subject.subject, subject.adapters
            if isinstance(subject, Recipe) and subject.method in VARIANTS:
                subject = Varied(subject)
            if isinstance(subject, Recipe):
                joined(self.pool, subject)
            error = self._rounds.refused(registration, subject)
            if error is not None:
                none = np.full(len(registration.objectives), np.nan)
                hash_ = subject.subject.hash() if isinstance(subject.subject, Recipe) else ""
                yield Evaluation(index, hash_, None, registration.objectives, none, none, 0.0, error=error)
                continue
            prepared = self._rounds.prepare(registration, subject, self.space)  # what is wrong with items is raised
            yield self._evaluate(registration, prepared, index, subject, adapters, stored)

    def evaluate_each(self, questions: Iterator[Question], in_flight: int) -> Iterator[Evaluation]:
        """See Engine. One after the other, in their order."""
        waiting, index = deque(islice(questions, in_flight)), 0
        while waiting:
            registration, subject = waiting.popleft()
            (evaluation,) = self.evaluate(registration, [subject])
            yield replace(evaluation, index=index)
            waiting.extend(islice(questions, 1))
            index += 1

    def _evaluate(
        self,
        asked: Registration,
        prepared: Prepared,
        index: int,
        subject: Subject,
        adapters: Mapping[str, Adapter],
        stored: bool,
    ) -> Evaluation:
        start = time.perf_counter()
        recipe_hash, swap = "", 0.0
        responses, raw, lengths, error = None, {}, None, None
        values = stderrs = np.full(len(asked.objectives), np.nan)
        try:
            recipe = self._recipe(prepared.space, subject)
            recipe_hash = recipe.hash() if recipe is not None else ""
            if recipe is not None:
                joined(self.pool.whole if stored else self.pool, recipe)
            with enough_memory(self.pool.device):
                show = self._showing(recipe, subject, asked.seed, stored)
                answers, swap = self._ask(prepared.rounds, len(asked.items), adapters, show)
            responses, lengths = judged(asked, answers), answers.lengths if lengths_needed(asked) else None
            if responses is None:
                responses, raw = answers.responses, answers.raw
            else:
                cost = 1.0 if recipe is None or not hasattr(prepared.space, "cost") else prepared.space.cost(recipe)
                values, stderrs = estimates(asked, Answered(responses, answers.lengths, cost))
        except LogitsError as problem:
            at = f"{subject}: {problem.where}" if isinstance(subject, str) else problem.where
            error = LogitsError(at, problem.found, problem.expected, problem.hint)
        except BadInput as problem:
            error = problem
        seconds = time.perf_counter() - start
        found = recipe_hash, responses, asked.objectives, values, stderrs, seconds, swap, error, raw, lengths
        return Evaluation(index, *found)

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
        if self.pool.compacted.experts:
            found = f"experts held as {self.pool.compacted.experts}"
            raise BadInput("experts", found, "full: what is learned, is learned of whole experts")
        self._rounds.check_heads(asked)
        template = chat_template(recipe, self.pool) if asked.chat else None
        tasks = []
        for task, positions in asked.tasks().items():
            items = [asked.items[i] for i in positions]
            tasks.append(TaskToLearn(task, items, asked.heads.get(task), experts.get(task), asked.system(task)))
        return tasks, self.pool.words.folder(template)

    def _recipe(self, space: Space | None, subject: Subject) -> Recipe | None:
        """The recipe of a genome, or the one given; None for an endpoint."""
        if isinstance(subject, Varied):
            subject = subject.subject
        if isinstance(subject, Recipe):
            return subject
        if isinstance(subject, str):
            check_endpoint(self.pool, "endpoint", subject)
            return None
        if space is None:
            raise BadInput(
                "genome", "these items were registered without a space", "a recipe, or a registration with a space"
            )
        return space.recipe(subject)

    def show(self, endpoint: str, task: str | None = None) -> None:
        """Bring a task's variant of a packed folder, an endpoint of the pool, into the live model; None: what all tasks
        have in common. Raises BadInput or CheckpointError."""
        self.slot.show(self._rounds.packed(endpoint), endpoint, task)

    def _showing(
        self, recipe: Recipe | None, subject: Subject, seed: int, stored: bool
    ) -> Callable[[str | None], None]:
        """What brings the subject into the live model; of one with variants, that of the task it is given. stored: see
        Taken."""
        if recipe is None and not isinstance(subject, Varied):
            return lambda _: self.slot.load(subject, stored)
        if not isinstance(subject, Varied):
            where = "candidate" if isinstance(subject, np.ndarray) else "recipe"
            return lambda _: self.slot.swap(recipe, seed, where, stored=stored)
        if recipe is not None:
            return lambda task: self.slot.swap(recipe, seed, "recipe", task)
        return lambda task: self.show(subject.subject, task)

    def relative_norms(self, definition: SpaceDefinition) -> np.ndarray:
        """See Engine."""
        space = self.space(definition)
        if not isinstance(space, ParameterSpace):
            raise ConfigError("space", f"a {definition.kind} has no task vectors", SpaceDefinition.kind)
        return relative_norms(space, self.pool)

    def check(self, recipe: Recipe) -> None:
        """See Engine."""
        check_router(recipe)
        with rehearsed(self.pool, recipe) as recipe:
            self.slot.compile(recipe)
            check_recipe(recipe, self.pool)

    def export(self, recipe: Recipe, directory: Path, seed: int = 0, task: str | None = None) -> dict:
        """See Engine."""
        pool = self.pool.whole
        recipe = joined(pool, recipe)
        if task is not None:
            return merge_task(recipe, task, directory, pool, seed)
        check_router(recipe)
        return merge_to_disk(recipe, directory, pool, seed)

    def close(self) -> None:
        """Nothing to give up: pool and slot go with the process."""

    def _ask(
        self,
        rounds: list[Round],
        count: int,
        adapters: Mapping[str, Adapter],
        show: Callable[[str | None], None],
    ) -> tuple[Answers, float]:
        """(what was answered, seconds of bringing the subject into the live model)"""
        responses, raw, lengths, seconds = np.empty(count), {}, np.empty(count), 0.0
        for number, (task, positions, head, scorer, variant) in enumerate(rounds):
            if number == 0 or variant != rounds[number - 1].variant:
                before = time.perf_counter()
                show(variant)
                seconds += time.perf_counter() - before
            self.slot.use_head(head)
            with adapted(self.slot.model, adapters.get(task)):
                answers = scorer.ask(self.slot.model)
            responses[positions], lengths[positions] = answers.responses, answers.lengths
            raw |= {positions[at]: found for at, found in answers.raw.items()}
        return Answers(responses, raw, lengths), seconds

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
