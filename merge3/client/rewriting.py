"""A page that is written again and again, in a thread, while something goes on.

Whole or not at all (files.write_atomically), so that a process that is killed leaves the page before. Pages cost at
most a hundredth of a core: the next one waits a hundred times as long as the last one took.
"""

from __future__ import annotations

import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from merge3.errors import ResourceError
from merge3.files import write_atomically

PAGE = "report.html"
EVERY = 3.0  # seconds between two pages, at least
SHARE = 0.01  # of a core that pages may take
HEARTBEAT = 20.0  # seconds after which a page is written although nothing is new: its readers see that the run lives
PATIENCE = 120.0  # seconds without a new page after which a reader stops asking for one


@dataclass(frozen=True)
class Pace:
    """How the page itself is doing. alive: whether another will follow; state: running, done, stopped or failed; said:
    why, in words; due: whether a page is wanted although nothing is new; every: seconds to the next one; cost: seconds
    of a core that pages took so far; elapsed: of all."""

    alive: bool = True
    state: str = "running"
    said: str = ""
    due: bool = True
    every: float = EVERY
    cost: float = 0.0
    elapsed: float = 0.0


class Rewriting(AbstractContextManager):
    """Calls `look` in a thread of its own, from `begin` on until the block ends, and writes what it returns to `file`.

    look(pace) -> the page; None where nothing is new and none is due. In its last call `pace.alive` is false.
    after: what else is to be done after each look; what it takes is not the pages' cost.

        with Rewriting(Path("report.html"), lambda pace: f"{pace.elapsed:.0f} s") as page:
            page.begin()
    """

    def __init__(
        self,
        file: Path,
        look: Callable[[Pace], str | None],
        every: float = EVERY,
        after: Callable[[], None] = lambda: None,
    ):
        self.file, self._look, self._every, self._after = file, look, every, after
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()
        self._last = Pace(alive=False, state="stopped")
        self._broken = False

    def begin(self) -> None:
        """From now on there is something to see. Further calls do nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name=f"writes {self.file.name}", daemon=True)
            self._thread.start()

    def end(self, state: str, said: str = "") -> None:
        """Write the last page and wait for it. Further calls do nothing."""
        if self._thread is not None and not self._ending.is_set():
            self._last = Pace(alive=False, state=state, said=said)
            self._ending.set()
            self._thread.join()

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.end("done")
        elif isinstance(error, KeyboardInterrupt):
            self.end("stopped")
        else:
            self.end("failed", str(error))

    def _write(self) -> None:
        began, cost, every, written, ended = time.monotonic(), 0.0, self._every, -HEARTBEAT, False
        while not ended:
            ended = self._ending.is_set()  # asked before looking: the last page has all that came until then
            now, before = time.monotonic() - began, time.thread_time()
            pace = self._last if ended else Pace(due=now >= written + HEARTBEAT)
            if self._page(replace(pace, every=every, cost=cost, elapsed=now)):
                written = now
            took = time.thread_time() - before  # of a core: while this thread waits, the run does not
            cost, every = cost + took, max(self._every, took / SHARE)
            self._after()
            if not ended:
                self._ending.wait(every)

    def _page(self, pace: Pace) -> bool:
        try:
            page = self._look(pace)
        except sqlite3.Error:  # the journal is busy: it is read at the next look
            return False
        if page is None or self._broken:
            return False
        try:
            write_atomically(self.file, page)
        except ResourceError as error:
            self._broken = True
            print(f"{error}: {self.file.name} is no longer written", file=sys.stderr)
        return True
