"""Fits under way: one of each pool, in turns that leave the others theirs.

A turn is a job of its own, and what it ends in crosses to the next: it may run on another worker, and between two of
them whatever waits is done.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from merge3.errors import Busy, RecipeError
from merge3.learn.fit import Fit, check_learned
from merge3.learn.fitting import State
from merge3.recipe import Recipe
from merge3.rpc import fits
from merge3.rpc import merge3_pb2 as pb
from merge3_server.host import PoolSpec, Registered
from merge3_server.pools import Pools
from merge3_server.scheduler import Scheduler
from merge3_server.settings import Limits
from merge3_server.streams import emitting, patiently

log = logging.getLogger("merge3.fits")
_THERE = "a fit in the driver's process"


class Fits:
    """Who fits which pool."""

    def __init__(self, pools: Pools, scheduler: Scheduler, limits: Limits):
        self.pools, self.scheduler, self.limits = pools, scheduler, limits
        self._drivers: dict[str, str] = {}  # pool_id -> whose fit is under way
        self._forgetting: set[asyncio.Task] = set()

    async def steps(
        self, driver: str, spec: PoolSpec, registered: Registered, recipe: Recipe, request: pb.FitRequest
    ) -> AsyncIterator[pb.FitStep]:
        """A fit's steps after the request's state. Raises Busy where the pool has a fit under way, or what is wrong
        with the request."""
        fit, state = await asyncio.to_thread(self._read, recipe, request, spec, registered)
        if spec.pool_id in self._drivers:
            found = f"one is under way with this pool, for {self._drivers[spec.pool_id]!r}"
            raise fits.Occupied("fit", found, "one at a time", "come back when it has ended")
        self._drivers[spec.pool_id] = driver
        steps, known_as = fit.settings.steps, fits.digest(request)
        first, began = state.step if state else 0, time.monotonic()
        try:
            while state is None or state.step < steps:
                self.pools.get(spec.pool_id)  # in use; raises where it was closed meanwhile
                # The first step is a turn of its own, and brings its state: how large that is, is seen at once.
                seconds = self.limits.turn if state else 0.0
                turn = self._turn(driver, spec, registered, known_as, fit, state, seconds)
                async with aclosing(turn) as told:
                    async for kind, value in told:
                        if kind == "emitted":
                            self._check_size(value.state)
                            yield fits.step_to(value)
                        else:
                            state = value
        finally:
            del self._drivers[spec.pool_id]
            self._forget(driver, spec.pool_id)
            done = (state.step if state else 0) - first
            fields = {"driver": driver, "steps": done, "of": steps, "seconds": round(time.monotonic() - began, 4)}
            log.info("fit", extra=fields)

    def _read(
        self, recipe: Recipe, request: pb.FitRequest, spec: PoolSpec, registered: Registered
    ) -> tuple[Fit, State | None]:
        """What is wrong with the request itself is refused before it waits for a turn."""
        check_learned(recipe, "recipe")
        fit = Fit(recipe, dict(request.experts))
        if fit.method.survivors:
            raise RecipeError("recipe: merge_method", f"{recipe.method} makes experts of its own", _THERE)
        if fit.settings.groups is not None:
            raise RecipeError("recipe: fit.groups", "every group opens models of its own", _THERE)
        if recipe.surgery:
            raise RecipeError("recipe: surgery", "a daemon answers without adapters", _THERE)
        if fit.settings.steps > self.limits.steps:
            raise Busy("fit: steps", f"{fit.settings.steps}", f"at most {self.limits.steps}")
        tasks = registered.registration.tasks()
        for task, expert in fit.experts.items():
            if task not in tasks:
                raise RecipeError(f"experts: task {task[:100]!r}", "none of the items'", ", ".join(tasks))
            if expert not in spec.models:
                where = f"fit: items: task {task[:100]!r}: model"
                raise RecipeError(where, f"found {expert[:200]!r}", ", ".join(spec.models))
        if not request.HasField("state"):
            return fit, None
        return fit, fits.state_from(request.state, fit, self.limits.coefficients)

    def _check_size(self, state: State | None) -> None:
        """What a daemon sends, a daemon must take again."""
        if state is not None and state.raw.numel() > self.limits.coefficients:
            found, expected = f"{state.raw.numel()} numbers to learn", f"at most {self.limits.coefficients}"
            raise Busy("fit: level", found, expected, "a coarser level")

    def _turn(self, driver: str, *arguments: Any) -> AsyncIterator[tuple[str, Any]]:
        run = lambda emit: self.scheduler.run(driver, "fit", *arguments, emit=emit)
        return emitting(lambda emit: patiently(lambda: run(emit)))

    def _forget(self, driver: str, pool_id: str) -> None:
        """Have every worker give up what it prepared; nobody waits for that."""
        if not self.scheduler.stopping:
            task = asyncio.create_task(self.scheduler.broadcast(driver, "forget_fit", pool_id))
            self._forgetting.add(task)
            task.add_done_callback(self._forgotten)

    def _forgotten(self, task: asyncio.Task) -> None:
        self._forgetting.discard(task)
        if not task.cancelled() and (error := task.exception()):  # of a daemon that stops, or a worker that has died
            log.debug("fit not forgotten: %s", error)
