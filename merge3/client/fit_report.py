"""report.html of a fit: one self-contained page, pictures drawn as SVG, as a search's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge3.client.report import bars, heat_map
from merge3.client.report_parts import HEIGHT, PAD, WIDTH, axis, svg
from merge3.errors import ResumeMismatch
from merge3.files import write_atomically
from merge3.parameters import scalars
from merge3.recipe import Recipe

_LAYER = re.compile(r"^(.*?\.)(\d+)\.(.+)$")


def write_fit_report(directory: str | Path) -> Path:
    """Draw report.html from history.jsonl (of a surgery surgery.jsonl), fitted.yaml and result.json. Raises
    ResumeMismatch if they are not there."""
    import jinja2

    directory = Path(directory)
    result = {}
    if (directory / "result.json").exists():
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    operated = "surgery" in result
    of_steps = directory / ("surgery.jsonl" if operated else "history.jsonl")
    if not result or not of_steps.exists():
        raise ResumeMismatch(directory, f"no result.json and {of_steps.name}", "the directory of a finished fit")
    history = [json.loads(line) for line in of_steps.read_text(encoding="utf-8").splitlines()]
    fitted = Recipe.from_yaml(directory / "fitted.yaml")
    rows = [("with surgery" if operated else "fitted", result["heldout_detail"], True)]
    rows += [(name, other["detail"], False) for name, other in result["others"].items()]
    rows += sorted(((n, b, False) for n, b in result["baselines_detail"].items()), key=lambda r: -r[1]["accuracy"])
    template = Path(__file__).with_name("fit_report.html.j2").read_text(encoding="utf-8")
    page = jinja2.Template(template, autoescape=True).render(
        result=result,
        rows=rows,
        tasks=list(result["heldout_detail"]["tasks"]),
        curve=loss_curve(history),
        heldout=heldout_curve(history),
        bars=bars(rows),
        maps=[] if operated else weight_maps(fitted),
        recipe=(directory / "recipe.yaml").read_text(encoding="utf-8"),
    )
    write_atomically(directory / "report.html", page)
    return directory / "report.html"


def loss_curve(history: Sequence[Mapping[str, Any]]) -> str:
    """The loss of every step, the mean over tasks and each task's own."""
    lines = {"best": [(line["step"], line["loss"]) for line in history]}
    for task in history[0]["losses"] if history else ():
        lines[f"mean {task}"] = [(line["step"], line["losses"][task]) for line in history]
    return _curve(lines, "step", "Loss of every step")


def heldout_curve(history: Sequence[Mapping[str, Any]]) -> str:
    """Held-out accuracy where it was measured."""
    points = [(line["step"], line["heldout"]["accuracy"]) for line in history if "heldout" in line]
    return _curve({"best": points}, "step", "Held-out accuracy") if len(points) > 1 else ""


def _curve(lines: Mapping[str, Sequence[tuple[int, float]]], label: str, title: str) -> str:
    """Polylines, each in the style its name begins with, the first on top."""
    values = [value for points in lines.values() for _, value in points]
    if not values:
        return ""
    low, high, last = min(values), max(values), max(step for points in lines.values() for step, _ in points)
    span = (high - low) or 1.0
    low, high = low - 0.05 * span, high + 0.05 * span
    x = lambda step: PAD + (WIDTH - PAD - 12) * (step - 1) / max(1, last - 1)
    y = lambda value: 10 + (HEIGHT - PAD) * (high - value) / (high - low)
    parts = [axis(low, high, y), f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" class="label">{label} (1 to {last})</text>']
    for name in reversed(lines):
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in lines[name])
        parts.append(f'<polyline class="{name.split()[0]}" points="{points}"/>')
    return svg(parts, WIDTH, HEIGHT, title)


def weight_maps(recipe: Recipe) -> list[tuple[str, str]]:
    """(model, picture): its weights, a row for each kind of tensor, a column for each layer; tensors outside the stack
    in a row each."""
    found = []
    for source in recipe.slices[0].sources:
        setting = source.parameters["weight"]
        if not isinstance(setting, list):
            setting = [{"filter": "all tensors", "value": scalars(setting)[0]}]
        inside: dict[str, dict[int, float]] = {}
        outside: dict[str, float] = {}
        for entry in setting:
            if entry["filter"] == "*":
                continue
            match = _LAYER.match(entry["filter"])
            if match:
                inside.setdefault(match[3].removesuffix(".weight"), {})[int(match[2])] = entry["value"]
            else:
                outside[entry["filter"].removesuffix(".weight")] = entry["value"]
        layers = sorted({layer for row in inside.values() for layer in row})
        columns = [f"layer {layer}" for layer in layers] or ["weight"]
        rows: dict[str, list[float | None]] = {}
        for name, row in inside.items():
            rows[name] = [row.get(layer) for layer in layers]
        for name, value in outside.items():
            rows[name] = [value]
        found.append((Path(str(source.model)).name, heat_map(columns, rows)))
    return found
