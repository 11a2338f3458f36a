"""The engine: what a search needs, whoever provides it. LocalEngine does it in this process.

A driver says once, in a Registration, what subjects are asked and how answers count, and then which subjects; weights,
prompts and the space never cross again. Several engines may stand behind this protocol.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from merge3.checkpoint.layout import Layout
from merge3.errors import BadInput, ConfigError, Merge3Error
from merge3.export import check_recipe, merge_to_disk
from merge3.fitness import check_objectives, estimates, judged
from merge3.live.slot import Slot
from merge3.memory import enough_memory
from merge3.methods import METHODS
from merge3.packaging import chat_template, template_key
from merge3.pool import Pool
from merge3.program import compile
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.space import Space, SpaceDefinition
from merge3.tasks import Item, LogitsError, Scorer
from merge3.tasks.documents import Raw
from merge3.tasks.score import Answers

_SCORERS = 64  # prepared sets of items kept: races and checks ask ever new ones
_REGISTRATIONS = 64

Subject = np.ndarray | Recipe | str  # a genome of the registration's space, a recipe, an endpoint's name


@dataclass(frozen=True)
class Evaluation:
    """One subject's answers.

    index: of the subject. responses: float64 [items]. objectives: names of values and stderrs, each float64
    [objectives], NaN where there are no responses; error: why not. raw: position -> what the asks of a document came
    to, where its judge is not here (whose response is then NaN).
    """

    index: int
    recipe_hash: str
    responses: np.ndarray | None
    objectives: tuple[str, ...]
    values: np.ndarray
    stderrs: np.ndarray
    seconds: float
    swap_seconds: float = 0.0
    error: Merge3Error | None = None
    raw: Mapping[int, Raw] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """Of the first objective."""
        return float(self.values[0])

    @property
    def stderr(self) -> float:
        """Of the first objective."""
        return float(self.stderrs[0])

    def answers(self) -> np.ndarray:
        """The responses; raises what kept the subject from giving any."""
        if self.error is not None:
            raise self.error
        if self.raw:
            raise BadInput("documents", f"{len(self.raw)} without a judge", "judges in the registration")
        return self.responses


@dataclass(frozen=True)
class PoolInfo:
    """What a driver may know of a pool.

    endpoints: base first; layout: the base's, what a Space is met with; kept: tensors that are not merged, with the
    reason; host: `local`, or the address of the daemon asked; warnings: what makes models seem not to belong together;
    notes: where language models are merged into one with eyes or ears.
    """

    endpoints: tuple[str, ...]
    content_hashes: dict[str, str]
    parameters: int
    kept: dict[str, str]
    device: str
    layout: Layout
    host: str = "local"
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Engine(Protocol):
    """The protocol of LocalEngine and of an engine behind a wire."""

    def info(self) -> PoolInfo:
        """What the pool is; asks nothing of the models."""

    def prepare(self, registration: Registration) -> None:
        """Tokenise items, open the space, compute its statistics. Raises BadInput for what evaluating would refuse.
        `evaluate` does it by itself; what can be refused at the start should be."""

    def evaluate(self, registration: Registration, subjects: Sequence[Subject]) -> Iterator[Evaluation]:
        """Merge, ask and estimate each subject; evaluations come as they are ready, `index` says whose.

        A subject that cannot be merged or asked has its error in the evaluation; what is no subject's fault (memory, a
        caller who left, a daemon that is away) is raised.
        """

    def check(self, recipe: Recipe) -> None:
        """A dry run: raises what merging or exporting the recipe would refuse. Reads and writes no weights."""

    def export(self, recipe: Recipe, directory: Path, seed: int = 0) -> dict:
        """Write the merged checkpoint; see export.merge_to_disk.

        Raises RecipeError, CheckpointError or ResourceError.
        """

    def close(self) -> None:
        """Give up what the engine holds elsewhere."""


class _Round(NamedTuple):
    """The items of one task: their positions among the registration's, the endpoint whose head answers (None: the
    merge's own), what asks."""

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
        )

    def prepare(self, registration: Registration) -> None:
        """See Engine."""
        self._prepare(registration, None)

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
            prepared = self._prepare(registration, subject)  # what is wrong with items is raised
            yield self._evaluate(registration, prepared, index, subject)

    def _evaluate(self, asked: Registration, prepared: _Prepared, index: int, subject: Subject) -> Evaluation:
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
                answers = self._ask(prepared.rounds, len(asked.items))
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
            for task, head in asked.heads.items():
                self._check_endpoint(f"heads: {task}", head)
            space = None if asked.space is None else self.space(asked.space)
            spoken = recipe or (space and space.uniform_recipe())
            template = chat_template(spoken, self.pool) if asked.chat and spoken is not None else None
            rounds = []
            for task, positions in asked.tasks().items():
                head = asked.heads.get(task) or endpoint
                items = tuple(asked.items[i] for i in positions)
                rounds.append(_Round(positions, head, self._scorer(items, head, asked.system(task), template)))
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

    def _ask(self, rounds: list[_Round], count: int) -> Answers:
        responses, raw = np.empty(count), {}
        for positions, head, scorer in rounds:
            self.slot.use_head(head)
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
