"""RemoteEngine: the Engine protocol over gRPC, for a daemon that holds the models.

A daemon that dies and comes back is waited for: the pool is opened again, registrations cross again, and what was not
yet answered is asked again, under the same idempotency keys.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import grpc
import numpy as np

from merge3 import __version__
from merge3.checkpoint import check_free
from merge3.client.channel import Target, translated
from merge3.client.received import fetched
from merge3.client.register import Registrar
from merge3.client.remote_fit import fit_steps
from merge3.client.remote_stream import PASSING, Daemon, answered
from merge3.engine import Evaluation, Operated, PoolInfo, Question, Subject, Taken, Varied
from merge3.errors import Busy, Cancelled, ItemsError, Merge3Error, NotFound, ResumeMismatch, Unavailable
from merge3.fitness import Answered, estimates, judged
from merge3.learn.fit import Fit, FitStep
from merge3.learn.fitting import State
from merge3.learn.surgery import Operation, Surgery
from merge3.recipe import Recipe, Tokenizer
from merge3.registration import Registration
from merge3.rpc import convert, merge3_pb2_grpc, spaces
from merge3.rpc import merge3_pb2 as pb
from merge3.space import SpaceDefinition
from merge3.tasks.items import located
from merge3.tasks.score import Answers

T = TypeVar("T")
PATIENCE = 600.0  # seconds that a daemon may be away


class RemoteEngine:
    """A pool on a daemon. models: base first, as the daemon's roots have them.

    patience: seconds to wait for a daemon that is away, or whose queue is full, before giving up.
    note: told once when waiting begins and when it ends. tokenizer, tower, experts: see Pool.open; where it says
    nothing of experts, the daemon's settings do.

        with contextlib.closing(RemoteEngine("127.0.0.1:50051", ["base", "math", "code"])) as engine:
            (evaluation,) = engine.evaluate(Registration(tuple(read_items("items.jsonl"))), ["math"])
    """

    def __init__(
        self,
        target: Target | str,
        models: Sequence[str],
        dtype: str | None = None,
        patience: float = PATIENCE,
        note: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
        tokenizer: Tokenizer | None = None,
        tower: Mapping[str, str] | None = None,
        experts: str = "",
    ):
        self.target = Target(target) if isinstance(target, str) else target
        self.models, self.dtype = tuple(models), dtype
        self.tokenizer, self.tower, self.experts = tokenizer, dict(tower or {}), experts
        self.patience, self.note = patience, note
        self._name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._keys = itertools.count()
        self._metadata = (*self.target.metadata(), ("merge3-driver", self._name))
        self._channel = self.target.channel()
        self._stub = merge3_pb2_grpc.Merge3Stub(self._channel)
        self._registrar = Registrar(self._send)
        # The registration asked last, and its id as long as the daemon is known to have it.
        self._registered: tuple[Registration | None, str] = None, ""
        self._info: PoolInfo | None = None
        # The first connection is not waited for: a wrong address should be told at once.
        self._open()

    def info(self) -> PoolInfo:
        """See Engine."""
        return self._info

    def prepare(self, registration: Registration, recipe: Recipe | None = None) -> None:
        """See Engine. What the daemon has seen before crosses as hashes only."""
        self._persist(lambda: self._register(registration))

    def evaluate(self, registration: Registration, subjects: Sequence[Subject]) -> Iterator[Evaluation]:
        """See Engine. One stream for all subjects; after a broken one only what is missing is asked again."""
        return self.evaluate_each(((registration, subject) for subject in subjects), len(subjects))

    def evaluate_each(self, questions: Iterator[Question], in_flight: int) -> Iterator[Evaluation]:
        """See Engine. One stream for all; after a broken one as above."""
        locate = lambda registration, request: self._persist(lambda: self._address(registration, [request]))
        how = self._stub, self._metadata, self._request, locate, self._recover, self.patience
        with contextlib.closing(answered(Daemon(self.target.address, *how), questions, in_flight)) as evaluations:
            for registration, message in evaluations:
                yield self._whole(convert.evaluation_from(message), registration)

    def fit(
        self,
        registration: Registration,
        fit: Fit,
        state: State | None = None,
        told: Callable[[str], None] = lambda line: None,
    ) -> Iterator[FitStep]:
        """See Engine. One stream; after a broken one the daemon goes on from the last state that it sent."""

        def begin(request: pb.FitRequest) -> grpc.Call:
            self._persist(lambda: self._address(registration, [request]))
            return self._stub.Fit(request, metadata=self._metadata)

        where = self.target.address, self.patience
        return fit_steps(registration, fit, state, begin, self._recover, *where)

    def operate(self, registration: Registration, recipe: Recipe, surgery: Surgery) -> Operation:
        """See Engine. Not there yet: raises Unavailable."""
        raise _not_there(self.target.address)

    def relative_norms(self, definition: SpaceDefinition) -> np.ndarray:
        """See Engine."""
        return self._persist(lambda: self._norms(definition))

    def check(self, recipe: Recipe) -> None:
        """See Engine."""
        self._persist(lambda: self._dry_run(recipe))

    def export(self, recipe: Recipe, directory: Path, seed: int = 0, task: str | None = None) -> dict:
        """Write the merged checkpoint here: the daemon merges, its files cross, the directory appears whole."""
        check_free(Path(directory))
        return self._persist(lambda: self._fetch(recipe, Path(directory), seed, task or ""))

    def forget_fit(self) -> None:
        """See Engine."""

    def close(self) -> None:
        """Give the pool up. What fails is not told: the daemon closes idle pools by itself."""
        with contextlib.suppress(grpc.RpcError):
            self._stub.ClosePool(pb.ClosePoolRequest(pool_id=self._pool_id), metadata=self._metadata, timeout=5)
        self._channel.close()

    # -- one try each

    def _open(self) -> None:
        with self._translated():
            request = pb.OpenPoolRequest(
                models=self.models,
                dtype=self.dtype or "",
                tokenizer=spaces.tokenizer_to(self.tokenizer),
                tower=self.tower,
                experts=self.experts,
            )
            pool = self._stub.OpenPool(request, metadata=self._metadata)
        info = convert.pool_from(pool, self.target.address)
        if pool.version != __version__ and self._info is None:
            versions = f"{self.target.address} runs merge3 {pool.version}, this is {__version__}"
            self.note(f"{versions}: its answers may differ from ours")
        if self._info is not None and info.content_hashes != self._info.content_hashes:
            changed = next(m for m in info.endpoints if info.content_hashes[m] != self._info.content_hashes.get(m))
            raise ResumeMismatch(
                self.target.address, f"{changed} has other weights than before", "the checkpoints the run began with"
            )
        if self._info is not None and self._info.files and info.files and self._info.files != info.files:
            changed = min({name for name, _ in self._info.files.items() ^ info.files.items()})
            raise ResumeMismatch(self.target.address, f"{changed} has changed", "the files the run began with")
        self._info, self._pool_id, self._registered = info, pool.pool_id, (None, "")

    def _register(self, registration: Registration) -> str:
        if self._registered[0] is not registration:
            self._registered = registration, self._registrar.register(self._pool_id, registration)
        return self._registered[1]

    def _send(self, requests: Iterator[pb.RegisterItemsRequest]) -> pb.RegisterItemsResponse:
        with self._translated():
            return self._stub.RegisterItems(requests, metadata=self._metadata)

    def _norms(self, definition: SpaceDefinition) -> np.ndarray:
        with self._translated():
            request = pb.RelativeNormsRequest(pool_id=self._pool_id, space=spaces.space_to(definition))
            return np.array(self._stub.RelativeNorms(request, metadata=self._metadata).values)

    def _request(self, index: int, subject: Subject) -> pb.EvaluateRequest:
        request = pb.EvaluateRequest(index=index, idempotency_key=f"{self._name}-{next(self._keys)}")
        if isinstance(subject, Recipe):
            request.recipe = convert.recipe_to(subject)
        elif isinstance(subject, str):
            request.endpoint = subject
        elif isinstance(subject, Operated):
            raise _not_there(self.target.address)
        elif isinstance(subject, Varied):
            return self._of_task(index, subject)
        elif isinstance(subject, Taken):
            request = self._request(index, subject.subject)
            request.stored = subject.stored
        else:
            request.genome.values.extend(subject)
        return request

    def _of_task(self, index: int, subject: Varied) -> pb.EvaluateRequest:
        if (subject.tasks is None and isinstance(subject.subject, str)) or len(set(subject.tasks or ())) > 1:
            found, hint = (
                "items of several tasks of a packed folder, or a router",
                "its recipe, or a task at a time",
            )
            raise Unavailable(self.target.address, found, "one task for all items, or a recipe", hint)
        request = self._request(index, subject.subject)
        request.task = subject.tasks[0] if subject.tasks else ""
        return request

    def _address(self, registration: Registration, requests: Iterable[pb.EvaluateRequest | pb.FitRequest]) -> None:
        items_id = self._register(registration)
        for request in requests:
            request.pool_id, request.items_id = self._pool_id, items_id

    def _whole(self, evaluation: Evaluation, registration: Registration) -> Evaluation:
        """With what only the driver knows: the file and line of an item that an error is about, and what the answers
        to documents are worth."""
        if isinstance(evaluation.error, ItemsError):
            return replace(evaluation, error=located(evaluation.error, registration.items))
        if not evaluation.raw:
            return evaluation
        try:
            responses = judged(registration, Answers(evaluation.responses, evaluation.raw, evaluation.lengths))
        except ItemsError as error:
            return replace(evaluation, responses=None, raw={}, error=error)
        if responses is None:
            return evaluation
        values, stderrs = estimates(registration, Answered(responses, evaluation.lengths, evaluation.cost))
        return replace(evaluation, responses=responses, values=values, stderrs=stderrs, raw={})

    def _fetch(self, recipe: Recipe, directory: Path, seed: int, task: str) -> dict:
        request = pb.ExportRequest(pool_id=self._pool_id, recipe=convert.recipe_to(recipe), seed=seed, task=task)

        def begin() -> Iterator[pb.ExportResponse]:
            with self._translated():
                yield from self._stub.Export(request, metadata=self._metadata)

        result = fetched(begin, check_free(directory))
        return {
            "path": str(directory),
            "tensors": result.tensors,
            "parameters": result.parameters,
            "kept": dict(result.kept),
        }

    def _dry_run(self, recipe: Recipe) -> None:
        request = pb.ExportRequest(pool_id=self._pool_id, recipe=convert.recipe_to(recipe), dry_run=True)
        with self._translated():
            for _ in self._stub.Export(request, metadata=self._metadata):
                pass

    # -- persistence

    def _persist(self, act: Callable[[], T]) -> T:
        """`act`, again while the daemon is away, full, or has forgotten."""
        until = time.monotonic() + self.patience
        for attempt in itertools.count():
            try:
                return act()
            except PASSING as error:
                self._recover(error, until, attempt)

    def _recover(self, error: Merge3Error, until: float, attempt: int) -> None:
        """Wait until it makes sense to try again; raises the error where it does not."""
        if isinstance(error, NotFound):
            if attempt > 2:
                raise error
            return self._reopen(until)
        if isinstance(error, Busy):
            if not error.retry_after or time.monotonic() > until:
                raise error
            return time.sleep(error.retry_after)
        if isinstance(error, Cancelled) and attempt > 2:
            raise error
        if time.monotonic() > until:
            raise error
        if attempt == 0:
            self.note(f"{self.target.address} is away ({error}); waiting up to {self.patience:.0f} s")
        time.sleep(min(2.0, 0.1 * 2**attempt))
        self._reopen(until)
        if attempt == 0:
            self.note(f"{self.target.address} is back")

    def _reopen(self, until: float) -> None:
        """Open the pool again, whatever the daemon remembers of it."""
        for attempt in itertools.count():
            try:
                return self._open()
            except (Unavailable, Cancelled) as error:
                if time.monotonic() > until:
                    raise error
                time.sleep(min(2.0, 0.1 * 2**attempt))

    def _translated(self):
        return translated(self.target.address)


def _not_there(address: str) -> Unavailable:
    return Unavailable(address, "a daemon answers without adapters", "surgery in this process: no --server")
