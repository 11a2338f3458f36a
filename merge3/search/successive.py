"""Searches in rounds: each of merges of the elites of the one before (rounds of EvoGM, 2605.29295, whose elites become
the experts), who join the pool unwritten, as the first stage's winner does in stages.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from merge3.errors import ConfigError
from merge3.recipe import Recipe
from merge3.search.asking import Asking
from merge3.search.config import EvolveConfig
from merge3.search.context import Progress, Search
from merge3.search.elites import Elite, Over, name_of
from merge3.search.journal import Candidate
from merge3.search.optimizers import usual_population
from merge3.search.race import Contender, Race, race
from merge3.search.succession import budget_of, next_models
from merge3.space import Space, SpaceDefinition

_REHEARSED = 3  # rounds; later ones are as the third, whose elites are merges of elites


def of_round(search: Search, config: EvolveConfig, number: int, elites: Sequence[Elite] = ()) -> Search:
    """The search of one round, from 0. search, config: the run's; elites: of the round before, none of the first.

    A later round begins at the first elite, which is its first candidate: at the best that is known, with what the
    others add around it. Where the first round began (`genome.start`, `random_init`) says nothing of it.
    """
    rounds, report = config.optimizer.rounds, search.report
    later = sum(budget_of(config, at) for at in range(number + 1, rounds))

    def told(progress: Progress) -> None:
        progress.round, progress.rounds, progress.later = number + 1, rounds, later
        report(progress)

    optimizer = config.optimizer.model_copy(update={"budget": budget_of(config, number)})
    own = config.model_copy(update={"optimizer": optimizer})
    if not number:
        return replace(search, config=own, report=told)
    space = Space(_definition(config, elites), search.engine.info().layout)
    own = own.model_copy(update={"random_init": False})
    start = _first_elite(space, elites[0].name)
    found = replace(search, config=own, report=told, round=number, space=space, start=start, steps=None)
    found.engine.prepare(found.asks([*search.questions.search, *search.questions.heldout]))
    return found


def _first_elite(space: Space, name: str) -> np.ndarray:
    """The genome in which the first elite weighs 1 and all others nothing, what else there is being as in the uniform
    merge; that merge where models have no weights."""
    own, shared = space.decoded(space.initial())
    place = space.definition.models.index(name)
    weighing = [gene for gene in own if space.method.genes[gene].weighs]
    for gene in weighing:
        own[gene] = np.zeros_like(own[gene])
        own[gene][:, place] = 1.0
    return np.clip(space.encoded(own, shared), *space.bounds()) if weighing else space.initial()


def check_rounds(config: EvolveConfig, search: Search) -> None:
    """Raises BadInput or ResourceError for rounds that would be refused when the first is over: a generation that a
    round has no candidates for, elites that cannot be merged, or that a budget or the memory has no room for."""
    rounds = config.optimizer.rounds
    if rounds == 1:
        return
    if (experts := search.engine.info().experts) != "full":
        found = f"rounds with experts held as {experts}"
        raise ConfigError("optimizer.rounds", found, "full: elites are merged of experts as their files have them")
    space, elites = search.space, []
    for number in range(1, min(rounds, _REHEARSED) + 1):
        if elites:
            space = Space(_definition(config, elites), search.engine.info().layout)
        population = config.optimizer.population or usual_population(space.size)
        if budget_of(config, rounds - 1) < population:
            found = f"{config.optimizer.budget} candidates for {rounds} rounds"
            expected = f"{rounds * population} or more: a generation of round {number} has {population}"
            raise ConfigError("optimizer.budget", found, expected)
        recipe = space.uniform_recipe()
        places = range(1, config.optimizer.elites + 1)
        elites = [_stand_in(name_of(search.journal, number, place), recipe) for place in places]
    search.engine.check(recipe)


def race_rounds(
    asking: Asking, last: tuple[Candidate, Recipe], over: Sequence[Over]
) -> tuple[Candidate, Recipe, Race | None]:
    """(whoever is best of the last round's winner and the best of those before, what it is, what settled it). asking:
    the last round's.

    They race on items that the last subset leaves out, as candidates do (race.py), but by these items alone: what each
    round's search believes of its best comes from other items, and where a surrogate says it, it is drawn towards that
    round's mean. The race costs `race.share` of what earlier rounds' candidates answered at most, the last round's own
    race having its share already. Without a race the highest estimate counts, the earliest round's of equals.
    """
    search, contenders = asking.search, [*((one.best, one.recipe) for one in over), last]
    every, unseen, settings = search.questions.search, asking.unseen(), search.config.race
    names = [f"{candidate.generation}-{candidate.position}" for candidate, _ in contenders]

    def ask(contender: int, positions: list[int]) -> np.ndarray:
        places = [unseen[i] for i in positions]
        name, recipe = f"{names[contender]} between rounds from item {places[0]}", contenders[contender][1]
        return search.journal.remember("race", name, places, lambda: search.solved(recipe, [every[i] for i in places]))

    if unseen and settings.candidates:
        known, items = [Contender(name, 0.0, float("inf")) for name in names], [every[i] for i in unseen]
        size, budget = search.config.extract.size, int(settings.share * sum(one.answers for one in over))
        seed = search.seed("race of rounds")
        found = race(known, items, ask, size, budget, search.weights, seed, search.stop)
        if found.answers:
            return *contenders[found.winner], found
    return *max(contenders, key=lambda one: one[0].value), None


def _definition(config: EvolveConfig, elites: Sequence[Elite]) -> SpaceDefinition:
    """Of the round whose models these elites are. Each merge is said once, whoever is made of it."""
    merged: dict[str, Any] = {}
    for elite in elites:
        merged |= elite.recipe.merged
    for elite in elites:
        merged[elite.name] = replace(elite.recipe, merged={}).to_dict() | {"seed": config.optimizer.seed}
    models = tuple(next_models(config, [elite.name for elite in elites]))
    return replace(config.genome.definition(), models=models, merged=json.dumps(merged))


def _stand_in(name: str, recipe: Recipe) -> Elite:
    nobody = Candidate(0, 0, np.empty(0), "", None, (), np.empty(0), np.empty(0), 0.0, 0.0, "")
    return Elite(name, recipe, nobody, *[0.0] * 5, {})
