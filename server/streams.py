"""Streams: requests answered as they come, with patience where the queue is full, ended where nothing comes; and what
a job emits while it works."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from merge3.errors import Busy, Cancelled


async def answered(
    requests: AsyncIterator, answer: Callable[[Any], Awaitable[Any]], in_flight: int
) -> AsyncIterator[Any]:
    """What `answer` gives for every request, in the order of being done; raises what it, or the stream, raises first.

    in_flight: requests answered at once; the next is read when one is done.
    """
    room, outstanding = asyncio.Semaphore(in_flight), 0
    ready: asyncio.Queue = asyncio.Queue()
    tasks: set[asyncio.Task] = set()
    ended = object()

    async def one(request):
        try:
            ready.put_nowait(await answer(request))
        except Exception as error:  # told to whoever reads `ready`, where it ends the stream
            ready.put_nowait(error)
        finally:
            room.release()

    async def read():
        nonlocal outstanding
        async for request in requests:
            await room.acquire()
            outstanding += 1
            task = asyncio.create_task(one(request))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    reader = asyncio.create_task(read())
    reader.add_done_callback(lambda _: ready.put_nowait(ended))
    try:
        while not reader.done() or outstanding:
            found = await ready.get()
            if found is ended:
                reader.result()  # what it raised
                continue
            outstanding -= 1
            if isinstance(found, Exception):
                raise found
            yield found
    finally:
        for task in (reader, *tasks):
            task.cancel()


async def emitting(run: Callable[[Callable[[Any], None]], Awaitable[Any]]) -> AsyncIterator[tuple[str, Any]]:
    """("emitted", value) for what `run(emit)` emits while it works, from whatever thread, then ("result", value)."""
    loop, emitted = asyncio.get_running_loop(), asyncio.Queue()
    emit = lambda value: loop.call_soon_threadsafe(emitted.put_nowait, ("emitted", value))
    task = asyncio.ensure_future(run(emit))
    task.add_done_callback(lambda _: loop.call_soon(emitted.put_nowait, ("done", None)))
    try:
        while (found := await emitted.get())[0] != "done":
            yield found
        yield "result", (await task).result
    finally:
        task.cancel()


async def patiently(run: Callable[[], Awaitable[Any]]) -> Any:
    """What `run` gives, run again after Busy's own delay; raises Busy where it names none."""
    while True:
        try:
            return await run()
        except Busy as error:
            if not error.retry_after:
                raise
            await asyncio.sleep(error.retry_after)


async def lively(requests: AsyncIterator, seconds: float) -> AsyncIterator:
    """The stream's messages; raises Cancelled where the next does not come in time."""
    while True:
        try:
            yield await asyncio.wait_for(anext(requests), seconds)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Cancelled("stream", f"nothing for {seconds:g} s", "the next message") from None
