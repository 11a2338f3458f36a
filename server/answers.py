"""One answer per idempotency key: a call that comes again, while the first is under way or after, shares it."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from merge3.errors import BadInput

T = TypeVar("T")


@dataclass(eq=False)
class _Entry:
    request: bytes
    task: asyncio.Task
    callers: int = 0
    ended: float = float("inf")


class Answers:
    """Remembers successes for `seconds`, `most` of them. What failed is done again when asked again."""

    def __init__(self, seconds: float, most: int):
        self.seconds, self.most = seconds, most
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    async def once(self, key: str, request: bytes, act: Callable[[], Awaitable[T]]) -> T:
        """The answer to `key`. request: a digest; the same key for another request is refused.

        The work is stopped when every caller that waits for it has left.
        """
        if not key:
            return await act()
        self._expire()
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(request, asyncio.ensure_future(act()))
            entry.task.add_done_callback(lambda task: self._done(key, entry, task))
        elif entry.request != request:
            raise BadInput("idempotency_key", f"{key[:80]!r} was used for another request", "a key of its own for each")
        entry.callers += 1
        try:
            return await asyncio.shield(entry.task)
        finally:
            entry.callers -= 1
            if not entry.callers and not entry.task.done():
                self._entries.pop(key, None)  # who asks next begins anew
                entry.task.cancel()

    def _done(self, key: str, entry: _Entry, task: asyncio.Task) -> None:
        entry.ended = time.monotonic()
        failed = task.cancelled() or task.exception() is not None
        if failed and self._entries.get(key) is entry:
            del self._entries[key]

    def _expire(self) -> None:
        old = time.monotonic() - self.seconds
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if entry.ended > old and len(self._entries) <= self.most:
                break
            if not entry.task.done():
                self._entries.move_to_end(key)  # under way: keep
                break
            del self._entries[key]
