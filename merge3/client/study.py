"""`merge3-client study`: merges of different methods, of different numbers of experts, in different worlds.

After "What Matters for Model Merging at Scale?" (Yadav et al. 2024, arXiv 2410.03617): what decides how well a merge
does on the tasks of its experts, and on others?
"""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from merge3 import __version__
from merge3.client.stopping import StopOnInterrupt
from merge3.client.study_cells import Cell, Opened, Questions, cells_of, key_of, read_questions
from merge3.client.study_config import StudyConfig, read_study
from merge3.client.study_journal import StudyJournal, unpacked
from merge3.client.study_numbers import summary
from merge3.client.study_report import write_study_report, write_tables
from merge3.files import write_atomically
from merge3.tasks import items_hash


def study(
    file: Path,
    directory: Path,
    resume: bool = False,
    quiet: bool = False,
    device: str = "cpu",
    memory_budget: str | None = None,
) -> dict[str, Any] | None:
    """Answer every cell, then tell what they say. Returns result.json's content; None when interrupted by Ctrl-C.

    What is wrong with the file, the models or the items is found before the first cell.
    """
    config = read_study(file)
    say = _silent if quiet else _said
    questions = {world.name: read_questions(config, world, str(file)) for world in config.worlds}
    for note in notes(config):
        say(note)
    identity = {"merge3": __version__, "study": config.hash()}
    identity |= {f"items of {name}": items_hash(found.measured + found.tuning) for name, found in questions.items()}
    stopping = StopOnInterrupt()
    with closing(StudyJournal(directory, identity, resume)) as journal, stopping:
        opened = None
        for world in config.worlds:
            opened = None  # one world's models at a time
            opened = Opened(config, world, questions[world.name], str(file), device, memory_budget, read=False)
            opened.check()
        opened, clock = None, _Clock(config, journal)
        for world in config.worlds:
            if clock.answered(world.name):
                continue
            opened = None
            opened = Opened(config, world, questions[world.name], str(file), device, memory_budget)
            if not _world(opened, journal, clock, stopping, say):
                print(
                    f"stopped; continue with: merge3-client study {file} --run-dir {directory} --resume",
                    file=sys.stderr,
                )
                return None
    result = summary(config, questions, journal)
    write_atomically(directory / "result.json", json.dumps(result, indent=1))
    write_tables(result, directory)
    write_study_report(result, directory)
    return result


def notes(config: StudyConfig) -> list[str]:
    """What is otherwise than the file asks: of some numbers of experts there are fewer subsets."""
    found = []
    for world in config.worlds:
        for count in config.experts:
            there = math.comb(len(world.experts), count)
            if there < config.subsets:
                line = f"{count} of {len(world.experts)} experts: {there} subset{'s' * (there > 1)}, "
                found.append(line + f"not the {config.subsets} asked: all of them")
    return list(dict.fromkeys(found))


def _world(opened: Opened, journal: StudyJournal, clock: _Clock, stopping: StopOnInterrupt, say) -> bool:
    """Answer what is left of a world's cells. False when interrupted."""
    name, world = opened.world.name, opened.world
    journal.same(name, list(opened.engine.pool.content_hashes().values()))
    alone = {line["model"] for line in journal.lines("model", name)}
    for task in [None, *world.experts]:
        if (task or "") not in alone:
            if stopping():
                return False
            journal.add(opened.alone(task))
    done = {key_of(line) for line in journal.lines("method", name)}
    for cell in cells_of(opened.config, world):
        if cell.key in done:
            continue
        if stopping():
            return False
        began = time.perf_counter()
        line = opened.answer(cell)
        journal.add(line)
        say(clock.told(cell, line, opened.questions, time.perf_counter() - began))
    return True


class _Clock:
    """How far a study is, and how long what is left will take: as long, cell by cell, as those of this process took."""

    def __init__(self, config: StudyConfig, journal: StudyJournal):
        self.journal = journal
        self.cells = {world.name: sum(1 for _ in cells_of(config, world)) for world in config.worlds}
        self.total, self._times = sum(self.cells.values()), []

    @property
    def done(self) -> int:
        """Cells that are answered."""
        return sum(len(self.journal.lines("method", name)) for name in self.cells)

    def answered(self, world: str) -> bool:
        """Whether no cell of a world is left."""
        return len(self.journal.lines("method", world)) >= self.cells[world]

    def told(self, cell: Cell, line: dict[str, Any], questions: Questions, seconds: float) -> str:
        """A line for people."""
        self._times.append(seconds)
        left = int((self.total - self.done) * sum(self._times) / len(self._times))
        what = f"{cell.world.name}, {cell.method.label}, {len(cell.subset)} experts ({', '.join(cell.subset)})"
        if "error" in line:
            said = f"no answers, {line['error']}"
        else:
            responses, tasks = unpacked(line["responses"]), [item.task for item in questions.measured]
            own = [value for value, task in zip(responses, tasks) if task in cell.subset]
            said = f"{sum(own) / len(own):.3f}"
        return f"{self.done}/{self.total}  {what}: {said}  {left // 60}:{left % 60:02d} left"


def _said(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    pass
