"""report.html of a fit while it goes on: the loss of every step, and held-out accuracy where it was measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from merge3.client.charts import axis, body, head, library, series
from merge3.client.rewriting import PATIENCE, Pace


class FitPage:
    """What `Rewriting` calls. history: grows while the fit goes on, a line for every step, from the first one;
    before: how many lines it had when this process took it up."""

    def __init__(self, method: str, steps: int, history: Sequence[Mapping[str, Any]]):
        self.method, self.steps, self._history = method, steps, history
        self._before, self._drawn = len(history), -1

    def __call__(self, pace: Pace) -> str | None:
        """The page; None where nothing is new and none is due."""
        history = list(self._history)
        if len(history) == self._drawn and not pace.due:
            return None
        self._drawn = len(history)
        done, rate = len(history), (len(history) - self._before) / pace.elapsed if pace.elapsed else 0.0
        data = {
            "kind": "fit",
            "written": round(time.time(), 3),
            "patience": PATIENCE,
            **asdict(pace),
            "done": done,
            "steps": self.steps,
            "left": round((self.steps - done) / rate) if rate else None,
            "loss": history[-1]["loss"] if history else None,
            "charts": fit_charts(history),
        }
        return page(data, self.method)


def page(data: Mapping[str, Any], method: str) -> str:
    """The page of this data."""
    import jinja2

    template = Path(__file__).with_name("fit_page.html.j2").read_text(encoding="utf-8")
    drawn = {"head": head(), "body": body(data), "drawable": library() is not None}
    return jinja2.Template(template, autoescape=True).render(data=data, method=method, **drawn)


def fit_charts(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Charts `loss` and, where accuracy was measured, `heldout`."""
    if not history:
        return []
    steps = [axis("step", [line["step"] for line in history])]
    lines = [series(task, "line", [line["losses"].get(task) for line in history]) for task in history[0]["losses"]]
    lines.append(series("mean over tasks", "best", [line["loss"] for line in history]))
    charts = [{"id": "loss", "title": "The loss", "y": "loss", "xs": steps, "series": lines}]
    measured = [line for line in history if "heldout" in line]
    if measured:
        at = [axis("step", [line["step"] for line in measured])]
        columns = ([line["heldout"][key] for line in measured] for key in ("accuracy", "stderr"))
        found = [series("accuracy ± se", "front", *columns)]
        title = "Held-out accuracy on the way"
        charts.append({"id": "heldout", "title": title, "y": "accuracy", "xs": at, "series": found})
    return charts
