"""A look at a run's journal while another thread, or another process, writes it: read only, and only what is new."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

_NEW = """
SELECT c.rowid, c.generation, c.position, length(c.responses) / 8, c.seconds, c.engine, c.error,
       e.objective, e.value, e.stderr
FROM candidates c JOIN estimates e USING (generation, position)
WHERE c.rowid > ? ORDER BY c.rowid, e.place
"""


class Seen(NamedTuple):
    """A candidate without its genome and responses. values, stderrs: one per objective, None for one that failed;
    answers: how many items it was asked; engine: `local`, or the daemon that answered."""

    generation: int
    position: int
    answers: int
    seconds: float
    engine: str
    error: str | None
    objectives: tuple[str, ...]
    values: tuple[float | None, ...]
    stderrs: tuple[float | None, ...]


class JournalReader:
    """The journal of a run directory, in which it exists. For one thread, the one that makes it.

    with contextlib.closing(JournalReader("runs/first")) as reader:
        print(len(reader.new()), "candidates until now")
    """

    def __init__(self, directory: str | Path):
        # Opened for writing, which it never does: whoever closes the file last tidies it up, and could not otherwise.
        self._db = sqlite3.connect(f"file:{quote(str(Path(directory).resolve() / 'run.db'))}?mode=rw", uri=True)
        self._db.execute("PRAGMA query_only = ON")
        self._last = 0

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def new(self) -> list[Seen]:
        """Candidates committed since the last call, in the order in which they came. Raises sqlite3.Error."""
        found: dict[int, tuple] = {}
        for row, *own, objective, value, stderr in self._db.execute(_NEW, (self._last,)):
            entry = found.setdefault(row, (own, [], [], []))
            for column, cell in zip(entry[1:], (objective, value, stderr)):
                column.append(cell)
        self._last = max(found, default=self._last)
        seen = []
        for (generation, position, answers, *rest), *columns in found.values():
            seen.append(Seen(generation, position, answers or 0, *rest, *map(tuple, columns)))
        return seen

    def answers(self) -> dict[str, int]:
        """What every stage beside the search (calibration, check, race) has cost so far. Raises sqlite3.Error."""
        # Of the items, not of what came back: several numbers may be kept of each answer.
        return dict(self._db.execute("SELECT stage, SUM(length(items)) / 8 FROM answers GROUP BY stage"))
