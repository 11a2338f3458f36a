"""Tables with named columns as files: CSV, JSON lines, Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from merge3.errors import Unavailable

Rows = Iterator[tuple[int, dict[str, Any]]]  # where the row is in its file (line, or number from 1), and what it has


def read_csv(path: Path) -> Rows:
    """Every value as text. Raises ValueError naming the line that has more or fewer fields than the first."""
    with open(path, newline="", encoding="utf-8-sig") as handle:
        reader = csv.reader(handle, strict=True)
        header = next(reader, [])
        try:
            for row in reader:
                if row and len(row) != len(header):
                    raise ValueError(f"line {reader.line_num}: {len(row)} fields, {len(header)} in the first line")
                if row:
                    yield reader.line_num, dict(zip(header, row))
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None


def read_jsonl(path: Path) -> Rows:
    """An object a line. Raises ValueError naming the line that is none."""
    with open(path, encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: {type(row).__name__}, not an object")
            yield number, row


def read_parquet(path: Path) -> Rows:
    """Raises ValueError for what is no Parquet, Unavailable without pyarrow."""
    table = _parquet(path).read_table(path)
    yield from enumerate(table.to_pylist(), 1)


def csv_bytes(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """A header and a line per row."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return buffer.getvalue().encode()


def jsonl_bytes(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """An object a line."""
    return "".join(json.dumps(dict(zip(columns, row)), ensure_ascii=False) + "\n" for row in rows).encode()


def parquet_bytes(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """Raises Unavailable without pyarrow."""
    parquet = _parquet("a Parquet table")
    import pyarrow

    buffer = io.BytesIO()
    values = zip(*rows) if rows else [()] * len(columns)
    parquet.write_table(pyarrow.table({name: list(column) for name, column in zip(columns, values)}), buffer)
    return buffer.getvalue()


def _parquet(what: str | Path):
    try:
        from pyarrow import parquet
    except ImportError:
        hint = "pip install 'merge3-gpu[parquet]', or a CSV file"
        raise Unavailable(str(what), "Parquet needs pyarrow", hint=hint) from None
    return parquet


READERS: dict[str, Callable[[Path], Rows]] = {".csv": read_csv, ".parquet": read_parquet, ".jsonl": read_jsonl}
WRITERS: dict[str, Callable[[Sequence[str], Sequence[Sequence[Any]]], bytes]] = {
    ".csv": csv_bytes,
    ".parquet": parquet_bytes,
    ".jsonl": jsonl_bytes,
}
