"""A search that begins at a fit (`fit:`): the fit, in a folder of the run directory, before the first candidate."""

from __future__ import annotations

from collections.abc import Callable

from merge3.client.fit import Run, begin, learned
from merge3.client.fit_files import IDENTITY, FitFiles
from merge3.client.fit_items import Taught
from merge3.engine import Engine
from merge3.errors import ResumeMismatch
from merge3.files import write_atomically
from merge3.search.config import EvolveConfig
from merge3.search.fit_first import answers_of, begun_at, check_first, first_fit
from merge3.search.journal import Journal
from merge3.search.questions import Questions

FOLDER = "fit"


def fit_first(
    config: EvolveConfig,
    questions: Questions,
    engine: Engine,
    journal: Journal,
    resume: bool,
    quiet: bool,
    as_json: bool,
    stopping: Callable[[], bool],
    pick: str | None = None,
) -> tuple[EvolveConfig, int] | None:
    """(the configuration of the search that begins there, the answers it took); None when interrupted.

    Raises ResumeMismatch where the directory holds another run, and BadInput for whatever the search would refuse.
    """
    _check_run(config, journal, resume)
    fit, items = first_fit(config, questions)
    check_first(fit, config, questions, engine, journal, pick)
    folder = journal.directory / FOLDER
    files = FitFiles(folder, resume and (folder / IDENTITY).exists())
    taught = Taught(items, [], dict(fit.experts) or questions.heads, questions.chat)
    named, info = {"search": config.hash()}, engine.info()
    run = Run(fit.recipe, taught, files, info.device, None, None, quiet, as_json, stopping, named)
    begin(run, info.content_hashes)
    outcome = learned(engine, fit.recipe, taught, run, info.own_heads)
    if outcome is None:
        return None
    engine.forget_fit()
    file = (folder / "fitted.yaml").resolve()
    write_atomically(file, outcome.recipe.to_yaml())
    files.tell(outcome.history)
    return begun_at(config, str(file)), answers_of(fit, outcome.asked, items)


def _check_run(config: EvolveConfig, journal: Journal, resume: bool) -> None:
    """As search.run does, but before anything is fitted."""
    if not journal.begun:
        return
    if not resume:
        raise ResumeMismatch(journal.directory, "this run has begun", "a new directory", "continue it with --resume")
    if (before := journal.identity().get("config")) != config.hash():
        raise ResumeMismatch(journal.directory, f"config is {config.hash()}", f"{before}, as when the run began")
