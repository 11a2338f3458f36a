"""Who stands where among subjects that answered the same items, and the table of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from merge3.errors import BadInput
from merge3.fitness import mean_over_tasks
from merge3.tasks import Item

LEVEL = 2.0  # standard errors of a paired difference within which two subjects are level
MOST = 200  # columns of a table that is no terminal's


def standings(
    rows: Sequence[dict[str, Any]], answers: Mapping[str, np.ndarray], items: Sequence[Item]
) -> dict[str, Any]:
    """Rows from the best to the worst, each beside the best model and the first row. answers: name -> float64 [items].

    Differences are paired: of two subjects' responses to the same item, averaged as accuracy is; what both find easy
    or hard is no part of their standard error. Raises BadInput where nobody has answers.
    """
    there = sorted((row for row in rows if row["name"] in answers), key=lambda row: -row["accuracy"])
    if not there:
        raise BadInput("compare", "no model and no merge has answers", "models that can answer these items")
    best = next((row["name"] for row in there if row["kind"] == "model"), None)
    for row in there:
        own = answers[row["name"]]
        if best is not None:
            row["difference"], row["difference_stderr"] = mean_over_tasks(own - answers[best], items)
        behind, error = mean_over_tasks(answers[there[0]["name"]] - own, items)
        row["level"] = bool(behind <= LEVEL * error)
    return {"rows": [*there, *(row for row in rows if row["name"] not in answers)], "best_baseline": best}


def show(result: Mapping[str, Any]) -> None:
    """The table a person reads."""
    from rich.console import Console

    from merge3.client.run import accuracy_table

    there = [row for row in result["rows"] if "error" not in row]
    best, first = result["best_baseline"], there[0]
    level = ["" if row is first or not row["level"] else "≈" for row in there]
    further = {"≈": level} | (_beside(there, best) if best else {})
    further["merging"] = [f"{row['seconds']:.2f} s" if row["kind"] == "merge" else "" for row in there]
    console = Console() if sys.stdout.isatty() else Console(width=MOST)  # in a file a line may be long
    console.print(accuracy_table([(row["name"], row) for row in there], result["items"], "", first["name"], further))
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(f"≈: level with the first, no further behind than {LEVEL:g} standard errors of the paired difference")
    for row in result["rows"][len(there) :]:
        say(f"{row['name']}: no answers, {row['error']}")
    reasons: dict[str, list[str]] = {}
    for name, reason in result["skipped"].items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        say(f"not asked: {', '.join(names)} ({reason})")


def _beside(rows: Sequence[Mapping[str, Any]], best: str) -> dict[str, list[str]]:
    """Columns of the paired difference to the best model."""
    found: dict[str, list[str]] = {f"over {best}": [], "± se ": []}
    for row in rows:
        itself = row["name"] == best
        found[f"over {best}"].append("" if itself else f"{row['difference']:+.3f}")
        found["± se "].append("" if itself else f"{row['difference_stderr']:.3f}")
    return found
