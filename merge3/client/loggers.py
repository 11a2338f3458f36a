"""A search told to other tools: a row of LOGGERS each, imported only when it is asked for.

A resumed run is told whole again, what is in its journal first: what such a tool holds never lacks what a killed
process had not told it yet.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from merge3.client.search_charts import lower
from merge3.errors import ConfigError, Unavailable
from merge3.search.config import EvolveConfig
from merge3.search.watching import Seen


class Logger(Protocol):
    """One tool's record of one run."""

    def candidate(self, number: int, seen: Seen, best: float | None) -> None:
        """The number'th candidate, from 1. best: the first objective's so far."""

    def generation(self, number: int, candidates: int, mean: float | None) -> None:
        """A generation that is answered. candidates: in all until then; mean: of its first objective."""

    def end(self, result: Mapping[str, Any] | None) -> None:
        """result.json's content; None for a run that was stopped or failed."""


@dataclass(frozen=True)
class Row:
    """needs: a package; module: of ours, whose `open_logger(directory, config)` makes the Logger."""

    needs: str
    module: str


LOGGERS = {
    "tensorboard": Row("tensorboard", "merge3.client.log_tensorboard"),
    "wandb": Row("wandb", "merge3.client.log_wandb"),
}


def check_loggers(names: Sequence[str]) -> None:
    """Raises ConfigError for a name that no row has, Unavailable for one whose package is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise ConfigError("logging", f"found {name!r}", ", ".join(LOGGERS))
        if importlib.util.find_spec(LOGGERS[name].needs) is None:
            extra = f"pip install 'merge3-gpu[{name}]'"
            raise Unavailable(f"logging: {name}", f"the package {LOGGERS[name].needs} is not installed", extra)


class Loggers:
    """Those of a run, opened with its first candidate. What fails in one is said once; the others and the run go on."""

    def __init__(self, names: Sequence[str], directory: Path, config: EvolveConfig):
        self._waiting, self._directory, self._config = list(dict.fromkeys(names)), directory, config
        self._open: dict[str, Logger] = {}
        self._best, self._count = None, 0
        self._generation: int | None = None
        self._values: list[float] = []  # of the generation at hand

    def __call__(self, seen: Sequence[Seen]) -> None:
        """Candidates that came since the last call."""
        for name in self._waiting:
            with self._going_on(name):
                module = importlib.import_module(LOGGERS[name].module)
                self._open[name] = module.open_logger(self._directory, self._config)
        self._waiting = []
        for one in seen if self._open else ():
            if self._generation is None or one.generation > self._generation:  # else one that was asked before it
                self._generation_ended()
                self._generation = one.generation
            value = one.values[0]
            self._count += 1
            if value is not None:
                self._values.append(value)
                better = min if lower(one.objectives[0]) else max
                self._best = value if self._best is None else better(self._best, value)
            for name, logger in list(self._open.items()):
                with self._going_on(name):
                    logger.candidate(self._count, one, self._best)

    def end(self, result: Mapping[str, Any] | None) -> None:
        """The last generation, and what the run came to; see Logger."""
        self._generation_ended()
        for name, logger in list(self._open.items()):
            with self._going_on(name):
                logger.end(result)
        self._open = {}

    def _generation_ended(self) -> None:
        if self._generation is None:
            return
        mean = sum(self._values) / len(self._values) if self._values else None
        for name, logger in list(self._open.items()):
            with self._going_on(name):
                logger.generation(self._generation, self._count, mean)
        self._values = []

    @contextmanager
    def _going_on(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # another tool's code: no run ends because its record could not be kept
            self._open.pop(name, None)
            print(f"logging to {name} ended: {type(error).__name__}: {error}", file=sys.stderr)
