"""Who answered what: a matrix of responses in [0, 1], read from and written to long tables.

One row per answer: `model`, `item`, `score`, and `task` where item ids repeat between tasks. CSV,
Parquet and JSON lines, by the file's ending. Missing answers are simply not there.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merge3.errors import BadInput

FORMATS = (".csv", ".parquet", ".jsonl")


class ResponsesError(BadInput):
    """A table of responses that cannot be used."""

    reason = "responses"


@dataclass(frozen=True, eq=False)
class Responses:
    """values: float64 [models, items] in [0, 1], NaN where a model did not answer."""

    models: tuple[str, ...]
    items: tuple[str, ...]
    values: np.ndarray

    def __post_init__(self):
        if self.values.shape != (len(self.models), len(self.items)):
            raise ResponsesError(
                "responses", f"a matrix of shape {self.values.shape}", f"{len(self.models)} models x {len(self.items)} items"
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
                where, f"none of its {len(self.items)} items (first: {self.items[0]!r}) is asked" if self.items else "no items",
                f"items of the tasks (first: {items[0]!r})" if items else "items",
            )  # fmt: skip
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
    import pandas as pd

    path = Path(path)
    if path.suffix not in FORMATS:
        raise ResponsesError(path, f"ending {path.suffix!r}", " or ".join(FORMATS))
    text = {"model": str, "item": str, "task": str}
    try:
        if path.suffix == ".csv":
            table = pd.read_csv(path, dtype=text, keep_default_na=False)
        elif path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_json(path, lines=True, dtype=text, convert_dates=False)
    except OSError as error:
        raise ResponsesError(path, error.strerror or str(error), "a table of responses") from None
    except (ValueError, pd.errors.ParserError) as error:
        raise ResponsesError(path, str(error).split("\n")[0][:200], f"a {path.suffix[1:]} table") from None
    for column in ("model", "item", "score"):
        if column not in table:
            raise ResponsesError(path, f"columns {', '.join(map(str, table.columns))}", f"a column {column!r}")
    if table.empty:
        raise ResponsesError(path, "no rows", "at least one answer")
    # Rows count as the file shows them: a CSV's first row of data is its second line.
    first = 2 if path.suffix == ".csv" else 1
    scores = pd.to_numeric(table["score"], errors="coerce").to_numpy(np.float64)
    bad = np.flatnonzero(~((scores >= 0) & (scores <= 1)))
    if len(bad):
        found = table["score"].iloc[bad[0]]
        found = found.item() if isinstance(found, np.generic) else found  # np.int64(100) is nobody's score
        raise ResponsesError(f"{path}: row {bad[0] + first}", f"score {found!r}", "a number in [0, 1]")
    items = table["item"].astype(str)
    if "task" in table:
        items = table["task"].astype(str) + "/" + items
    models = table["model"].astype(str)
    twice = np.flatnonzero(pd.DataFrame({"m": models, "i": items}).duplicated())
    if len(twice):
        at = twice[0]
        raise ResponsesError(
            f"{path}: row {at + first}", f"model {models.iloc[at]!r} and item {items.iloc[at]!r} a second time", "one row each"
        )
    rows, names = pd.factorize(models)
    columns, ids = pd.factorize(items)
    values = np.full((len(names), len(ids)), np.nan)
    values[rows, columns] = scores
    return Responses(tuple(names), tuple(ids), values)


def write_responses(responses: Responses, path: str | Path) -> None:
    """Write a long table, answered cells only; the whole file or none of it."""
    import pandas as pd

    from merge3.files import write_atomically

    path = Path(path)
    if path.suffix not in FORMATS:
        raise ResponsesError(path, f"ending {path.suffix!r}", " or ".join(FORMATS))
    rows, columns = np.nonzero(responses.answered)
    table = pd.DataFrame(
        {
            "model": np.array(responses.models, object)[rows],
            "item": np.array(responses.items, object)[columns],
            "score": responses.values[rows, columns],
        }
    )
    buffer = io.BytesIO()
    if path.suffix == ".csv":
        table.to_csv(buffer, index=False)
    elif path.suffix == ".parquet":
        table.to_parquet(buffer, index=False)
    else:
        table.to_json(buffer, orient="records", lines=True)
    write_atomically(path, buffer.getvalue())
