"""The journal: what is written comes back bit for bit, whatever version began it."""

import sqlite3
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from merge3.errors import Merge3Warning, ResumeMismatch
from merge3.search.journal import Candidate, Journal

BEFORE = """
CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE candidates (
    generation INTEGER NOT NULL, position INTEGER NOT NULL,
    genome BLOB NOT NULL, recipe_hash TEXT NOT NULL, responses BLOB,
    value REAL, stderr REAL, seconds REAL NOT NULL, swap_seconds REAL NOT NULL,
    engine TEXT NOT NULL, error TEXT,
    PRIMARY KEY (generation, position)
);
CREATE TABLE answers (
    stage TEXT NOT NULL, name TEXT NOT NULL, items BLOB NOT NULL, responses BLOB NOT NULL, PRIMARY KEY (stage, name)
);
"""


def candidate(position, values, stderrs, responses=None, error=None, objectives=("accuracy", "italian")):
    genome = np.array([0.1, -0.7]) * (position + 1)
    return Candidate(
        0, position, genome, "abc", responses, objectives, np.array(values), np.array(stderrs), 0.5, 0.1, "local", error
    )


def same(a, b):
    arrays = ("genome", "values", "stderrs", "responses")
    rest = lambda c: {k: v for k, v in vars(c).items() if k not in arrays}
    equal = [
        (getattr(a, n) is getattr(b, n) is None) or np.array_equal(getattr(a, n), getattr(b, n), equal_nan=True)
        for n in arrays
    ]
    return all(equal) and rest(a) == rest(b)


def test_values_come_back_as_vectors_with_names(tmp_path):
    third = 1 / 3
    written = [
        candidate(0, [third, 0.25], [0.01, 0.02], np.array([1.0, 0.0, third])),
        candidate(1, [np.nan, np.nan], [np.nan, np.nan], error="it failed"),
    ]
    with closing(Journal(tmp_path)) as journal:
        for c in written:
            journal.append(c)
    with closing(Journal(tmp_path)) as journal:
        read = journal.candidates()
    assert all(map(same, read, written)) and len(read) == 2
    assert read[0].value == third and read[0].stderr == 0.01 and np.isnan(read[1].value)


def test_a_run_has_begun_when_something_was_asked(tmp_path):
    for stage in ("candidate", "answer"):
        with closing(Journal(tmp_path / stage)) as journal:
            assert not journal.begun
            assert not journal.begin({"config": "x"}) and not journal.begun
            if stage == "candidate":
                journal.append(candidate(0, [0.5], [0.1], objectives=("accuracy",)))
            else:
                journal.remember("calibration", "base", [0], lambda: np.array([1.0]))
            assert journal.begun
        with closing(Journal(tmp_path / stage)) as journal:
            assert journal.begun and journal.identity() == {"config": "x"}


FILES = {"files": {"the base's config.json": "a", "the base's tokenizer.json": "b"}}


def begun(directory, *told):
    """A run that was told this when it began, and has a candidate."""
    with closing(Journal(directory)) as journal:
        journal.begin({"config": "x"}, *told)
        journal.append(candidate(0, [0.5], [0.1], objectives=("accuracy",)))


@pytest.mark.parametrize(
    "now,message",
    [
        ({"the base's tokenizer.json": "c"}, "the base's tokenizer.json is c, was b when the run began"),
        ({"the base's tokenizer.json": None}, "the base's tokenizer.json is nothing, was b when"),
        ({"the base's chat_template.jinja": "d"}, "the base's chat_template.jinja is d, was nothing when"),
    ],
)
def test_what_makes_answers_and_has_changed_is_named(tmp_path, now, message):
    begun(tmp_path, FILES)
    with closing(Journal(tmp_path)) as journal:
        assert journal.begin({"config": "x"}, FILES)
        with pytest.raises(ResumeMismatch, match=message) as error:
            told = {name: digest for name, digest in (FILES["files"] | now).items() if digest}
            journal.begin({"config": "x"}, {"files": told})
    assert "\n" not in str(error.value)


