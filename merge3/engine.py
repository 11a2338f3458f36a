"""The engine: what a search needs, whoever provides it. LocalEngine does it in this process.

A driver registers items and a space once, then sends genomes and receives responses; weights, prompts
and the space never cross again. Several engines may stand behind this protocol.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from merge3.checkpoint.layout import Layout
from merge3.errors import BadInput, ConfigError, ResourceError
from merge3.export import check_recipe, merge_to_disk
from merge3.fitness import EstimateOf, mean_over_tasks
from merge3.live.slot import Slot
from merge3.methods import METHODS
from merge3.pool import Pool
from merge3.program import compile
from merge3.recipe import Recipe
from merge3.space import DENSITY_STEPS, Space
from merge3.tasks import Item, LogitsError, Scorer

_SCORERS = 64  # prepared sets of items kept: races and checks ask ever new ones


@dataclass(frozen=True)
class Evaluation:
    """One candidate's answers. responses: float64 [items]; value: estimated accuracy; error: why there is none."""

    index: int
    recipe_hash: str
    responses: np.ndarray | None
    value: float
    stderr: float
    seconds: float
    swap_seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class PoolInfo:
    """What a driver may know of a pool. endpoints: base first; layout: the base's, what a Space is met with;
    kept: tensors that are not merged, with the reason; where: `local`, or the daemon asked; warnings: what makes models
    seem not to belong together."""

    endpoints: tuple[str, ...]
    content_hashes: dict[str, str]
    parameters: int
    kept: dict[str, str]
    device: str
    layout: Layout
    where: str = "local"
    warnings: tuple[str, ...] = ()


class Engine(Protocol):
    """The protocol of LocalEngine and of an engine behind a wire."""

    def info(self) -> PoolInfo: ...
    def register(
        self, space: Space | None, items: Sequence[Item], heads: dict[str, str] | None = None,
        weights: dict[str, float] | None = None, estimate: EstimateOf | None = None,
    ) -> None: ...
    def evaluate(self, genomes: Sequence[np.ndarray]) -> Iterator[Evaluation]: ...
    def answer(self, what: Recipe | str, items: Sequence[Item]) -> np.ndarray: ...
    def check(self, recipe: Recipe) -> None: ...
    def export(self, recipe: Recipe, directory: Path) -> dict: ...
    def close(self) -> None: ...


