"""The run store: a directory whose SQLite journal holds every candidate, committed when it arrives."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merge3.errors import ResourceError, ResumeMismatch

_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS candidates (
    generation INTEGER NOT NULL, position INTEGER NOT NULL,
    genome BLOB NOT NULL, recipe_hash TEXT NOT NULL, responses BLOB,
    value REAL, stderr REAL, seconds REAL NOT NULL, swap_seconds REAL NOT NULL,
    engine TEXT NOT NULL, error TEXT,
    PRIMARY KEY (generation, position)
);
CREATE TABLE IF NOT EXISTS answers (
    stage TEXT NOT NULL, name TEXT NOT NULL, items BLOB NOT NULL, responses BLOB NOT NULL, PRIMARY KEY (stage, name)
);
"""


@dataclass(frozen=True)
class Candidate:
    """A row of the journal. genome, responses: float64; value is NaN for one that failed."""

    generation: int
    position: int
    genome: np.ndarray
    recipe_hash: str
    responses: np.ndarray | None
    value: float
    stderr: float
    seconds: float
    swap_seconds: float
    engine: str
    error: str | None = None


class RunStore:
    """The journal of one run directory."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.directory / "run.db")
            # Each candidate's commit reaches the disk before the next begins: kill -9 loses none.
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ResourceError(self.directory, f"cannot be written ({error})", "a writable directory") from None

    def close(self) -> None:
        self._db.close()

    def begin(self, identity: dict[str, str]) -> bool:
        """Claim the run, or check that it is the same one. True if it already has candidates.

        Raises ResumeMismatch naming the first entry of `identity` that differs.
        """
        stored = dict(self._db.execute("SELECT key, value FROM run"))
        begun = self.count() > 0 or self._db.execute("SELECT COUNT(*) FROM answers").fetchone()[0] > 0
        if not begun:  # one that ended before anything was asked leaves nothing to keep
            with self._db:
                self._db.execute("DELETE FROM run")
                self._db.executemany("INSERT INTO run VALUES (?, ?)", identity.items())
            return False
        for key, value in identity.items():
            if stored.get(key) != value:
                raise ResumeMismatch(
                    self.directory, f"{key} is {_short(value)}, was {_short(stored.get(key))} when the run began",
                    "the same", "start another run directory",
                )  # fmt: skip
        return self.count() > 0

    def append(self, c: Candidate) -> None:
        """Commit one candidate."""
        row = (
            c.generation, c.position, c.genome.tobytes(), c.recipe_hash,
            None if c.responses is None else c.responses.tobytes(),
            None if np.isnan(c.value) else c.value, None if np.isnan(c.stderr) else c.stderr,
            c.seconds, c.swap_seconds, c.engine, c.error,
        )  # fmt: skip
        try:
            with self._db:
                self._db.execute("INSERT INTO candidates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise ResourceError(self.directory / "run.db", f"cannot be written ({error})", "space for the journal") from None

    def remember(self, stage: str, name: str, items: Sequence[int], ask: Callable[[], np.ndarray]) -> np.ndarray:
        """Answers given outside the search (calibration, checks, race): the journal's, else asked and committed.

        items: positions asked. Raises ResumeMismatch if the journal's answers are to other items.
        """
        positions = np.asarray(items, np.int64)
        row = self._db.execute("SELECT items, responses FROM answers WHERE stage = ? AND name = ?", (stage, name)).fetchone()
        if row is not None:
            if row[0] != positions.tobytes():
                raise ResumeMismatch(self.directory, f"{stage} {name} was asked other items", "the items the run began with")
            return np.frombuffer(row[1])
        responses = np.asarray(ask(), np.float64)
        try:
            with self._db:
                self._db.execute("INSERT INTO answers VALUES (?, ?, ?, ?)", (stage, name, positions.tobytes(), responses.tobytes()))
        except sqlite3.Error as error:
            raise ResourceError(self.directory / "run.db", f"cannot be written ({error})", "space for the journal") from None
        return responses

    def answers(self, stage: str) -> int:
        """How many answers a stage has cost."""
        return sum(len(row[0]) // 8 for row in self._db.execute("SELECT responses FROM answers WHERE stage = ?", (stage,)))

    def generation(self, number: int) -> dict[int, Candidate]:
        """Answered candidates of one generation, by position."""
        return {c.position: c for c in self._read("WHERE generation = ?", (number,))}

    def candidates(self) -> list[Candidate]:
        """Every candidate, in the order of the search."""
        return list(self._read())

    def count(self) -> int:
        return self._db.execute("SELECT COUNT(*) FROM candidates").fetchone()[0]

    def _read(self, where: str = "", values: tuple = ()) -> Iterator[Candidate]:
        for row in self._db.execute(f"SELECT * FROM candidates {where} ORDER BY generation, position", values):
            generation, position, genome, recipe_hash, responses, value, stderr, *rest = row
            yield Candidate(
                generation, position, np.frombuffer(genome), recipe_hash,
                None if responses is None else np.frombuffer(responses),
                float("nan") if value is None else value, float("nan") if stderr is None else stderr, *rest,
            )  # fmt: skip


def read_result(directory: str | Path) -> dict:
    """result.json of a finished run."""
    file = Path(directory) / "result.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ResumeMismatch(directory, f"no readable result.json ({error})", "a finished run") from None


def _short(text: str | None) -> str:
    return "nothing" if text is None else text if len(text) <= 40 else text[:37] + "..."
