"""Where a search begins, if not at the uniform merge: the genome nearest to a recipe (`genome.start`)."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np

from merge3.errors import ConfigError, Merge3Warning, RecipeError, ResumeMismatch
from merge3.recipe import ModelRef, Recipe
from merge3.search.config import EvolveConfig
from merge3.search.context import Search
from merge3.search.journal import Journal
from merge3.search.places import read_start
from merge3.space import SpaceDefinition


def definition_of(config: EvolveConfig, journal: Journal) -> SpaceDefinition:
    """What is searched. A run that has begun keeps the recipe that its space is around, wherever its models lie by now.

    Raises RecipeError for a start that is no recipe.
    """
    definition, known = config.genome.definition(), journal.identity()
    if not (journal.begun and known.get("config") == config.hash() and "around" in known):
        return definition
    models = {f"model {i}": ModelRef.parse(model) for i, model in enumerate(config.models)}
    recipe = Recipe.parse(json.loads(known["around"])).renamed(lambda ref: models.get(str(ref), ref))
    return replace(definition, around=json.dumps(recipe.to_dict(), sort_keys=True))


def started(search: Search) -> Search:
    """The search with the genome it begins at; as it is where `genome.start` names no recipe.

    Raises BadInput for a recipe that no genome is near to, or that would be refused as a merge.
    """
    search, recipe = near_start(search)
    if recipe is not None:
        check_start(search, recipe)
    return search


def near_start(search: Search) -> tuple[Search, Recipe | None]:
    """(the search with the genome it begins at, the recipe that this is near to), from the models' layouts alone; None:
    there is none to check.

    A run that has begun keeps its genome, wherever the models that the recipe names lie by now. Raises BadInput for a
    recipe that no genome is near to.
    """
    if search.config.genome.start is None:
        return search, None
    known = search.journal.identity()
    if search.journal.begun and known.get("config") == search.config.hash() and "start" in known:
        return replace(search, start=kept(search.journal, "start", known["start"], search.space.size)), None
    path = search.config.genome.start
    recipe = read_start(path, search.config.models)
    if recipe.surgery:
        warnings.warn(f"{path}: surgery: left out, a search varies the merge below it", Merge3Warning, stacklevel=2)
    genome = search.space.project(recipe, path, search.engine.info().unmerged)
    return replace(search, start=genome), recipe


def check_start(search: Search, recipe: Recipe) -> None:
    """Raises ConfigError for a start that would be refused as a merge."""
    path, definition = search.config.genome.start, search.space.definition
    # A start says parameters. How its merge would be stored and what its tokenizer would be is the genome's to say.
    words = {"tokenizer": definition.tokenizer, "chat_template": definition.chat_template, "tower": definition.tower}
    try:
        search.engine.check(replace(recipe, dtype=definition.dtype, out_dtype=None, surgery={}, **words))
    except RecipeError as error:
        raise ConfigError(f"{path}: {error.where}", error.found, error.expected, error.hint) from None


def kept(journal: Journal, name: str, text: str, size: int) -> np.ndarray:
    """A number for every gene that a run began with, float64 [size], from its journal. name: of the entry."""
    found = np.array(json.loads(text), dtype=np.float64)
    if found.shape != (size,):
        words = f"{name} is {found.size} numbers, was written when the run began", f"{size}, as a genome has"
        raise ResumeMismatch(journal.directory, *words, "start another run directory")
    return found
