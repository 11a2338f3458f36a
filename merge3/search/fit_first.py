"""A fit that a search begins at (`fit:`): what it learns, from the search's own items, none of which are held out."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np

from merge3.engine import Engine
from merge3.errors import ConfigError
from merge3.learn.fit import Fit, check_learned, experts_of, merged_with
from merge3.learn.losses import LOSSES, check_labels
from merge3.recipe import Recipe
from merge3.search.config import EvolveConfig
from merge3.search.context import Search
from merge3.search.front import check_pick
from merge3.search.journal import Journal
from merge3.search.optimizers import check_installed
from merge3.search.questions import Questions, per_task
from merge3.search.seeds import seed_of
from merge3.space import AROUND, Space, SpaceDefinition
from merge3.space.projection import projected
from merge3.tasks import Item

PASSES = 3  # answers that an item counts for which goes forward and backward


def first_fit(config: EvolveConfig, questions: Questions) -> tuple[Fit, list[Item]]:
    """(the fit of a configuration with `fit:`, the items it learns from). Raises ConfigError or RecipeError."""
    genome, seed = config.genome, config.optimizer.seed
    settings = {key: value for key, value in config.fit.items() if key != "method"} | {"seed": seed, "check_every": 0}
    data = {"merge_method": config.fit["method"], "fit": settings}
    data |= {"base_model": genome.base_model, "models": [{"model": m} for m in genome.models if m != genome.base_model]}
    words = {"tokenizer": genome.recipe_tokenizer(), "chat_template": genome.chat_template, "tower": genome.tower}
    recipe = replace(Recipe.parse({k: v for k, v in data.items() if v is not None}, "fit"), dtype=genome.dtype, **words)
    check_learned(recipe, "fit")
    fit = Fit(recipe)
    items = per_task(questions.search, fit.settings.per_task, np.random.default_rng(seed_of("fit", seed)))
    check_labels(LOSSES[fit.method.loss], items)
    if not LOSSES[fit.method.loss].expert:
        return fit, items
    tasks, experts = list(dict.fromkeys(item.task for item in items)), experts_of(recipe)
    if set(questions.heads) == set(tasks):
        return replace(fit, experts=dict(questions.heads)), items
    if questions.heads or len(tasks) != len(experts):
        found = f"{recipe.method}, which asks each task's own expert, and {len(tasks)} tasks of {len(experts)} models"
        raise ConfigError("fit.method", found, "a task for every model, in their order; or another method")
    return replace(fit, experts=dict(zip(tasks, experts))), items


def check_first(
    fit: Fit, config: EvolveConfig, questions: Questions, engine: Engine, journal: Journal, pick: str | None = None
) -> None:
    """Raise what the search would refuse once there is a fit. pick: see search.run."""
    check_installed(config.optimizer.name)
    start = merged_with(fit.recipe, dict.fromkeys(experts_of(fit.recipe), float(fit.settings.start)))
    layout, definition = engine.info().layout, config.genome.definition()
    plain = Space(replace(definition, kind=SpaceDefinition.kind), layout)
    search = Search(config, questions, engine, plain, journal)
    check_pick(pick, search.objectives, search.fronts)
    engine.prepare(search.asks([*questions.search, *questions.heldout]))
    projected(plain, start, "fit", engine.info().unmerged)  # what bounds change is said when the search begins
    around = replace(definition, around=json.dumps(start.to_dict()))
    engine.check((Space(around, layout) if definition.kind == AROUND else plain).uniform_recipe())


def begun_at(config: EvolveConfig, file: str) -> EvolveConfig:
    """The search that begins at what was fitted. file: of the recipe."""
    return config.model_copy(update={"genome": config.genome.model_copy(update={"start": file})})


def answers_of(fit: Fit, asked: int, items: list[Item]) -> int:
    """What a fit took, in answers. asked: items that went forward and backward; items: those it learned from."""
    return PASSES * asked + (len(items) if fit.experts else 0)
