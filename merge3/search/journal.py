"""The journal of a run: an SQLite file in its directory that holds every candidate, committed when it arrives."""

from __future__ import annotations

import json
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merge3.errors import Merge3Warning, ResourceError, ResumeMismatch

_COLUMNS = "generation, position, genome, recipe_hash, responses, seconds, swap_seconds, engine, error"
_CANDIDATES = """
CREATE TABLE IF NOT EXISTS candidates (
    arrived INTEGER PRIMARY KEY,
    generation INTEGER NOT NULL, position INTEGER NOT NULL,
    genome BLOB NOT NULL, recipe_hash TEXT NOT NULL, responses BLOB,
    seconds REAL NOT NULL, swap_seconds REAL NOT NULL,
    engine TEXT NOT NULL, error TEXT,
    UNIQUE (generation, position)
);
"""
_SCHEMA = f"""
{_CANDIDATES}
CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS estimates (
    generation INTEGER NOT NULL, position INTEGER NOT NULL, place INTEGER NOT NULL,
    objective TEXT NOT NULL, value REAL, stderr REAL,
    PRIMARY KEY (generation, position, place)
);
CREATE TABLE IF NOT EXISTS answers (
    stage TEXT NOT NULL, name TEXT NOT NULL, items BLOB NOT NULL, responses BLOB NOT NULL, PRIMARY KEY (stage, name)
);
"""
# Journals from before there were several objectives: a candidate's only value stood in its own row.
_ONE_VALUE = """
INSERT OR IGNORE INTO estimates SELECT generation, position, 0, 'accuracy', value, stderr FROM candidates;
ALTER TABLE candidates DROP COLUMN value;
ALTER TABLE candidates DROP COLUMN stderr;
"""
# From before an order was kept in which candidates came: rows stand in it.
_IN_ORDER = f"""
ALTER TABLE candidates RENAME TO unnumbered;
{_CANDIDATES}
INSERT INTO candidates ({_COLUMNS}) SELECT {_COLUMNS} FROM unnumbered ORDER BY rowid;
DROP TABLE unnumbered;
"""
_BEFORE = {"experts": "full"}  # what runs had that began before there was a choice


@dataclass(frozen=True)
class Candidate:
    """What is known of one. genome, responses: float64; values, stderrs: float64, one per objective, NaN for one that
    failed."""

    generation: int
    position: int
    genome: np.ndarray
    recipe_hash: str
    responses: np.ndarray | None
    objectives: tuple[str, ...]
    values: np.ndarray
    stderrs: np.ndarray
    seconds: float
    swap_seconds: float
    engine: str
    error: str | None = None

    @property
    def value(self) -> float:
        """Of the first objective."""
        return float(self.values[0])

    @property
    def stderr(self) -> float:
        """Of the first objective."""
        return float(self.stderrs[0])


