"""study.jsonl: what a study has found so far, a line for each finding, on disk before the next one is begun.

The first line says what this is a study of; a world's first line which checkpoints it has; then a line for each model
that answers alone, and one for each cell (world, method, number of experts, subset). A last line that a killed process
has not finished is cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merge3.errors import ResumeMismatch
from merge3.files import Held, resource_error, sync

JOURNAL = "study.jsonl"


class StudyJournal:
    """The file of one study, open to be added to; `found` holds its lines, without the first. Raises ResumeMismatch
    where there is another study, or none to resume."""

    def __init__(self, directory: Path, identity: Mapping[str, Any], resume: bool):
        self.file = directory / JOURNAL
        self.found: list[dict[str, Any]] = []
        if resume and not self.file.exists():
            raise ResumeMismatch(directory, f"no {JOURNAL}", "the directory of a study to resume")
        try:
            there = [entry.name for entry in directory.iterdir()] if directory.exists() else []
        except OSError as error:
            raise resource_error(self.file, error) from None
        if not resume and any(not name.startswith(".") for name in there):
            expected = "a new directory, or --resume" if self.file.exists() else "a new or empty directory"
            raise ResumeMismatch(directory, "not empty", expected)
        self._held = Held(directory)
        try:
            self._open(directory, identity, resume)
        except BaseException:
            self._held.close()
            raise

    def _open(self, directory: Path, identity: Mapping[str, Any], resume: bool) -> None:
        try:
            lines = self._read() if resume else []
            self._handle = open(self.file, "a", encoding="utf-8")
            sync(directory)
        except OSError as error:
            raise resource_error(self.file, error) from None
        if not lines:  # new, or killed before its first line was whole
            self._write(identity)
            return
        first, *self.found = lines
        for key in sorted({*first, *identity}):
            if first.get(key) != identity.get(key):
                where = f"{directory}: {key}"
                raise ResumeMismatch(where, f"found {identity.get(key)}", f"{first.get(key)}, as this study began with")

    def add(self, line: Mapping[str, Any]) -> None:
        """Write a line, and wait until the disk has it."""
        self.found.append(dict(line))
        self._write(line)

    def same(self, world: str, checkpoints: Sequence[str]) -> None:
        """Write down a world's checkpoints; where they are there, compare. Raises ResumeMismatch."""
        before = self.lines("checkpoints", world)
        if not before:
            self.add({"world": world, "checkpoints": list(checkpoints)})
        elif before[0]["checkpoints"] != list(checkpoints):
            expected = "those that this study began with"
            raise ResumeMismatch(f"{self.file}: world {world!r}", "its checkpoints have changed", expected)

    def lines(self, kind: str, world: str) -> list[dict[str, Any]]:
        """Those of a world that say `kind`: checkpoints, model or method."""
        return [line for line in self.found if line["world"] == world and kind in line]

    def close(self) -> None:
        """Nothing is lost without, but no other process may go on."""
        self._handle.close()
        self._held.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        try:
            self._handle.write(json.dumps(line) + "\n")
            self._handle.flush()
            os.fsync(self._handle.fileno())
        except OSError as error:
            raise resource_error(self.file, error) from None

    def _read(self) -> list[dict[str, Any]]:
        data = self.file.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.file, whole)
        found = []
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                found.append(json.loads(line))
                if not isinstance(found[-1], dict) or (number > 1 and "world" not in found[-1]):
                    raise ValueError
            except ValueError:
                raise ResumeMismatch(f"{self.file}, line {number}", "damaged", "a line as it was written") from None
        return found


def packed(responses: np.ndarray) -> str | list[float]:
    """Responses as a line holds them: a digit each, where all are wrong or right."""
    if np.isin(responses, (0.0, 1.0)).all():
        return "".join(str(int(value)) for value in responses)
    return responses.tolist()


def unpacked(found: str | Sequence[float]) -> np.ndarray:
    """As they were, float64 [items]."""
    return np.array([int(digit) for digit in found] if isinstance(found, str) else found, dtype=np.float64)
