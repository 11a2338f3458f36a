"""What looks on while a search runs: its page, and the loggers that the configuration names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge3.client.loggers import Loggers
from merge3.client.rewriting import PAGE, Rewriting
from merge3.client.search_page import SearchPage, workers_here, workers_of
from merge3.search.config import EvolveConfig
from merge3.search.context import Progress
from merge3.search.questions import Questions

if TYPE_CHECKING:
    from merge3.client.channel import Target


class Watched(AbstractContextManager):
    """Of one run. It begins to look when the run directory is known to be this run's, and costs the search a copied
    Progress per candidate; all else happens in a thread.

        with Watched(config, questions, directory) as watched:
            outcome = run(config, questions, engine, journal, report=watched.beside(report))
    """

    def __init__(
        self,
        config: EvolveConfig,
        questions: Questions,
        directory: Path,
        device: str = "cpu",
        target: Target | None = None,
    ):
        workers = (lambda: workers_here(device)) if target is None else (lambda: workers_of(target))
        full = config.optimizer.budget * len(questions.search)
        self._loggers = Loggers(config.logging, directory, config)
        self._page = SearchPage(directory, config, full, workers)
        tell = lambda: self._loggers(self._page.taken())
        self._rewriting = Rewriting(directory / PAGE, self._page, after=tell)

    def beside(self, report: Callable[[Progress], None]) -> Callable[[Progress], None]:
        """What the search reports to: `report`, and this."""

        def both(progress: Progress) -> None:
            report(progress)
            self._page.tell(progress)
            if progress.stage != "statistics":  # until then the directory may turn out to be another run's
                self._rewriting.begin()

        return both

    def end(self, result: Mapping[str, Any] | None) -> None:
        """The search has ended with this result.json; with None: it was stopped."""
        self._rewriting.end("stopped" if result is None else "done")
        self._loggers.end(result)

    def __exit__(self, kind, error, trace) -> None:
        self._rewriting.__exit__(kind, error, trace)
        if error is not None:
            self._loggers.end(None)
