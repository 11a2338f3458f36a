"""Who answered what: a matrix of responses in [0, 1], read from and written to long tables.

One row per answer: `model`, `item`, `score`, and `task` where item ids repeat between tasks. CSV,
Parquet and JSON lines, by the file's ending. Missing answers are simply not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merge3.errors import BadInput
from merge3.files import write_atomically
from merge3.irt.tables import READERS, WRITERS

FORMATS = tuple(READERS)


class ResponsesError(BadInput):
    """A table of responses that cannot be used."""

    reason = "responses"


@dataclass(frozen=True, eq=False)
class Responses:
    """values: float64 [models, items] in [0, 1], NaN where a model did not answer.

    Responses(("math", "code"), ("sum-1", "sum-2"), np.array([[1.0, 0.0], [1.0, np.nan]]))
    """

    models: tuple[str, ...]
    items: tuple[str, ...]
    values: np.ndarray

    def __post_init__(self):
        if self.values.shape != (len(self.models), len(self.items)):
            raise ResponsesError(
                "responses",
                f"a matrix of shape {self.values.shape}",
                f"{len(self.models)} models x {len(self.items)} items",
            )
        outside = (self.values < 0) | (self.values > 1) | np.isinf(self.values)
        if outside.any():
            m, i = np.argwhere(outside)[0]
            raise ResponsesError(
                f"model {self.models[m]!r}, item {self.items[i]!r}", f"score {self.values[m, i]:g}", "a score in [0, 1]"
            )

    @property
    def answered(self) -> np.ndarray:
        """bool [models, items]."""
        return ~np.isnan(self.values)

    def only(self, items: Sequence[str], where: str = "responses") -> Responses:
        """The columns of these items, in this order; an item nobody answered is missing throughout.

        Raises ResponsesError if not one of them is known.
        """
        column = {item: i for i, item in enumerate(self.items)}
        values = np.full((len(self.models), len(items)), np.nan)
        known = [(i, column[item]) for i, item in enumerate(items) if item in column]
        if not known:
            raise ResponsesError(
                where,
                f"none of its {len(self.items)} items (first: {self.items[0]!r}) is asked"
                if self.items
                else "no items",
                f"items of the tasks (first: {items[0]!r})" if items else "items",
            )
        to, at = map(list, zip(*known))
        values[:, to] = self.values[:, at]
        keep = ~np.isnan(values).all(1)
        return Responses(tuple(m for m, k in zip(self.models, keep) if k), tuple(items), values[keep])

    def rows(self, models: Sequence[str]) -> Responses:
        """The rows of these models, in this order."""
        index = [self.models.index(m) for m in models]
        return Responses(tuple(models), self.items, self.values[index])


def read_responses(path: str | Path) -> Responses:
    """Read a long table. Models and items keep the order of their first row.

    Raises ResponsesError naming the row of a bad score, a duplicate (model, item) or a missing column.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ResponsesError(path, f"ending {path.suffix!r}", " or ".join(FORMATS))
    models: dict[str, int] = {}
    items: dict[str, int] = {}
    answers: dict[tuple[int, int], float] = {}
    try:
        for number, row in READERS[path.suffix](path):
            model, item, score = _answer(path, number, row)
            at = models.setdefault(model, len(models)), items.setdefault(item, len(items))
            if at in answers:
                found = f"model {model!r} and item {item!r} a second time"
                raise ResponsesError(f"{path}: row {number}", found, "one row each")
            answers[at] = score
    except OSError as error:
        raise ResponsesError(path, error.strerror or str(error), "a table of responses") from None
    except ResponsesError:
        raise
    except ValueError as error:
        raise ResponsesError(path, str(error).split("\n")[0][:200], f"a {path.suffix[1:]} table") from None
    if not answers:
        raise ResponsesError(path, "no rows", "at least one answer")
    values = np.full((len(models), len(items)), np.nan)
    values[tuple(np.array(list(answers)).T)] = list(answers.values())
    return Responses(tuple(models), tuple(items), values)


def write_responses(responses: Responses, path: str | Path) -> None:
    """Write a long table, answered cells only; the whole file or none of it."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ResponsesError(path, f"ending {path.suffix!r}", " or ".join(FORMATS))
    rows = [
        (responses.models[model], responses.items[item], float(responses.values[model, item]))
        for model, item in np.argwhere(responses.answered)
    ]
    write_atomically(path, WRITERS[path.suffix](("model", "item", "score"), rows))


def _answer(path: Path, number: int, row: dict[str, Any]) -> tuple[str, str, float]:
    """(model, item, score) of a row; the item's task comes before its id."""
    for column in ("model", "item", "score"):
        if column not in row:
            raise ResponsesError(path, f"row {number} has columns {', '.join(map(str, row))}", f"a column {column!r}")
    score = _number(row["score"])
    if not 0 <= score <= 1:  # NaN, too, is not
        found = repr(row["score"]) if math.isnan(score) else f"{score:g}"
        raise ResponsesError(f"{path}: row {number}", f"score {found}", "a number in [0, 1]")
    item = str(row["item"])
    return str(row["model"]), f"{row['task']}/{item}" if "task" in row else item, score


def _number(score: Any) -> float:
    """As a float; NaN for what is none. `true` and `false` count as 1 and 0."""
    if isinstance(score, str):
        score = {"true": 1, "false": 0}.get(score.strip().lower(), score)
    try:
        return float(score)
    except (TypeError, ValueError):
        return math.nan
