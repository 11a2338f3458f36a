"""Two searches in one run: the winner of the first joins the pool, unwritten, and the second searches on from it for a
path (hybrid: Akiba et al. 2024)."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from merge3.engine import Engine
from merge3.errors import ConfigError
from merge3.hops import SCALE
from merge3.methods.averages import AS_IT_IS
from merge3.recipe import Recipe
from merge3.search.asking import Asking
from merge3.search.config import EvolveConfig
from merge3.search.context import Search
from merge3.search.journal import Journal
from merge3.space import PATH, Space, SpaceDefinition

FOLDER = "parameters"  # in the run's directory: where the first winner lies once it is exported


class Winner(NamedTuple):
    """Of the first stage. name: of the endpoint, and the folder of its checkpoint; recipe: what it is."""

    name: str
    recipe: Recipe


def check_stages(config: EvolveConfig, engine: Engine) -> None:
    """Raises ConfigError for a second stage that would be refused when the first is over."""
    if not config.stages:
        return
    if len(config.names) > 1:
        found = f"stages beside {len(config.names)} objectives"
        raise ConfigError("stages", found, "one of both: a stage goes on from one winner")
    if engine.info().experts != "full":
        found = f"stages with experts held as {engine.info().experts}"
        raise ConfigError("stages", found, "full: the second stage's path takes layers as they lie")
    layout = engine.info().layout
    winner = Winner(FOLDER, Space(config.genome.definition(), layout).uniform_recipe())  # any: it takes as much memory
    Space(_definition(config, winner), layout)
    through_all = Space(replace(_definition(config, winner), max_hops=None), layout)
    engine.check(through_all.recipe(np.ones(through_all.size)))


def winner_of(journal: Journal, recipe: Recipe) -> Winner:
    """A first stage's winner, under the name that the run gives it."""
    return Winner(str(journal.directory.resolve() / FOLDER), recipe)


def second(asking: Asking, config: EvolveConfig, winner: Winner) -> Asking:
    """What the second stage asks: the same items, estimated as they were, of paths through winner and models."""
    search = asking.search
    space = Space(_definition(config, winner), search.engine.info().layout)
    searched = replace(search, config=config.of_stage(1), space=space, start=None, steps=None)
    searched.engine.prepare(searched.asks([*search.questions.search, *search.questions.heldout]))
    return replace(asking, search=searched)


def generations(search: Search) -> int:
    """How many generations the budget of a stage that is over took: the next one's candidates follow them."""
    budget = search.config.optimizer.budget
    return search.journal.candidates()[budget - 1].generation + 1


def _definition(config: EvolveConfig, winner: Winner) -> SpaceDefinition:
    genome, merged = config.genome, {winner.name: winner.recipe.to_dict() | {"seed": config.optimizer.seed}}
    bounds = {gene: limits for gene, limits in genome.bounds.items() if gene == SCALE}
    return SpaceDefinition(
        (winner.name, *genome.models),
        AS_IT_IS,
        bounds=bounds,
        dtype=genome.dtype,
        kind=PATH,
        chat_template=genome.chat_template,
        repetitions=genome.repetitions,
        pinned=genome.pinned,
        max_hops=genome.max_hops,
        merged=json.dumps(merged),
    )
