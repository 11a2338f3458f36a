"""Every call of proto/merge3/v1/merge3.proto: messages in, the scheduler's answers out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from merge3 import __version__
from merge3.engine import Subject, Taken
from merge3.errors import BadInput, Busy, RecipeError
from merge3.files import resource_error
from merge3.recipe import Recipe
from merge3.rpc import convert, merge3_pb2_grpc, spaces
from merge3.rpc import merge3_pb2 as pb
from merge3_server import streams
from merge3_server.answers import Answers
from merge3_server.catalog import Accepted, Catalog, Gathering
from merge3_server.export import sent_files
from merge3_server.fit import Fits
from merge3_server.metrics import Metrics, resident_bytes
from merge3_server.pools import Pools
from merge3_server.scheduler import Done, Scheduler
from merge3_server.security import export_directory
from merge3_server.settings import Settings
from merge3_server.subjects import genome_of, of_task

log = logging.getLogger("merge3.candidates")
IN_FLIGHT = 64  # of one EvaluateStream; the next request is read when one is answered


class Service(merge3_pb2_grpc.Merge3Servicer):
    """Thin: no call decides anything that a driver embedded in its own process would decide otherwise."""

    def __init__(self, settings: Settings, scheduler: Scheduler, metrics: Metrics):
        self.settings, self.limits, self.scheduler, self.metrics = settings, settings.limits, scheduler, metrics
        self.catalog = Catalog(self.limits, lambda name, where: self.pools.roots.file(name, where))
        self.pools = Pools(settings, scheduler, self.catalog)
        self.answers = Answers(self.limits.retention, self.limits.answers)
        self.fits = Fits(self.pools, scheduler, self.limits)
        self.began = time.monotonic()
        metrics.watch(lambda: scheduler.queued, lambda: len(self.pools.list()))

    # -- pools

    async def OpenPool(self, request, context):
        """See the proto."""
        tokenizer = spaces.tokenizer_from(request.tokenizer) if request.HasField("tokenizer") else None
        asked = tuple(request.models), request.dtype, tokenizer, dict(request.tower), request.experts
        return (await self.pools.open(_driver(context), *asked)).message()

    async def ListPools(self, request, context):
        """See the proto."""
        return pb.ListPoolsResponse(pools=[entry.message() for entry in self.pools.list()])

    async def ClosePool(self, request, context):
        """See the proto."""
        return pb.ClosePoolResponse(holders=await self.pools.close(_driver(context), request.pool_id))

    # -- items

    async def RegisterItems(self, requests, context):
        """See the proto. A pool that is not open is refused at the header, before anything large is sent."""
        gathering = Gathering(self.catalog)
        async for request in streams.lively(requests, self.limits.stalled):
            gathering.add(request)
            if gathering.header is not None and not gathering.digests:
                self.pools.get(gathering.header.pool_id)  # before anything large is sent
        registered, response = gathering.finish()
        if registered is None:
            return response
        entry = self.pools.get(registered.pool_id)
        if self.catalog.registered.get(registered.items_id) is None:
            done = await self.scheduler.run(_driver(context), "register", entry.spec, registered)
            self.catalog.registered.put(registered.items_id, Accepted(registered, done.result), 1)
        return response

    async def RelativeNorms(self, request, context):
        """See the proto."""
        entry, definition = self.pools.get(request.pool_id), spaces.space_from(request.space)
        done = await self.scheduler.run(_driver(context), "relative_norms", entry.spec, definition)
        return pb.RelativeNormsResponse(values=done.result)

    # -- subjects

    async def Evaluate(self, request, context):
        """See the proto."""
        return await self._evaluate(request, _driver(context))

    async def EvaluateStream(self, requests, context):
        """See the proto. At most IN_FLIGHT requests are answered at once."""
        driver = _driver(context)
        answered = streams.answered(requests, lambda request: self._evaluate(request, driver, patient=True), IN_FLIGHT)
        async with contextlib.aclosing(answered) as evaluations:
            async for evaluation in evaluations:
                yield evaluation

    async def _evaluate(self, request: pb.EvaluateRequest, driver: str, patient: bool = False) -> pb.Evaluation:
        """patient: where the queue is full wait, as a stream's next request does, rather than refuse."""
        entry = self.pools.get(request.pool_id)
        accepted = self.catalog.accepted(request.pool_id, request.items_id)
        subject = await self._subject(request, accepted, entry.spec.models)
        if request.task:
            subject = of_task(subject, request.task, accepted)
        if request.HasField("stored"):
            if not isinstance(subject, Recipe | str):
                raise BadInput(
                    "stored", f"given with a {request.WhichOneof('subject')}", "a recipe or an endpoint, of no task"
                )
            subject = Taken(subject, request.stored)
        if len(request.idempotency_key) > 200:
            raise BadInput("idempotency_key", f"{len(request.idempotency_key)} characters", "at most 200")
        run = lambda: self.scheduler.run(driver, "evaluate", entry.spec, accepted.registered, subject)
        body = pb.EvaluateRequest()
        body.CopyFrom(request)
        body.index = 0  # the same question may come back at another place
        act = (lambda: streams.patiently(run)) if patient else run
        done = await self.answers.once(request.idempotency_key, convert.digest(body), lambda: self._logged(act, driver))
        return convert.evaluation_to(done.result, request.index, done.queue_seconds, done.worker)

    async def _logged(self, run: Callable[[], Awaitable[Done]], driver: str) -> Done:
        done = await run()
        found = done.result
        answers = 0 if found.responses is None else len(found.responses)
        self.metrics.candidate(found.seconds, found.swap_seconds, done.queue_seconds, answers, found.error is not None)
        log.info(
            "candidate",
            extra={
                "driver": driver,
                "recipe": found.recipe_hash or None,
                "value": _number(found.value),
                "stderr": _number(found.stderr),
                "answers": answers,
                "seconds": round(found.seconds, 4),
                "queued": round(done.queue_seconds, 4),
                "worker": done.worker,
                "failed": str(found.error) if found.error else None,
            },
        )
        return done

    async def _subject(self, request: pb.EvaluateRequest, accepted: Accepted, models: tuple[str, ...]) -> Subject:
        """What is wrong with the request itself is refused before it waits for a turn."""
        which = request.WhichOneof("subject")
        if which == "genome":
            return genome_of(request.genome.values, accepted.genome_size)
        if which is None:
            raise BadInput("subject", "none", "a genome, a recipe or an endpoint")
        return await self._recipe_or_endpoint(request, which, models)

    async def _recipe_or_endpoint(self, request, which: str, models: tuple[str, ...]) -> Recipe | str:
        if which == "endpoint":
            if request.endpoint not in models:
                raise BadInput("endpoint", f"found {request.endpoint[:200]!r}", ", ".join(models))
            return request.endpoint
        if len(request.recipe) > self.limits.recipe:
            raise Busy("recipe", f"{len(request.recipe)} characters", f"at most {self.limits.recipe}")
        recipe = await asyncio.to_thread(convert.recipe_from, request.recipe)
        for model in recipe.models():
            if str(model) not in models and str(model) not in recipe.merged:
                raise RecipeError("recipe", f"model {str(model)!r} is not in the pool", ", ".join(models))
        return recipe

    # -- learned merges

    async def Fit(self, request, context):
        """See the proto."""
        entry = self.pools.get(request.pool_id)
        accepted = self.catalog.accepted(request.pool_id, request.items_id)
        recipe = await self._recipe_or_endpoint(request, "recipe", entry.spec.models)
        asked = self.fits.steps(_driver(context), entry.spec, accepted.registered, recipe, request)
        async with contextlib.aclosing(asked) as steps:
            async for step in steps:
                yield step

    # -- checkpoints and text

    async def Export(self, request, context):
        """See the proto. A checkpoint that is sent lies in a temporary directory until the stream ends."""
        entry = self.pools.get(request.pool_id)
        recipe = await self._recipe_or_endpoint(request, "recipe", entry.spec.models)
        temporary = None
        if request.dry_run:
            await self.scheduler.run(_driver(context), "check", entry.spec, recipe, request.task)
            yield pb.ExportResponse(result=pb.ExportResult())
            return
        if request.directory:
            directory = export_directory(self.settings.export_root, request.directory)
        else:
            try:
                temporary = tempfile.mkdtemp(prefix="merge3-export-", dir=self.settings.export_root)
            except OSError as error:
                raise resource_error(Path(self.settings.export_root or tempfile.gettempdir()), error) from None
            directory = Path(temporary) / "model"
        try:
            arguments = (entry.spec, recipe, str(directory), request.seed, request.task)
            # Closed before the directory is removed: a merge under way is stopped first.
            async with contextlib.aclosing(self._emitting(_driver(context), "export", *arguments)) as emitted:
                async for kind, value in emitted:
                    if kind == "emitted":
                        yield pb.ExportResponse(progress=pb.ExportProgress(done=value[0], total=value[1]))
                    else:
                        result = pb.ExportResult(
                            tensors=value["tensors"], parameters=value["parameters"], kept=value["kept"]
                        )
            if temporary is None:
                result.path = str(directory)
            else:
                async for chunk in sent_files(directory, result.files):
                    yield pb.ExportResponse(chunk=chunk)
            yield pb.ExportResponse(result=result)
        finally:
            if temporary:
                await asyncio.shield(asyncio.to_thread(shutil.rmtree, temporary, ignore_errors=True))

    async def Generate(self, request, context):
        """See the proto."""
        entry = self.pools.get(request.pool_id)
        which = request.WhichOneof("candidate")
        if which is None:
            raise BadInput("candidate", "none", "a recipe or an endpoint")
        what = await self._recipe_or_endpoint(request, which, entry.spec.models)
        if not 0 <= request.max_tokens <= self.limits.tokens:
            raise BadInput(
                "max_tokens", f"found {request.max_tokens}", f"0 (as many as fit, up to 64) to {self.limits.tokens}"
            )
        asked = request.prompt, request.max_tokens, request.chat, request.task
        arguments = (entry.spec, what, request.seed, *asked)
        async with contextlib.aclosing(self._emitting(_driver(context), "generate", *arguments)) as emitted:
            async for kind, value in emitted:
                if kind == "emitted":
                    yield pb.GenerateResponse(text=value)

    def _emitting(self, driver: str, call: str, *arguments: Any) -> AsyncIterator[tuple[str, Any]]:
        return streams.emitting(lambda emit: self.scheduler.run(driver, call, *arguments, emit=emit))

    # -- status

    async def Status(self, request, context):
        """See the proto."""
        return self._status()

    async def Watch(self, request, context):
        """See the proto. Ends with UNAVAILABLE when the daemon stops."""
        interval = request.interval_seconds or 1.0
        if not math.isfinite(interval) or not 0.05 <= interval <= 3600:
            raise BadInput("interval_seconds", f"found {interval}", "0.05 to 3600")
        while True:
            yield self._status()
            self.scheduler.refuse_if_stopping()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.scheduler.ending.wait(), interval)

    def _status(self) -> pb.StatusResponse:
        s, now = self.scheduler, time.monotonic()
        return pb.StatusResponse(
            version=__version__,
            state="stopping" if s.stopping else "serving",
            uptime_seconds=now - self.began,
            pools=[entry.message() for entry in self.pools.list()],
            queued=s.queued,
            queue_limit=self.limits.queue,
            workers=[
                pb.Worker(name=w.name, device=w.device, pid=w.pid, busy_with=_doing(s.busy.get(w.name)))
                for w in s.workers
            ],
            drivers=[
                pb.Driver(
                    name=name, queued=len(state.jobs), evaluated=state.evaluated, idle_seconds=now - state.last_seen
                )
                for name, state in list(s.drivers.items())[-100:]
            ],
            evaluated=s.evaluated,
            candidates_per_minute=s.rate(),
            retention_seconds=self.limits.retention,
            resident_bytes=resident_bytes(),
        )


def _driver(context) -> str:
    """Who asks: the name it gives itself, else its connection."""
    for key, value in context.invocation_metadata() or ():
        if key == "merge3-driver" and isinstance(value, str):
            return value[:100]
    return context.peer()


def _doing(job) -> str:
    return f"{job.call} for {job.driver}" if job else ""


def _number(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