class Journal:
    """The journal of one run directory.

    with contextlib.closing(Journal("runs/first")) as journal:
        for candidate in journal.candidates():
            print(candidate.generation, candidate.value, candidate.stderr)
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.directory / "run.db")
            # Each candidate's commit reaches the disk before the next begins: kill -9 loses none.
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
            columns = {column[1] for column in self._db.execute("PRAGMA table_info(candidates)")}
            if "value" in columns:
                self._db.executescript(f"BEGIN; {_ONE_VALUE} COMMIT;")
            if "arrived" not in columns:
                self._db.executescript(f"BEGIN; {_IN_ORDER} COMMIT;")
        except (OSError, sqlite3.Error) as error:
            raise ResourceError(self.directory, f"cannot be written ({error})", "a writable directory") from None

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def begin(
        self,
        identity: dict[str, str],
        beside: Mapping[str, Mapping[str, str]] | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> bool:
        """Claim the run, or check that it is the same one. True if it already has candidates.

        beside: as identity.beside gives it; what a run does not know that an earlier version began is not compared.
        versions: others are a Merge3Warning. Raises ResumeMismatch naming the first entry of the others that differs.
        """
        stored, beside, versions = self.identity(), beside or {}, versions or {}
        if not self.begun:  # one that ended before anything was asked leaves nothing to keep
            told = {what: json.dumps(digests) for what, digests in beside.items()}
            with self._db:
                self._db.execute("DELETE FROM run")
                self._db.executemany("INSERT INTO run VALUES (?, ?)", (identity | told | dict(versions)).items())
            return False
        stored = _BEFORE | stored
        for key, value in identity.items():
            self._same(key, stored.get(key), value)
        for what, digests in beside.items():
            before = json.loads(stored.get(what, "{}"))
            for name in sorted({**before, **digests}) if before and digests else ():
                self._same(name, before.get(name), digests.get(name))
        for name, version in versions.items():
            if (before := stored.get(name, version)) != version:
                line = f"{self.directory}: {name} is {version}, was {before} when the run began: answers may differ"
                warnings.warn(line, Merge3Warning, stacklevel=2)
        return self.count() > 0

    def _same(self, key: str, before: str | None, now: str | None) -> None:
        if before != now:
            found = f"{key} is {_short(now)}, was {_short(before)} when the run began"
            raise ResumeMismatch(self.directory, found, "the same", "start another run directory")

    @property
    def begun(self) -> bool:
        """Whether anything was asked; what `identity` says of a run that has not begun counts for nothing."""
        return self.count() > 0 or self._db.execute("SELECT COUNT(*) FROM answers").fetchone()[0] > 0

    def identity(self) -> dict[str, str]:
        """What `begin` was told when the run began; empty in a new directory."""
        return dict(self._db.execute("SELECT key, value FROM run"))

    def append(self, c: Candidate) -> None:
        """Commit one candidate."""
        responses = None if c.responses is None else c.responses.tobytes()
        row = (
            c.generation,
            c.position,
            c.genome.tobytes(),
            c.recipe_hash,
            responses,
            c.seconds,
            c.swap_seconds,
            c.engine,
            c.error,
        )
        estimates = [
            (c.generation, c.position, place, name, _null(value), _null(stderr))
            for place, (name, value, stderr) in enumerate(zip(c.objectives, c.values, c.stderrs))
        ]
        try:
            with self._db:
                self._db.execute(f"INSERT INTO candidates ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
                self._db.executemany("INSERT INTO estimates VALUES (?, ?, ?, ?, ?, ?)", estimates)
        except sqlite3.Error as error:
            raise ResourceError(
                self.directory / "run.db", f"cannot be written ({error})", "space for the journal"
            ) from None

    def remember(self, stage: str, name: str, items: Sequence[int], ask: Callable[[], np.ndarray]) -> np.ndarray:
        """Answers given outside the search (calibration, checks, race): the journal's, else asked and committed.

        items: positions asked. Raises ResumeMismatch if the journal's answers are to other items.
        """
        known = self.recall(stage, name, items)
        if known is not None:
            return known
        positions, responses = np.asarray(items, np.int64), np.asarray(ask(), np.float64)
        try:
            with self._db:
                self._db.execute(
                    "INSERT INTO answers VALUES (?, ?, ?, ?)", (stage, name, positions.tobytes(), responses.tobytes())
                )
        except sqlite3.Error as error:
            raise ResourceError(
                self.directory / "run.db", f"cannot be written ({error})", "space for the journal"
            ) from None
        return responses

    def recall(self, stage: str, name: str, items: Sequence[int]) -> np.ndarray | None:
        """What `remember` has committed; None: nothing so far. Raises as it does."""
        query = "SELECT items, responses FROM answers WHERE stage = ? AND name = ?"
        row = self._db.execute(query, (stage, name)).fetchone()
        if row is not None and row[0] != np.asarray(items, np.int64).tobytes():
            found = f"{stage} {name} was asked other items"
            raise ResumeMismatch(self.directory, found, "the items the run began with")
        return None if row is None else np.frombuffer(row[1])

    def answers(self, stage: str) -> int:
        """How many answers a stage has cost."""
        return sum(len(row[0]) // 8 for row in self._db.execute("SELECT items FROM answers WHERE stage = ?", (stage,)))

    def generation(self, number: int) -> dict[int, Candidate]:
        """Answered candidates of one generation, by position."""
        return {c.position: c for c in self._read("WHERE generation = ?", (number,))}

    def candidates(self) -> list[Candidate]:
        """Every candidate, in the order of the search."""
        return list(self._read())

    def arrived(self, first: int = 0) -> list[Candidate]:
        """Those of generation `first` and after it, in the order in which they came."""
        found = {(c.generation, c.position): c for c in self._read("WHERE generation >= ?", (first,))}
        order = "SELECT generation, position FROM candidates WHERE generation >= ? ORDER BY arrived"
        return [found[at] for at in self._db.execute(order, (first,))]

    def count(self) -> int:
        """How many candidates there are."""
        return self._db.execute("SELECT COUNT(*) FROM candidates").fetchone()[0]

    def _read(self, where: str = "", values: tuple = ()) -> Iterator[Candidate]:
        estimates: dict[tuple[int, int], list[tuple[str, float, float]]] = {}
        query = f"SELECT generation, position, objective, value, stderr FROM estimates {where} ORDER BY place"
        for generation, position, name, value, stderr in self._db.execute(query, values):
            estimates.setdefault((generation, position), []).append((name, _number(value), _number(stderr)))
        query = f"SELECT {_COLUMNS} FROM candidates {where} ORDER BY generation, position"
        for generation, position, genome, recipe_hash, responses, *rest in self._db.execute(query, values):
            names, means, errors = zip(*estimates[generation, position])
            yield Candidate(
                generation,
                position,
                np.frombuffer(genome),
                recipe_hash,
                None if responses is None else np.frombuffer(responses),
                names,
                np.array(means),
                np.array(errors),
                *rest,
            )


def read_result(directory: str | Path) -> dict:
    """result.json of a finished run."""
    file = Path(directory) / "result.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResumeMismatch(directory, f"no readable result.json ({error})", "a finished run") from None


def _null(value: float) -> float | None:
    """SQLite has no NaN."""
    return None if np.isnan(value) else float(value)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _short(text: str | None) -> str:
    return "nothing" if text is None else text if len(text) <= 40 else text[:37] + "..."
