"""A progress bar of one line, without importing anything."""

from __future__ import annotations

import sys


def bar(what: str, done: int, total: int) -> None:
    """A percentage that rewrites itself, on a terminal only."""
    if sys.stderr.isatty():
        print(
            f"\r{what} {100 * done / max(1, total):3.0f} %",
            end="\n" if done >= total else "",
            file=sys.stderr,
            flush=True,
        )
