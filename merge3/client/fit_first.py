"""A search that begins at a fit (`fit:`): the fit, in a folder of the run directory, before the first candidate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from merge3.client.fit import Run, begin, learned
from merge3.client.fit_files import IDENTITY, FitFiles
from merge3.client.fit_items import Taught
from merge3.engine import Engine
from merge3.errors import ResumeMismatch
from merge3.files import write_atomically
from merge3.search.config import EvolveConfig
from merge3.search.context import Search
from merge3.search.fit_first import answers_of, begun_at, check_first, first_fit, without_fit
from merge3.search.journal import Journal
from merge3.search.questions import Questions
from merge3.space import Space

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
) -> tuple[EvolveConfig, int] | None:
    """(the configuration of the search that begins there, the answers it took); None when interrupted.

    Raises ResumeMismatch where the directory holds another run, and BadInput for whatever the search would refuse.
    """
    if journal.begun and not resume:
        raise ResumeMismatch(journal.directory, "this run has begun", "a new directory", "continue it with --resume")
    fit, items = first_fit(config, questions)
    plain = without_fit(config)
    space = Space(plain.genome.definition(), engine.info().layout)
    check_first(Search(plain, questions, engine, space, journal), fit)
    folder = journal.directory / FOLDER
    files = FitFiles(folder, resume and (folder / IDENTITY).exists())
    taught = Taught(items, questions.heldout or questions.search, dict(fit.experts) or questions.heads, questions.chat)
    run = Run(fit.recipe, taught, files, engine.info().device, None, None, quiet, as_json, stopping)
    begin(run, engine.info().content_hashes)
    outcome = learned(engine, fit.recipe, taught, run, engine.info().own_heads)
    if outcome is None:
        return None
    file = Path(folder / "fitted.yaml").resolve()
    write_atomically(file, outcome.recipe.to_yaml())
    files.tell(outcome.history)
    return begun_at(config, str(file)), answers_of(fit, items)
