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
from itertools import islice, takewhile
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from merge3.abreast import Groups
from merge3.errors import BadInput, ConfigError, ResourceError
from merge3.export import check_recipe, merge_to_disk
from merge3.export_task import check_router, merge_task
from merge3.joined import joined, rehearsed
from merge3.learn.fit import Fit, FitStep
from merge3.learn.fitting import State
from merge3.learn.surgery import Operation, Surgery
from merge3.learning import Learning
from merge3.live.heads import own_heads
from merge3.live.hooks import Adapter, adapted
from merge3.live.slot import Slot
from merge3.memory import enough_memory
from merge3.methods import VARIANTS
from merge3.pool import Pool
from merge3.pool_space import space_over
from merge3.program import tied_outputs
from merge3.protocol import Engine, Evaluation, Operated, PoolInfo, Question, Subject, Taken, Varied
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.rounds import Prepared, Round, Rounds, check_endpoint, evaluation
from merge3.space import ParameterSpace, Space, SpaceDefinition, cost_of
from merge3.space.norms import relative_norms
from merge3.tasks import LogitsError
from merge3.tasks.score import Answers

__all__ = ["Engine", "Evaluation", "LocalEngine", "Operated", "PoolInfo", "Question", "Subject", "Taken", "Varied"]


T = TypeVar("T")


class LocalEngine:
    """Pool, slot and scorers in this process.

        engine = LocalEngine(Pool.open("base", ["math", "code"]))
        (evaluation,) = engine.evaluate(Registration(tuple(read_items("items.jsonl"))), ["math"])

    dtype: of the live model; what the recipes to come will be exported in (default: the endpoints').
    slot: one that this engine shares with others, which then take turns. abreast: genomes that are merged and asked at
    one read of the models (default: as many as pay); their answers are the same.
    """

    def __init__(
        self, pool: Pool, dtype: torch.dtype | None = None, slot: Slot | None = None, abreast: int | None = None
    ):
        self.pool, self.slot = pool, slot or Slot(pool, dtype)
        self._groups = Groups(self.slot, abreast)
        self._spaces: dict[str, Space] = {}
        self._rounds = Rounds(self.slot)
        self._learning = Learning(self.slot, self._rounds)

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
            files=self.pool.words.files,
        )

    def prepare(self, registration: Registration, recipe: Recipe | None = None) -> None:
        """See Engine."""
        self._rounds.prepare(registration, recipe, self.space)

    def space(self, definition: SpaceDefinition) -> Space:
        """The space over this pool's layout, its statistics computed. Raises ConfigError where models do not fit it."""
        key = definition.hash()
        if key not in self._spaces:
            self._spaces[key] = self._with_room(lambda: space_over(definition, self.slot))
        return self._spaces[key]

    def evaluate(self, registration: Registration, subjects: Sequence[Subject]) -> Iterator[Evaluation]:
        """See Engine."""
        left = list(enumerate(subjects))
        while left:
            genomes = takewhile(lambda entry: isinstance(entry[1], np.ndarray), left)
            most = 1 if self._learning.prepared else self._groups.size()  # a fit between two steps has its room
            group = list(islice(genomes, most)) or left[:1]
            del left[: len(group)]
            found = self._evaluate_together(registration, group) if len(group) > 1 else None
            yield from found or (self._evaluate_one(registration, index, subject) for index, subject in group)

    def _evaluate_one(self, registration: Registration, index: int, subject: Subject) -> Evaluation:
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
            self._with_room(lambda: joined(self.pool, subject))
        error = self._rounds.refused(registration, subject)
        if error is not None:
            hash_ = subject.subject.hash() if isinstance(subject.subject, Recipe) else ""
            return evaluation(registration, index, hash_, error, 1.0, 0.0)
        prepared = self._rounds.prepare(registration, subject, self.space)  # what is wrong with items is raised
        return self._evaluate(registration, prepared, index, subject, adapters, stored)

    def _evaluate_together(
        self, asked: Registration, genomes: Sequence[tuple[int, np.ndarray]]
    ) -> list[Evaluation] | None:
        """None where they are to be asked one after the other."""
        prepared = self._rounds.prepare(asked, genomes[0][1], self.space)
        if not isinstance(prepared.space, ParameterSpace) or own_heads(self.pool):
            return None
        if any(round_.head is not None or round_.variant is not None for round_ in prepared.rounds):
            return None
        rounds = [(round_.positions, round_.scorer) for round_ in prepared.rounds]
        if not self._groups.takes(rounds):
            return None
        start, compiled = time.perf_counter(), []
        try:
            for _, genome in genomes:
                recipe = prepared.space.recipe(genome)
                self._with_room(lambda recipe=recipe: joined(self.pool, recipe))
                compiled.append((recipe, self.slot.compile(recipe, "candidate")))
            with enough_memory(self.pool.device):
                programs = [program for _, program in compiled]
                found = self._groups.ask(programs, rounds, len(asked.items), asked.seed)
        except BadInput:  # whose it is, is found by asking each for itself
            return None
        except ResourceError:
            self._groups.fewer()
            return None
        if found is None:
            return None
        evaluations, seconds = [], (time.perf_counter() - start) / len(genomes)
        for (index, _), (recipe, _), answers in zip(genomes, compiled, found[0]):
            cost = cost_of(prepared.space, recipe)
            told = evaluation(asked, index, recipe.hash(), answers, cost, found[1] / len(genomes))
            evaluations.append(replace(told, seconds=seconds))
        return evaluations

    def evaluate_each(self, questions: Iterator[Question], in_flight: int) -> Iterator[Evaluation]:
        """See Engine. One after the other, in their order."""
        waiting, index = deque(islice(questions, in_flight)), 0
        while waiting:
            registration, subject = waiting.popleft()
            (found,) = self.evaluate(registration, [subject])
            yield replace(found, index=index)
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
        recipe_hash, swap, cost = "", 0.0, 1.0
        try:
            recipe = self._recipe(prepared.space, subject)
            recipe_hash = recipe.hash() if recipe is not None else ""
            if recipe is not None:
                self._with_room(lambda: joined(self.pool.whole if stored else self.pool, recipe))
                cost = cost_of(prepared.space, recipe)
            with enough_memory(self.pool.device):
                show = self._showing(recipe, subject, asked.seed, stored)
                answers, swap = self._ask(prepared.rounds, len(asked.items), adapters, show)
        except LogitsError as problem:
            at = f"{subject}: {problem.where}" if isinstance(subject, str) else problem.where
            answers = LogitsError(at, problem.found, problem.expected, problem.hint)
        except BadInput as problem:
            answers = problem
        told = evaluation(asked, index, recipe_hash, answers, cost, swap)
        return replace(told, seconds=time.perf_counter() - start)

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
        self._groups.give_up()
        with enough_memory(self.pool.device):
            yield from self._learning.fit(registration, fit, state, told, seconds)

    def forget_fit(self) -> None:
        """See Engine: what experts said takes memory."""
        self._learning.forget()

    def operate(self, registration: Registration, recipe: Recipe, surgery: Surgery) -> Operation:
        """See Engine."""
        self._groups.give_up()
        return self._learning.operate(registration, recipe, surgery)

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

    def _with_room(self, act: Callable[[], T]) -> T:
        """What it does, if need be with the room that candidates abreast took of a budget."""
        try:
            return act()
        except BadInput:
            if not self._groups.give_up():
                raise
            return act()

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
