"""What a search for several objectives ends with: a front of merges, each with what is believed of it and what it came
to on items that the search never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from merge3.errors import BadInput
from merge3.fitness import estimates, objective
from merge3.recipe import Recipe
from merge3.search.context import Search
from merge3.search.front_race import Believed, FrontRace, dominated
from merge3.search.journal import Candidate
from merge3.search.measure import Measured, detailed, name_of, remembered
from merge3.search.optimizers import Optimizer
from merge3.search.pareto import hypervolume, knee
from merge3.tasks import Item

RESAMPLES = 300  # of the held-out items, for the hypervolume's interval
KNEE = "knee"


@dataclass(frozen=True)
class Member:
    """values, stderrs: of the search and its race, in the objectives' own units, float64 [objectives]; heldout: as
    baselines are measured, with `objectives`."""

    candidate: Candidate
    recipe: Recipe
    values: np.ndarray
    stderrs: np.ndarray
    heldout: Measured


@dataclass(frozen=True)
class Front:
    """objectives: their names; members: best in the first objective first; race: what settled it, if anything did.
    hypervolume: on held-out items, beyond the worst of the models in each objective, with a 95 % interval. left: who
    was believed to be one, and of whom held-out items settle that a member is as good in every objective and better in
    one."""

    objectives: tuple[str, ...]
    signs: np.ndarray
    members: list[Member]
    race: FrontRace | None
    hypervolume: dict[str, Any]
    left: list[Member]

    def pick(self, said: str | None = None) -> int:
        """The index of a member: by its number (from 1), `knee`, or an objective that it is best in; of the first one
        if nothing is said. Raises BadInput for a number that no member has."""
        values = self.signs * np.array([member.values for member in self.members])
        if said is None:
            return 0
        if said == KNEE:
            return knee(values)
        if said in self.objectives:
            return int(np.argmax(values[:, self.objectives.index(said)]))
        check_member(said, len(self.members))
        return int(said) - 1


def check_pick(said: str | None, objectives: Sequence[str], fronts: bool) -> None:
    """Raises BadInput for what could name no member of a front."""
    if said is None:
        return
    if not fronts:
        raise BadInput(
            "--pick", f"found {said!r}, and a search for one objective", "`objectives:` in the configuration"
        )
    if said != KNEE and said not in objectives and not (said.isdecimal() and int(said) > 0):
        raise BadInput("--pick", f"found {said!r}", f"a member's number, {KNEE}, {', '.join(objectives)}")


def check_member(said: str | None, count: int) -> None:
    """Raises BadInput for the number of a member, if it is one, that none of so many has."""
    if said is not None and said.isdecimal() and not 1 <= int(said) <= count:
        raise BadInput("--pick", f"found {said}", f"1 to {count}, the front's members")


def believed(search: Search, candidates: Sequence[Candidate], optimizer: Optimizer) -> list[Believed]:
    """Every recipe that was evaluated, once, with what the optimizer believes of it, else its own estimates."""
    first = {c.recipe_hash: c for c in reversed(candidates) if not np.isnan(c.values).any()}
    known = sorted(first.values(), key=lambda c: (c.generation, c.position))
    found = optimizer.beliefs([c.genome for c in known])
    if found is None:
        return [Believed(c, search.signs * c.values, c.stderrs) for c in known]
    values, stderrs = (np.reshape(column, (len(known), -1)) for column in found)
    # A surrogate that sees no differences is sure of it; that is no proof, and a race must be able to find some.
    stderrs = np.maximum(stderrs, np.median([c.stderrs for c in known], axis=0) / 4)
    exact = np.array([objective(name).exact for name in search.objectives])  # and of what is known it need not believe
    values[:, exact] = (search.signs * np.array([c.values for c in known]))[:, exact]
    stderrs[:, exact] = 0.0
    return [Believed(c, *pair) for c, *pair in zip(known, values, stderrs)]


def measure_front(
    search: Search,
    members: Sequence[Believed],
    race: FrontRace | None,
    baselines: Mapping[str, Measured],
    items: Sequence[Item],
) -> Front | None:
    """Ask every member the held-out items; whom these settle to be dominated leaves. baselines: of the same items,
    measured. None if stopped."""
    members = sorted(members, key=lambda one: (-one.values[0], one.candidate.generation, one.candidate.position))
    recipes = [search.space.recipe(one.candidate.genome) for one in members]
    answers = []
    for one, recipe in zip(members, recipes):
        if search.stop():
            return None
        answers.append(remembered(search, name_of(one.candidate), search.exported(recipe), items))
    unseen = bool(search.questions.heldout)  # else these are what the search saw, and settled already
    beaten = dominated(search, recipes, answers, items) if unseen else [False] * len(members)
    stay, left = [], []
    for one, recipe, own, loses in zip(members, recipes, answers, beaten):
        detail = detailed(search, own, items, recipe)
        member = Member(one.candidate, recipe, search.signs * one.values, one.stderrs, detail)
        (left if loses else stay).append(member)
    answers = [own for own, loses in zip(answers, beaten) if not loses]
    covered = _covered(search, stay, answers, items, _reference(search, baselines))
    return Front(search.objectives, search.signs, stay, race, covered, left)


def _reference(search: Search, baselines: Mapping[str, Measured]) -> np.ndarray:
    """The worst of the baselines in every objective, more always the better: float64 [objectives]."""
    rows = [[detail["objectives"][name][0] for name in search.objectives] for detail in baselines.values()]
    return (search.signs * np.array(rows)).min(0)


def _covered(
    search: Search,
    members: Sequence[Member],
    answers: Sequence[np.ndarray],
    items: Sequence[Item],
    reference: np.ndarray,
) -> dict:
    """The front's hypervolume and its interval: items are drawn again, with replacement, within every task."""
    asked, rng = search.asks(items), np.random.default_rng(search.seed("hypervolume"))
    read = [search.read(own, len(items), member.recipe) for own, member in zip(answers, members)]

    def volume(at: np.ndarray) -> float:
        values = np.array([estimates(asked, one.at(at))[0] for one in read])
        return hypervolume(search.signs * values, reference)

    groups = [np.array(at) for at in asked.tasks().values()]
    drawn = []
    for _ in range(RESAMPLES):
        at = np.arange(len(items))
        for own in groups:
            at[own] = rng.choice(own, len(own))
        drawn.append(volume(at))
    low, high = np.quantile(drawn, [0.025, 0.975])
    told = dict(zip(search.objectives, (search.signs * reference).tolist()))
    value = volume(np.arange(len(items)))
    return {"value": value, "low": float(low), "high": float(high), "reference": told, "items": len(items)}