def test_what_was_not_written_down_or_is_not_known_is_not_compared(tmp_path):
    begun(tmp_path / "earlier")
    begun(tmp_path / "now", FILES)
    for directory, told in (("earlier", FILES), ("now", {"files": {}}), ("now", {})):
        with closing(Journal(tmp_path / directory)) as journal:
            assert journal.begin({"config": "x"}, told, {"torch": "2"})


def test_another_version_of_what_computes_is_said(tmp_path):
    begun(tmp_path, {}, {"torch": "2.1", "transformers": "5"})
    with closing(Journal(tmp_path)) as journal:
        with pytest.warns(Merge3Warning, match=r"torch is 2\.2, was 2\.1 when the run began") as said:
            assert journal.begin({"config": "x"}, {}, {"torch": "2.2", "transformers": "5"})
        assert len(said) == 1


def test_candidates_are_told_in_their_order_and_in_that_in_which_they_came(tmp_path):
    with closing(Journal(tmp_path)) as journal:
        for position in (2, 0, 1):
            journal.append(candidate(position, [0.5, 0.5], [0.1, 0.1]))
    with closing(Journal(tmp_path)) as journal:
        journal.append(replace(candidate(0, [0.5, 0.5], [0.1, 0.1]), generation=1))
        assert [c.position for c in journal.candidates()] == [0, 1, 2, 0]
        assert [(c.generation, c.position) for c in journal.arrived()] == [(0, 2), (0, 0), (0, 1), (1, 0)]
        assert [c.generation for c in journal.arrived(first=1)] == [1]


def test_a_journal_without_an_order_has_that_of_its_rows(tmp_path):
    """Of the version before: values apart, and no column that says when a candidate came."""
    with closing(Journal(tmp_path)) as journal:
        for position in (1, 0):
            journal.append(candidate(position, [0.5, 0.25], [0.1, 0.1]))
    columns = "generation, position, genome, recipe_hash, responses, seconds, swap_seconds, engine, error"
    table = BEFORE.split(";")[1].replace("value REAL, stderr REAL, ", "")
    with closing(sqlite3.connect(tmp_path / "run.db")) as db:
        db.executescript(f"ALTER TABLE candidates RENAME TO numbered; {table};")
        db.executescript(f"INSERT INTO candidates SELECT {columns} FROM numbered ORDER BY arrived; DROP TABLE numbered")
    for _ in range(2):
        with closing(Journal(tmp_path)) as journal:
            assert [c.position for c in journal.arrived()] == [1, 0] and journal.candidates()[0].values[1] == 0.25
    with closing(Journal(tmp_path)) as journal:
        journal.append(candidate(2, [0.5, 0.5], [0.1, 0.1]))
        assert [c.position for c in journal.arrived()] == [1, 0, 2]


def test_a_journal_from_before_is_read_and_goes_on(tmp_path):
    genome, responses = np.array([0.3, 0.4]), np.array([1.0, 0.0])
    with sqlite3.connect(tmp_path / "run.db") as db:
        db.executescript(BEFORE)
        db.execute("INSERT INTO run VALUES ('config', 'x')")
        row = "INSERT INTO candidates VALUES (0, ?, ?, 'h', ?, ?, ?, 1.0, 0.5, 'local', ?)"
        db.execute(row, (0, genome.tobytes(), responses.tobytes(), 0.1 + 0.2, 0.05, None))
        db.execute(row, (1, genome.tobytes(), None, None, None, "it failed"))
    for _ in range(2):  # moved over once, read as ever after
        with closing(Journal(tmp_path)) as journal:
            assert journal.begin({"config": "x"})
            done, failed = journal.candidates()[:2]
            assert done.objectives == ("accuracy",) and (done.value, done.stderr) == (0.1 + 0.2, 0.05)
            assert np.array_equal(done.genome, genome) and np.array_equal(done.responses, responses)
            assert np.isnan(failed.value) and failed.error == "it failed"
            with pytest.raises(ResumeMismatch, match="config is y, was x"):
                journal.begin({"config": "y"})
    with closing(Journal(tmp_path)) as journal:
        journal.append(candidate(2, [0.5], [0.1], objectives=("accuracy",)))
        assert [c.position for c in journal.candidates()] == [0, 1, 2]
