"""What a run for several objectives leaves of its front: front.csv, a recipe of every member, the one exported."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from merge3.errors import BadInput
from merge3.files import write_atomically
from merge3.search.config import EvolveConfig
from merge3.search.front import Front, Member, check_member
from merge3.search.journal import read_result
from merge3.search.run import Outcome, best_yaml


def write_front(directory: Path, config: EvolveConfig, front: Front) -> None:
    """front/NN.yaml, a recipe of each member, and front.csv: member, file, and of each objective what is believed and
    what held-out items say, each with its standard error. Values are in the objectives' own units."""
    folder = directory / "front"
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.yaml"):
        if file.stem.isdecimal() and int(file.stem) > len(front.members):  # of an earlier version's front
            file.unlink()
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    measured = "heldout" if config.heldout.fraction else "searched"  # with none held out these are the search's own
    told = "", "_se", f"_{measured}", f"_{measured}_se"
    columns = [f"{name}{what}" for name in front.objectives for what in told]
    table.writerow(["member", "recipe", *columns])
    for number, member in enumerate(front.members, 1):
        write_atomically(directory / file_of(number), best_yaml(member.recipe, config))
        cells = []
        for at, name in enumerate(front.objectives):
            cells += [member.values[at], member.stderrs[at], *member.heldout["objectives"][name]]
        table.writerow([number, file_of(number), *(f"{cell:.6g}" for cell in cells)])
    write_atomically(directory / "front.csv", text.getvalue())


def check_numbering(directory: Path, pick: str | None) -> None:
    """Raises BadInput for a number that no member has of the front that result.json tells, and for any where an earlier
    version told it, whose numbers were others: those who left it on held-out items were among them."""
    if pick is None or not pick.isdecimal() or not (directory / "result.json").exists():
        return
    front = read_result(directory).get("front")
    if front and "left" not in front:
        expected = "knee or an objective; or go on without --pick first, which tells the members anew"
        raise BadInput("--pick", f"found {pick}, and {directory} tells a front of an earlier version", expected)
    if front:
        check_member(pick, len(front["members"]))


def file_of(number: int) -> str:
    """A member's recipe, in the run's directory."""
    return f"front/{number:02}.yaml"


def front_summary(front: Front, outcome: Outcome, pick: str | None) -> dict[str, Any]:
    """`front` in result.json."""

    def told(member: Member) -> dict[str, Any]:
        values = zip(member.values.tolist(), (_number(se) for se in member.stderrs))
        return {
            "recipe_hash": member.candidate.recipe_hash,
            "values": {name: list(pair) for name, pair in zip(front.objectives, values)},
            "heldout": member.heldout["objectives"],
        }

    members = []
    for number, member in enumerate(front.members, 1):
        members.append({"member": number, "recipe": file_of(number)} | told(member))
    at = next(i for i, member in enumerate(front.members, 1) if member.candidate is outcome.best)
    race = front.race
    return {
        "objectives": {name: "lower" if sign < 0 else "higher" for name, sign in zip(front.objectives, front.signs)},
        "members": members,
        "left": [told(member) for member in front.left],
        "hypervolume": front.hypervolume,
        "race": race and {"answers": race.answers, "rounds": list(race.rounds), "items": race.items},
        "picked": at,
        "picked_by": pick or f"best in {front.objectives[0]}, the first objective",
    }


def print_front(front: Mapping[str, Any], console, unseen: bool = True) -> None:
    """The front as a table of rich's, and how much it covers. unseen: whether items were held out."""
    from rich.table import Table

    items = "held-out values" if unseen else "values on the search's own items"
    table = Table(title=f"front: {items} (what search and race believe)")
    table.add_column("member")
    for name, better in front["objectives"].items():
        table.add_column(f"{name} ({better} is better)", justify="right")
    for one in front["members"]:
        cells = [cell(one["heldout"][name], one["values"][name]) for name in front["objectives"]]
        number = one["member"]
        table.add_row(str(number), *cells, style="bold" if number == front["picked"] else None)
    console.print(table)
    if front.get("left"):
        console.print(f"left the front on held-out items: {len(front['left'])}")
    volume = front["hypervolume"]
    console.print(f"hypervolume {volume['value']:.4g} (95 %: {volume['low']:.4g} to {volume['high']:.4g})")
    console.print(
        f"exported: member {front['picked']} ({front['picked_by']}); another one with --resume --pick NUMBER, knee or "
        "an objective"
    )


def cell(heldout, believed) -> str:
    """A held-out value and what was believed, with standard errors."""
    digits = 3 if abs(heldout[0]) <= 1 else 1
    told = lambda value, error: f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
    return f"{told(*heldout)} ({told(*believed)})"


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