class LocalEngine:
    """Pool, slot and scorer in this process.

    seed: of random keeps, the same for every candidate, so that candidates differ by their genes alone.
    dtype: of the live model; what the recipes to come will be exported in (default: the endpoints').
    slot: one that this engine shares with others, which then take turns.
    """

    def __init__(self, pool: Pool, seed: int = 0, chat: bool = False, dtype: torch.dtype | None = None, slot: Slot | None = None):
        self.pool, self.seed, self.chat = pool, seed, chat
        self.slot = slot or Slot(pool, dtype)
        self.heads: dict[str, str] = {}
        self._scorers: dict[tuple, Scorer] = {}

    def info(self) -> PoolInfo:
        parameters = sum(int(np.prod(t.shape)) for t in self.pool.base_checkpoint.tensors.values())
        return PoolInfo(
            tuple(self.pool.endpoints), self.pool.content_hashes(), parameters, dict(self.pool.kept), str(self.pool.device),
            self.pool.layouts[self.pool.base], warnings=tuple(self.pool.warnings),
        )  # fmt: skip

    def register(
        self, space: Space | None, items: Sequence[Item], heads: dict[str, str] | None = None,
        weights: dict[str, float] | None = None, estimate: EstimateOf | None = None,
    ) -> None:
        """Fix what `evaluate` decodes, asks and counts. heads: task -> the endpoint whose head answers it;
        weights: task -> its weight in the estimate; estimate: from responses to accuracy, default the mean."""
        self.space, self.items, self.heads, self.weights = space, list(items), dict(heads or {}), weights
        self.estimate = estimate or mean_over_tasks
        self._rounds = self._by_task(self.items)
        if space is not None:
            self._check_depths()
            self._prefetch()

    def evaluate(self, genomes: Sequence[np.ndarray]) -> Iterator[Evaluation]:
        """Swap, ask and estimate each genome. A candidate that cannot be merged or asked is reported, not
        raised; what is no candidate's fault (memory, a caller who left) is raised."""
        for index, genome in enumerate(genomes):
            start = time.perf_counter()
            recipe_hash, swap = "", 0.0
            try:
                recipe = self.space.recipe(genome)
                recipe_hash = recipe.hash()
                before = time.perf_counter()
                with _enough_memory(self.pool.device):
                    self.slot.swap(recipe, self.seed, "candidate")
                    swap = time.perf_counter() - before
                    responses = self._ask(self._rounds, len(self.items))
                value, stderr = self.estimate(responses, self.items, self.weights)
                yield Evaluation(index, recipe_hash, responses, value, stderr, time.perf_counter() - start, swap)
            except BadInput as error:
                seconds = time.perf_counter() - start
                yield Evaluation(index, recipe_hash, None, float("nan"), float("nan"), seconds, swap, str(error))

    def answer(self, what: Recipe | str, items: Sequence[Item]) -> np.ndarray:
        """Responses of a recipe's merge, or of an endpoint by name, to any items: float64 [items].

        Raises LogitsError where it has none to give.
        """
        with _enough_memory(self.pool.device):
            if isinstance(what, Recipe):
                self.slot.swap(what, self.seed)
                return self._ask(self._by_task(items), len(items))
            self.slot.load(what)
            try:
                return self._ask(self._by_task(items, what), len(items))
            except LogitsError as error:
                raise LogitsError(f"{what}: {error.where}", error.found, error.expected, error.hint) from None

    def check(self, recipe: Recipe) -> None:
        """A dry run: raises what swapping or exporting the recipe would refuse, reads and writes no weights."""
        self.slot.compile(recipe)
        check_recipe(recipe, self.pool)

    def export(self, recipe: Recipe, directory: Path) -> dict:
        """Write the merged checkpoint; see export.merge_to_disk."""
        return merge_to_disk(recipe, directory, self.pool, self.seed)

    def close(self) -> None:
        """Nothing to give up: pool and slot go with the process."""

    def _by_task(self, items: Sequence[Item], endpoint: str | None = None) -> list[tuple[list[int], str, Scorer]]:
        """(positions, head, scorer) per task. A task's head is its own, else the endpoint's asked, else the base's."""
        positions: dict[str, list[int]] = {}
        for i, item in enumerate(items):
            positions.setdefault(item.task, []).append(i)
        rounds = []
        for task, at in positions.items():
            head = self.heads.get(task) or endpoint or self.pool.base
            key = (tuple(items[i] for i in at), head if self.pool.heads else None)
            if key not in self._scorers:
                self.slot.use_head(head)  # the labels are the head's
                self._scorers[key] = Scorer(key[0], self.slot.model, self.pool.base_checkpoint.path, self.chat)
                while len(self._scorers) > _SCORERS:
                    del self._scorers[next(iter(self._scorers))]
            rounds.append((at, head, self._scorers[key]))
        return rounds

    def _ask(self, rounds: list[tuple[list[int], str, Scorer]], count: int) -> np.ndarray:
        responses = np.empty(count)
        for at, head, scorer in rounds:
            self.slot.use_head(head)
            responses[at] = scorer.score(self.slot.model)
        return responses

    def _check_depths(self) -> None:
        """A space's layer ranges are the base's: of a deeper model the rest would be lost without a word."""
        depth = self.space.layout.layers
        for model in self.space.definition.models:
            found = self.pool.layouts[model].layers if model in self.pool.layouts else depth
            if found != depth:
                raise ConfigError("genome: models", f"{model} has {found} layers, the base {depth}", "models of equal depth")

    def _prefetch(self) -> None:
        """Thresholds at every density a search can name, for all tensors in one pass over the weights."""
        method = METHODS[self.space.definition.method]
        if "density" not in self.space.own or "gamma" in method.parameters or method.stochastic:
            return
        program = compile(self.space.uniform_recipe(), self.pool)
        self.pool.statistics.prefetch_order(
            (job.base, source, {max(1, int(job.numel * j / DENSITY_STEPS)) for j in range(1, DENSITY_STEPS)})
            for job in program.jobs
            if job.numel
            for source in job.sources
        )


@contextmanager
def _enough_memory(device: torch.device):
    """Out of memory as a ResourceError with numbers; the pool and the next candidate are none the worse."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        wanted = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", str(error))
        if not isinstance(error, torch.OutOfMemoryError) and wanted is None:
            raise
        free = ""
        if device.type == "cuda":
            torch.cuda.empty_cache()
            free = f", {torch.cuda.mem_get_info(device)[0] / 2**30:.2f} GiB free of {torch.cuda.mem_get_info(device)[1] / 2**30:.2f}"
        raise ResourceError(
            str(device), f"out of memory: {wanted[1] if wanted else 'more'} needed{free}", "fewer experts, or shorter items"
        ) from None
