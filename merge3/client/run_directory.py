"""A search's run directory: what may lie there when a run begins, and the checkpoints that it leaves there, each of
which is known by the recipe that every export has beside its weights."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from merge3.client.rewriting import PAGE
from merge3.client.rounds import elites_of
from merge3.engine import Engine
from merge3.errors import ResumeMismatch
from merge3.files import Held
from merge3.recipe import Recipe, load_yaml
from merge3.search.elites import FOLDER as ELITES
from merge3.search.journal import Journal
from merge3.search.run import Outcome
from merge3.search.stages import FOLDER

MODEL = "model"
RECIPE = "mergekit_config.yml"  # of an export
_RESULTS = (MODEL, "best.yaml", "result.json", "front", "front.csv", ELITES, FOLDER, f"{FOLDER}.yaml")
_EARLY = ("config.yaml", PAGE)  # what a run leaves that ended before anything was asked, too


def check_directory(directory: Path, resume: bool, export: bool = True) -> None:
    """Before anything is read for a run: raises ResumeMismatch where there is none to resume, where one has begun that
    is not to be resumed, and where a new one would take the place of what lies there, or take it for its own;
    ResourceError where another process is at work. export: whether checkpoints will be written."""
    known, begun = (directory / "run.db").exists(), False
    if known:
        with Held(directory), closing(Journal(directory)) as journal:
            begun = journal.begun
    if resume and not known:
        raise ResumeMismatch(directory, "no run.db", "a run directory to resume")
    if begun and not resume:
        raise ResumeMismatch(directory, "this run has begun", "a new directory", "continue it with --resume")
    if begun:
        if export and _taken(directory / MODEL) and not (directory / MODEL / RECIPE).exists():
            raise _foreign(directory / MODEL)
        return
    there = [name for name in (*_RESULTS, *(() if known else _EARLY)) if _taken(directory / name)]
    if there:
        found = f"holds {', '.join(there)}, and no run that has begun"
        raise ResumeMismatch(directory, found, "a new directory, or one without what a run would write")


def export_result(engine: Engine, outcome: Outcome, directory: Path, seed: int) -> None:
    """Write the checkpoints of a finished search that are not there yet: model/, and those that its recipe names. Of
    several objectives that of another member makes room. Raises ResumeMismatch where something else is in the place of
    one, before any is written."""
    model, members = directory / MODEL, () if outcome.front is None else (*outcome.front.members, *outcome.front.left)
    others = {model: [member.recipe for member in members]}
    wanted = [] if outcome.below is None else [(outcome.below.recipe, Path(outcome.below.name))]
    wanted += elites_of(outcome.recipe) if outcome.rounds else ()
    for recipe, folder in [*wanted, (outcome.recipe, model)]:
        if _taken(folder) and not any(is_export(folder, one) for one in (recipe, *others.get(folder, ()))):
            raise _foreign(folder)
    for recipe, folder in wanted:
        if not _taken(folder):
            engine.export(recipe, folder, seed)
    place = Path(os.path.realpath(model))  # where a link leads, on another disk perhaps
    partial = place.with_name(f".{place.name}.picked")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    if not _taken(model):
        engine.export(outcome.recipe, model, seed)
    elif not is_export(model, outcome.recipe):  # another member, which makes room when this one is whole
        engine.export(outcome.recipe, partial, seed)
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)


def is_export(folder: Path, recipe: Recipe) -> bool:
    """Whether a folder holds the export of this recipe; its models may have moved since, and kept their names."""
    try:
        found = Recipe.parse(load_yaml((folder / RECIPE).read_text(encoding="utf-8"), str(folder)))
    except (OSError, ValueError):
        return False
    recipe = replace(recipe, merged={})  # what was merged for it lies in a folder
    before, now = found.models(), recipe.models()
    if set(before) != set(now):
        if [Path(model.path).name for model in before] != [Path(model.path).name for model in now]:
            return False
        moved = dict(zip(before, now))
        found = found.renamed(lambda ref: moved.get(ref, ref))
    return found.hash() == recipe.hash()


def _taken(path: Path) -> bool:
    return os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir()))


def _foreign(folder: Path) -> ResumeMismatch:
    found, expected = "there, and no merge of this run", "nothing of this name"
    return ResumeMismatch(folder, found, expected, "move it away and --resume, or --no-export")
