"""What a terminal is shown, without importing anything: a progress bar of one line, and many lines as few."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

FEW = 20  # tensors that are named one by one


def bar(what: str, done: int, total: int) -> None:
    """A percentage that rewrites itself, on a terminal only."""
    if sys.stderr.isatty():
        print(
            f"\r{what} {100 * done / max(1, total):3.0f} %",
            end="\n" if done >= total else "",
            file=sys.stderr,
            flush=True,
        )


def in_few_lines(reasons: Mapping[str, str]) -> Iterator[str]:
    """`name (reason)` of every tensor; of a reason that more than FEW have, in one line how many and the first two."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        if len(names) > FEW:
            yield f"{len(names)} tensors, {names[0]}, {names[1]}, .. ({reason})"
        else:
            yield from (f"{name} ({reason})" for name in names)
