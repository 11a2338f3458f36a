"""What a search in rounds leaves beside its winner: its elites, as checkpoints where they are named, and in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from merge3.recipe import Recipe
from merge3.search.config import EvolveConfig
from merge3.search.run import Outcome
from merge3.search.succession import budget_of


def elites_of(recipe: Recipe) -> list[tuple[Recipe, Path]]:
    """(recipe, folder of its name) of the elites that a recipe names; what those are made of joins the models in
    memory."""
    found = []
    for name in map(str, recipe.models()):
        if name in recipe.merged:
            data = {key: value for key, value in recipe.merged[name].items() if key != "seed"}
            others = {other: content for other, content in recipe.merged.items() if other != name}
            found.append((Recipe.parse(data | {"merged": others}, f"{name}: merged"), Path(name)))
    return found


def begun(config: EvolveConfig) -> list[int]:
    """How many candidates there were when each later round began."""
    rounds = config.optimizer.rounds
    return list(accumulate(budget_of(config, number) for number in range(rounds)))[:-1]


def rounds_summary(config: EvolveConfig, outcome: Outcome) -> list[dict[str, Any]]:
    """`rounds` in result.json: one entry a round, the last without elites. won: whether the winner is of that round."""
    last = outcome.rounds[-1]
    found = []
    for one in outcome.rounds:
        elites = []
        for elite in one.elites:
            at = elite.candidate.generation, elite.candidate.position
            believed = {"value": elite.value, "stderr": elite.stderr if elite.stderr == elite.stderr else None}
            chosen = {key: getattr(elite, key) for key in ("gain", "shared", "together", "tasks")}
            told = {"name": Path(elite.name).name, "generation": at[0], "position": at[1]}
            elites.append(told | {"recipe_hash": elite.candidate.recipe_hash} | believed | chosen)
        counts = {"candidates": one.candidates, "contenders": one.contenders, "items": one.items}
        won = one.first <= outcome.best.generation <= one.last
        found.append({"round": one.number, **counts, "won": won, "elites": elites})
    candidates = budget_of(config, last.number)
    won = outcome.best.generation > last.last
    return [*found, {"round": last.number + 1, "candidates": candidates, "won": won, "elites": []}]


def print_rounds(rounds: Sequence[Mapping[str, Any]], race: Mapping[str, Any] | None, console) -> None:
    """Who the elites were, as a table of rich's, and which round has won. race: between rounds, if there was one."""
    from rich.table import Table

    tasks = list(rounds[0]["elites"][0]["tasks"])
    table = Table(title="elites: accuracy on the items that their round's contenders answered")
    table.add_column("elite")
    for name in ("estimate", "± se", *tasks, "with those above"):
        table.add_column(name, justify="right")
    for elite in (elite for one in rounds for elite in one["elites"]):
        cells = ["" if elite["stderr"] is None else f"{elite['stderr']:.3f}"]
        cells += [f"{elite['tasks'][task]:.3f}" for task in tasks] + [f"{elite['together']:.3f}"]
        table.add_row(elite["name"], f"{elite['value']:.3f}", *cells)
    console.print(table)
    won = next(one["round"] for one in rounds if one["won"])
    left = f" in a race of each round's best: {' → '.join(map(str, race['rounds']))} left" if race else ""
    console.print(f"round {won} of {len(rounds)} has won{left}")
