"""Where the work is done: pools and their engines. One per worker, one thread.

A host holds nothing that cannot be made again from what each call brings along, so a worker may die and
start anew between two calls.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merge3.engine import Evaluation, LocalEngine, PoolInfo, Subject
from merge3.errors import BadInput, Cancelled, NotFound
from merge3.experts import FULL, Experts
from merge3.export import merge_to_disk
from merge3.export_task import check_router, check_task, merge_task
from merge3.joined import joined
from merge3.learn.fit import Fit
from merge3.learn.fitting import State
from merge3.packaging import chat_template
from merge3.pool import Pool
from merge3.recipe import Recipe, Tokenizer
from merge3.registration import Registration
from merge3.space import SpaceDefinition

log = logging.getLogger("merge3.host")
REGISTRATIONS = 64  # that a host keeps loaded; others are fetched and prepared again when they are asked for


@dataclass(frozen=True)
class PoolSpec:
    """models: as drivers name them, base first. places: path as named -> where it lies. tokenizer: of every recipe.
    tower, experts: see Pool.open. stamp: of the files as they are; another where one was changed."""

    pool_id: str
    models: tuple[str, ...]
    places: dict[str, str]
    dtype: str
    device: str
    memory_budget: int | None = None
    tokenizer: Tokenizer | None = None
    tower: dict[str, str] = field(default_factory=dict)
    experts: Experts = FULL
    stamp: str = ""


@dataclass(frozen=True, eq=False)
class Registered:
    """A registration under the id that drivers know it by."""

    items_id: str
    pool_id: str
    registration: Registration

    def load(self) -> Registration:
        """The registration; where workers are other processes, what stands for this fetches it."""
        return self.registration


class Host:
    """All methods take `stop`, asked before every forward pass, and `emit`, told of progress."""

    def __init__(self):
        self._opened: dict[str, LocalEngine] = {}
        self._closed: set[str] = set()  # what still waits for a pool that was closed must not open it again
        self._registrations: OrderedDict[str, tuple[str, Registration]] = OrderedDict()  # items_id -> (pool_id, it)
        self._fits: dict[str, tuple[str, Fit]] = {}  # pool_id -> (what it is known as, the object the engine knows)
        self._stop: Callable[[], bool] = lambda: False

    def open(self, spec: PoolSpec, stop=None, emit=None) -> tuple[PoolInfo, int]:
        """(what the pool is, bytes of it and its live model)"""
        self._closed.discard(spec.pool_id)
        engine = self._engine(spec, emit)
        weights = sum(t.nbytes for c in engine.pool.endpoints.values() for t in c.tensors.values())
        if spec.experts:
            weights = engine.pool.memory.resident + engine.pool.memory.compact
        return engine.info(), weights + sum(p.numel() * p.element_size() for p in engine.slot.model.parameters())

    def close(self, pool_id: str, stop=None, emit=None) -> None:
        """Forget a pool, its live model and its registrations."""
        self._opened.pop(pool_id, None)
        self._fits.pop(pool_id, None)
        self._closed.add(pool_id)
        self._registrations = OrderedDict((i, r) for i, r in self._registrations.items() if r[0] != pool_id)

    def register(self, spec: PoolSpec, registered: Registered, stop=None, emit=None) -> int | None:
        """The length of its genomes, None without a space. Raises what is wrong with the items, heads or space."""
        engine, asked = self._engine(spec), self._registration(registered)
        engine.prepare(asked)
        return engine.space(asked.space).size if asked.space is not None else None

    def evaluate(self, spec: PoolSpec, registered: Registered, subject: Subject, stop=None, emit=None) -> Evaluation:
        """Merge, ask, estimate."""
        engine = self._engine(spec)
        with self._stopping(stop):
            return next(engine.evaluate(self._registration(registered), [subject]))

    def fit(
        self,
        spec: PoolSpec,
        registered: Registered,
        known_as: str,
        fit: Fit,
        state: State | None,
        seconds: float,
        stop=None,
        emit=None,
    ) -> State | None:
        """Steps after `state`'s, each emitted; those of `seconds`, or one. Returns the state after them.

        known_as: the same for the same fit; what is prepared for the last one of a pool is kept, until `forget_fit`.
        """
        engine = self._engine(spec)
        key, known = self._fits.get(spec.pool_id, ("", fit))
        if key != known_as:
            known = fit
            self._fits[spec.pool_id] = known_as, known
        with self._stopping(stop):
            for step in engine.fit(self._registration(registered), known, state, log.debug, seconds):
                emit(step)
                state = step.state or state
        return state

    def forget_fit(self, pool_id: str, stop=None, emit=None) -> None:
        """Give up what was prepared for a fit."""
        self._fits.pop(pool_id, None)
        if pool_id in self._opened:
            self._opened[pool_id].forget_fit()

    def export(
        self, spec: PoolSpec, recipe: Recipe, directory: str, seed: int, task: str = "", stop=None, emit=None
    ) -> dict[str, Any]:
        """Write the merged checkpoint; emits (done, total). task: of a recipe with a model for each, whose alone.
        Returns what merge_to_disk does. Raises Cancelled."""

        def progress(done: int, total: int) -> None:
            if stop and stop():
                raise Cancelled("export", "whoever asked has left")
            if emit:
                emit((done, total))

        where = Path(directory), self._engine(spec).pool.whole, seed
        recipe = joined(where[1], recipe)
        if task:
            return merge_task(recipe, task, *where, progress=progress)
        check_router(recipe)
        return merge_to_disk(recipe, *where, progress=progress)

    def relative_norms(self, spec: PoolSpec, definition: SpaceDefinition, stop=None, emit=None) -> np.ndarray:
        """Of a space's genes; see Engine."""
        return self._engine(spec).relative_norms(definition)

    def check(self, spec: PoolSpec, recipe: Recipe, task: str = "", stop=None, emit=None) -> None:
        """A dry run of swap and export: raises what they would refuse."""
        if task:
            check_task(recipe, task)
            recipe = replace(recipe, router={})  # it sends prompts to all of them
        self._engine(spec).check(recipe)

    def generate(
        self,
        spec: PoolSpec,
        what: Recipe | str,
        seed: int,
        prompt: str,
        max_tokens: int,
        chat: bool,
        task: str = "",
        stop=None,
        emit=None,
    ) -> None:
        """Continue a prompt greedily; every piece of text is emitted. task: of a recipe with a model for each, or of an
        endpoint that is a packed folder, whose."""
        from merge3_server.generate import continuation

        engine = self._engine(spec)
        pool, slot = engine.pool, engine.slot
        if isinstance(what, str) and what not in pool.endpoints:
            raise BadInput("endpoint", f"found {what!r}", ", ".join(pool.endpoints))
        with self._stopping(stop):
            template = None
            if isinstance(what, Recipe):
                what = joined(pool, what)
                if task:
                    check_task(what, task)
                slot.swap(what, seed, task=task or None)
                template = chat_template(what, pool) if chat else None
            elif task:
                engine.show(what, task)
            else:
                slot.load(what)
            for piece in continuation(slot.model, pool.words.folder(template), prompt, max_tokens, chat):
                emit(piece)

    def _engine(self, spec: PoolSpec, emit=None) -> LocalEngine:
        if spec.pool_id in self._closed:
            raise NotFound("pool_id", f"{spec.pool_id!r} was closed meanwhile", "OpenPool first")
        if spec.pool_id not in self._opened:
            where = lambda path: spec.places.get(path, path)
            settings = {"memory_budget": spec.memory_budget, "tokenizer": spec.tokenizer, "tower": spec.tower}
            settings["experts_as"] = spec.experts
            pool = Pool.open(spec.models[0], spec.models[1:], spec.device, locate=where, **settings)
            log.info("pool %s: %s", spec.pool_id[:8], pool.memory.describe())
            pool.read_all(lambda done, total: emit and emit((done, total)))
            engine = LocalEngine(pool, getattr(torch, spec.dtype) if spec.dtype else None)
            engine.slot.model.register_forward_pre_hook(self._between_batches)
            self._opened[spec.pool_id] = engine
        return self._opened[spec.pool_id]

    def _registration(self, registered: Registered) -> Registration:
        """The same object every time, by which the engine knows what it has prepared."""
        if registered.items_id not in self._registrations:
            self._registrations[registered.items_id] = registered.pool_id, registered.load()
            while len(self._registrations) > REGISTRATIONS:
                self._registrations.popitem(last=False)
        self._registrations.move_to_end(registered.items_id)
        return self._registrations[registered.items_id][1]

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
