"""Around every call: who calls, under which request id, how it ended. The one place where errors become statuses."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from contextlib import aclosing
from contextvars import ContextVar

import grpc
from google.protobuf.message import DecodeError

from merge3.errors import BadInput, Busy, Cancelled, Merge3Error
from merge3.rpc import statuses
from merge3_server.metrics import Metrics
from merge3_server.security import Tokens

log = logging.getLogger("merge3.calls")
request_id: ContextVar[str] = ContextVar("request_id", default="-")
_OPEN = ("/grpc.health.v1.Health/",)  # whoever can reach the port may ask whether it serves
_MOST = 1000  # bytes of a text in metadata
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class Around(grpc.aio.ServerInterceptor):
    """Authenticates, names, times, logs and translates."""

    def __init__(self, tokens: Tokens, metrics: Metrics, stalled: float):
        self.tokens, self.metrics, self.stalled = tokens, metrics, stalled

    async def intercept_service(self, continuation, details):
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(details)
        if handler is None:
            return None  # no such method: UNIMPLEMENTED
        kind = next(k for k in _KINDS if getattr(handler, k) is not None)
        act, method = getattr(handler, kind), details.method

        def parsed(data):  # here, and not by gRPC, which would call bytes that are no message an unknown error
            try:
                return handler.request_deserializer(data)
            except DecodeError as error:
                raise BadInput("request", f"not a message ({str(error)[:100]})", f"what {method} takes") from None

        async def each(messages):
            async for data in messages:
                yield parsed(data)

        read = each if kind.startswith("stream") else parsed

        async def unary(request, context):
            async with _Call(self, method, context):
                return await act(read(request), context)

        async def stream(request, context):
            async with _Call(self, method, context):
                found = act(read(request), context)
                if not hasattr(found, "__aiter__"):  # health's Watch writes by itself
                    return await found
                async with aclosing(found):
                    async for response in found:
                        await self._write(context, response)

        return getattr(grpc, f"{kind}_rpc_method_handler")(
            stream if kind.endswith("stream") else unary,
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )

    async def _write(self, context, response) -> None:
        """Flow control makes this wait for a reader; one that has stopped reading holds nothing for long."""
        try:
            await asyncio.wait_for(context.write(response), self.stalled)
        except TimeoutError:
            raise Cancelled("stream", f"not read for {self.stalled:g} s", "a reader") from None
        except grpc.aio.InternalError:  # the reader left between two messages: gRPC could not send this one
            raise Cancelled("stream", "whoever read it has left") from None


class _Call:
    """One call: on the way in the token and the request id, on the way out the status."""

    def __init__(self, around: Around, method: str, context: grpc.aio.ServicerContext):
        self.around, self.method, self.context = around, method, context

    async def __aenter__(self):
        metadata = {k: v for k, v in self.context.invocation_metadata() or () if isinstance(v, str)}
        given = metadata.get("x-request-id", "")
        self.id = given if re.fullmatch(r"[\w.:-]{1,64}", given) else uuid.uuid4().hex[:16]
        request_id.set(self.id)
        self.began = time.perf_counter()
        self.context.set_trailing_metadata((("x-request-id", self.id),))
        if not self.method.startswith(_OPEN):
            try:
                self.around.tokens.check(metadata.get("authorization"))
            except Merge3Error as error:
                await self._fail(error)

    async def __aexit__(self, kind, error, trace):
        if error is None:
            self._ended("OK")
        elif isinstance(error, Merge3Error):
            await self._fail(error)
        elif isinstance(error, asyncio.CancelledError):
            self._ended("CANCELLED")
        elif isinstance(error, grpc.aio.AbortError):
            self._ended(str(self.context.code()))
        elif self.context.cancelled() or self.context.done():  # whoever would read has left in the middle of a write
            self._ended("CANCELLED")
        elif isinstance(error, Exception):
            log.exception("internal error in %s", self.method)
            await self._fail(Merge3Error("internal error", f"request {self.id}, see the daemon's log"))
        return False

    async def _fail(self, error: Merge3Error) -> None:
        self._ended(error.code, error)
        trailing = [
            ("x-request-id", self.id),
            (statuses.ERROR_KEY, statuses.error_to(error, self.id, _MOST).SerializeToString()),
        ]
        if isinstance(error, Busy) and error.retry_after:
            trailing.append(("retry-after-ms", str(round(1000 * error.retry_after))))
        await self.context.abort(grpc.StatusCode[error.code], _printable(error.line()), tuple(trailing))

    def _ended(self, code: str, error: Merge3Error | None = None) -> None:
        seconds = time.perf_counter() - self.began
        self.around.metrics.call(self.method, code, seconds)
        level = logging.DEBUG if code == "OK" or isinstance(error, Cancelled) else logging.INFO
        log.log(
            level,
            "%s %s",
            self.method,
            code,
            extra={"seconds": round(seconds, 4), "error": error.line() if error else None},
        )


def _printable(text: str) -> str:
    """A status message travels in a header: of bounded length and without control characters."""
    return statuses.shortened("".join(c if c.isprintable() else " " for c in text), _MOST)
