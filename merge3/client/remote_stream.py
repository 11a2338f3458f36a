"""Questions to a daemon and its evaluations: one stream that is fed as they come, and how one that breaks is taken up
again: what is missing is asked again, in the same order and under the same idempotency keys."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grpc

from merge3.client.channel import translated
from merge3.engine import Question, Subject
from merge3.errors import Busy, Cancelled, Merge3Error, NotFound, Unavailable
from merge3.registration import Registration
from merge3.rpc import merge3_pb2 as pb
from merge3.rpc import merge3_pb2_grpc

PASSING = (Unavailable, Cancelled, NotFound, Busy)  # what may be gone at the next try


class Daemon(NamedTuple):
    """How it is asked. request: what is sent of a subject, with its index; locate: puts pool and registration into a
    request, however long that takes; recover(error, until, attempt): waits until it makes sense to ask again, or raises
    the error; patience: seconds that it may be away."""

    address: str
    stub: merge3_pb2_grpc.Merge3Stub
    metadata: tuple
    request: Callable[[int, Subject], pb.EvaluateRequest]
    locate: Callable[[Registration, pb.EvaluateRequest], None]
    recover: Callable[[Merge3Error, float, int], None]
    patience: float


def answered(
    daemon: Daemon, questions: Iterator[Question], in_flight: int
) -> Iterator[tuple[Registration, pb.Evaluation]]:
    """Every question's evaluation, once, as they come; see Engine.evaluate_each."""
    waiting: dict[int, tuple[Registration, pb.EvaluateRequest]] = {}
    index, more, stream = 0, True, None
    failures, until = 0, 0.0
    try:
        while True:
            while more and len(waiting) < in_flight:
                if more := (question := next(questions, None)) is not None:
                    waiting[index] = question[0], daemon.request(index, question[1])
                    if stream is not None:  # else all that waits is sent
                        _send(daemon, stream, waiting[index])
                    index += 1
            if not waiting:
                return
            if stream is None:
                # A stream takes two milliseconds more than a call, which a generation shares.
                stream = _Stream(daemon) if in_flight > 1 else _Calls(daemon)
                for known in waiting.values():
                    _send(daemon, stream, known)
            if not more:
                stream.end()
            try:
                with translated(daemon.address):
                    message = next(stream.messages, None)
            except PASSING as error:
                stream.close()
                stream = None
                until = until if failures else time.monotonic() + daemon.patience
                daemon.recover(error, until, failures)
                failures += 1
                continue
            if message is None:  # ended before its time
                stream.close()
                stream = None
            elif (known := waiting.pop(message.index, None)) is not None:
                failures = 0
                yield known[0], message
    finally:
        if stream is not None:
            stream.close(whole=not more and not waiting)


def _send(daemon: Daemon, stream: _Stream | _Calls, asked: tuple[Registration, pb.EvaluateRequest]) -> None:
    daemon.locate(*asked)
    stream.send(asked[1])


class _Stream:
    """An EvaluateStream that is open as long as more may be asked."""

    def __init__(self, daemon: Daemon):
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        self.send = self._requests.put
        self.messages = daemon.stub.EvaluateStream(iter(self._requests.get, None), metadata=daemon.metadata)

    def end(self) -> None:
        """Nothing more will be asked."""
        self.send(None)

    def close(self, whole: bool = False) -> None:
        """whole: all is answered, so the daemon ends it by itself."""
        self.end()  # lets the thread go that waits for the next request
        if whole:
            with contextlib.suppress(grpc.RpcError):
                next(self.messages, None)
        self.messages.cancel()


class _Calls:
    """A call for each request, one at a time."""

    def __init__(self, daemon: Daemon):
        self._requests: list[pb.EvaluateRequest] = []
        self.send = self._requests.append
        ask = lambda: daemon.stub.Evaluate(self._requests.pop(), metadata=daemon.metadata)
        self.messages = iter(ask, None)

    def end(self) -> None:
        """See _Stream."""

    def close(self, whole: bool = False) -> None:
        """See _Stream."""
