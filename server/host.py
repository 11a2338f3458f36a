"""Where the work is done: pools, their slots, and an engine per registration. One per worker, one thread.

A host holds nothing that cannot be made again from what each call brings along, so a worker may die and
start anew between two calls.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merge3.engine import Evaluation, LocalEngine, PoolInfo
from merge3.errors import BadInput, Cancelled, NotFound
from merge3.export import check_recipe, merge_to_disk
from merge3.fitness import TaskEstimator, mean_over_tasks
from merge3.irt.estimation import Estimator
from merge3.live.slot import Slot
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.space import Space, SpaceDefinition
from merge3.tasks import Item

log = logging.getLogger("merge3.host")
ENGINES = 64  # registrations a host keeps prepared; others are prepared again when they are asked for
Candidate = np.ndarray | Recipe | str  # a genome, a recipe, an endpoint's name


@dataclass(frozen=True)
class PoolSpec:
    """models: as drivers name them, base first. places: path as named -> where it lies."""

    pool_id: str
    models: tuple[str, ...]
    places: dict[str, str]
    dtype: str
    device: str
    memory_budget: int | None = None


@dataclass(frozen=True, eq=False)
class Registration:
    """What RegisterItems fixed."""

    items_id: str
    pool_id: str
    items: tuple[Item, ...]
    seed: int = 0
    chat: bool = False
    heads: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    space: SpaceDefinition | None = None
    estimators: dict[str, Estimator] = field(default_factory=dict)

    def load(self) -> Registration:
        """Itself; where workers are other processes, what stands for it fetches it."""
        return self


class Host:
    """All methods take `stop`, asked before every forward pass, and `emit`, told of progress."""

    def __init__(self):
        self._opened: dict[str, tuple[Pool, Slot]] = {}
        self._closed: set[str] = set()  # what still waits for a pool that was closed must not open it again
        self._engines: OrderedDict[str, tuple[str, LocalEngine]] = OrderedDict()  # items_id -> (pool_id, engine)
        self._stop: Callable[[], bool] = lambda: False

    def open(self, spec: PoolSpec, stop=None, emit=None) -> tuple[PoolInfo, int]:
        """(what the pool is, bytes of it and its live model)"""
        self._closed.discard(spec.pool_id)
        pool, slot = self._pool(spec, emit)
        info = LocalEngine(pool, slot=slot).info()
        weights = sum(t.nbytes for c in pool.endpoints.values() for t in c.tensors.values())
        return info, weights + sum(p.numel() * p.element_size() for p in slot.model.parameters())

    def close(self, pool_id: str, stop=None, emit=None) -> None:
        self._opened.pop(pool_id, None)
        self._closed.add(pool_id)
        self._engines = OrderedDict((i, e) for i, e in self._engines.items() if e[0] != pool_id)

    def register(self, spec: PoolSpec, registration: Registration, stop=None, emit=None) -> int | None:
        """The length of its genomes, None without a space. Raises what is wrong with the items, heads or space."""
        engine = self._engine(spec, registration)
        return engine.space.size if engine.space else None

    def evaluate(self, spec: PoolSpec, registration: Registration, what: Candidate, stop=None, emit=None) -> Evaluation:
        """Merge, ask, estimate. A genome gets the registered estimate; a recipe or an endpoint the plain mean."""
        engine = self._engine(spec, registration)
        with self._stopping(stop):
            if isinstance(what, np.ndarray):
                return next(engine.evaluate([what]))
            began = time.perf_counter()
            _check_endpoint(what, engine.pool)
            responses = engine.answer(what, engine.items)
            value, stderr = mean_over_tasks(responses, engine.items, engine.weights)
            recipe_hash = what.hash() if isinstance(what, Recipe) else ""
            return Evaluation(0, recipe_hash, responses, value, stderr, time.perf_counter() - began)

    def export(self, spec: PoolSpec, recipe: Recipe, directory: str, seed: int, stop=None, emit=None) -> dict[str, Any]:
        def progress(done: int, total: int) -> None:
            if stop and stop():
                raise Cancelled("export", "whoever asked has left")
            if emit:
                emit((done, total))

        return merge_to_disk(recipe, Path(directory), self._pool(spec)[0], seed, progress=progress)

    def check(self, spec: PoolSpec, recipe: Recipe, stop=None, emit=None) -> None:
        """A dry run of swap and export: raises what they would refuse."""
        pool, slot = self._pool(spec)
        slot.compile(recipe)
        check_recipe(recipe, pool)

    def generate(
        self, spec: PoolSpec, what: Recipe | str, seed: int, prompt: str, max_tokens: int, chat: bool, stop=None, emit=None
    ) -> None:
        """Continue a prompt greedily; every piece of text is emitted."""
        from merge3_server.generate import continuation

        pool, slot = self._pool(spec)
        _check_endpoint(what, pool)
        with self._stopping(stop):
            if isinstance(what, Recipe):
                slot.swap(what, seed)
            else:
                slot.load(what)
            for piece in continuation(slot.model, pool.base_checkpoint.path, prompt, max_tokens, chat):
                emit(piece)

    def _pool(self, spec: PoolSpec, emit=None) -> tuple[Pool, Slot]:
        if spec.pool_id in self._closed:
            raise NotFound("pool_id", f"{spec.pool_id!r} was closed meanwhile", "OpenPool first")
        if spec.pool_id not in self._opened:
            where = lambda path: spec.places.get(path, path)
            pool = Pool.open(spec.models[0], spec.models[1:], spec.device, memory_budget=spec.memory_budget, locate=where)
            log.info("pool %s: %s", spec.pool_id[:8], pool.memory.describe())
            pool.read_all(lambda done, total: emit and emit((done, total)))
            slot = Slot(pool, getattr(torch, spec.dtype) if spec.dtype else None)
            slot.model.register_forward_pre_hook(self._between_batches)
            self._opened[spec.pool_id] = (pool, slot)
        return self._opened[spec.pool_id]

    def _engine(self, spec: PoolSpec, registration: Registration) -> LocalEngine:
        if registration.items_id in self._engines:
            self._engines.move_to_end(registration.items_id)
            return self._engines[registration.items_id][1]
        pool, slot = self._pool(spec)
        asked = registration.load()
        for task, head in asked.heads.items():
            if head not in pool.endpoints:
                raise BadInput(f"heads: {task}", f"found {head!r}", ", ".join(pool.endpoints))
        engine = LocalEngine(pool, asked.seed, asked.chat, slot=slot)
        estimate = TaskEstimator(asked.estimators) if asked.estimators else None
        space = Space(asked.space, pool.layouts[pool.base]) if asked.space else None
        engine.register(space, asked.items, asked.heads, asked.weights, estimate)
        self._engines[registration.items_id] = spec.pool_id, engine
        while len(self._engines) > ENGINES:
            self._engines.popitem(last=False)
        return engine

    @contextmanager
    def _stopping(self, stop: Callable[[], bool] | None):
        """Every forward pass asks `stop` first."""
        self._stop = stop or (lambda: False)
        try:
            yield
        finally:
            self._stop = lambda: False

    def _between_batches(self, module, inputs) -> None:
        if self._stop():
            raise Cancelled("candidate", "whoever asked has left, or the deadline has passed")


def _check_endpoint(what: Candidate, pool: Pool) -> None:
    if isinstance(what, str) and what not in pool.endpoints:
        raise BadInput("endpoint", f"found {what!r}", ", ".join(pool.endpoints))
