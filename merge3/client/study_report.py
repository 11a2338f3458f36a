"""What a study leaves for people: report.html, a page of pictures drawn as SVG; cells.csv and means.csv; the table that
a terminal shows."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from merge3.client.report import svg
from merge3.files import write_atomically

TITLES = {"heldin": "Tasks of the merged experts", "heldout": "Other tasks"}
SHARES = {"heldin": "share of each expert's own accuracy", "heldout": "share of the base's, or the task's expert's"}
COLOURS = ("#2166ac", "#b2182b", "#1b7837", "#e08214", "#762a83", "#35978f", "#8c510a", "#c51b7d", "#4d4d4d", "#80cdc1")
PANEL, TALL, LEFT, TOP = 230, 170, 40, 26  # a picture's panels, their margins


def write_study_report(result: Mapping[str, Any], directory: Path) -> Path:
    """Draw report.html."""
    import jinja2

    template = Path(__file__).with_name("study_report.html.j2").read_text(encoding="utf-8")
    page = jinja2.Template(template, autoescape=True).render(
        result=result,
        pictures=[(TITLES[metric], panels(result, metric)) for metric in TITLES],
        legend=list(zip(result["methods"], colours(result["methods"]))),
        tables=[(TITLES[metric], table(result, metric)) for metric in TITLES],
        errors=[cell for cell in result["cells"] if "error" in cell],
    )
    write_atomically(directory / "report.html", page)
    return directory / "report.html"


def write_tables(result: Mapping[str, Any], directory: Path) -> None:
    """cells.csv, a row a merge; means.csv, a row for each world, method and number of experts."""
    cells = []
    for cell in result["cells"]:
        row = {key: cell[key] for key in ("world", "method")} | {"experts": len(cell["subset"])}
        row |= {"subset": " ".join(cell["subset"]), "heldin": cell.get("heldin"), "heldout": cell.get("heldout")}
        cells.append(row | {f"accuracy {task}": value for task, value in cell.get("tasks", {}).items()})
    means = []
    for mean in result["means"]:
        row = {key: mean[key] for key in ("world", "method", "experts", "subsets")}
        for metric in TITLES:
            row |= {metric: mean[metric]["value"]}
            row |= {f"{metric} {bound}": mean[metric][bound] for bound in ("low", "high")}
        means.append(row)
    for name, rows in (("cells.csv", cells), ("means.csv", means)):
        text = io.StringIO()
        columns = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(directory / name, text.getvalue())


def table(result: Mapping[str, Any], metric: str) -> list[tuple[str, str, list[str]]]:
    """(world, method, cells) in order: a cell for each number of experts, with half the width of its interval."""
    found = {(mean["world"], mean["method"], mean["experts"]): mean[metric] for mean in result["means"]}
    rows = []
    for world in result["worlds"]:
        for method in result["methods"]:
            cells = []
            for count in result["experts"]:
                told = found[world["name"], method, count]
                spread = (
                    "" if told["value"] is None else f"{told['value']:.3f} ± {(told['high'] - told['low']) / 2:.3f}"
                )
                cells.append(spread)
            rows.append((world["name"], method, cells))
    return [row for row in rows if any(row[2])]


def colours(methods: Sequence[str]) -> list[str]:
    """One for each method, in order."""
    return [COLOURS[i % len(COLOURS)] for i in range(len(methods))]


def panels(result: Mapping[str, Any], metric: str) -> str:
    """A panel for each world, three in a row: shares over the number of experts, a line and intervals a method."""
    means = [mean for mean in result["means"] if mean[metric]["value"] is not None]
    if not means:
        return ""
    low = min([mean[metric]["low"] for mean in means] + [1.0])
    high = max([mean[metric]["high"] for mean in means] + [1.0])
    margin = 0.05 * ((high - low) or 1)
    scale = (low - margin, high + margin)
    counts = sorted(result["experts"])
    parts = []
    for at, world in enumerate(result["worlds"]):
        x, y = (at % 3) * (PANEL + 12), (at // 3) * (TALL + 46)
        own = [mean for mean in means if mean["world"] == world["name"]]
        inside = _panel(world["name"], own, metric, result["methods"], counts, scale)
        parts.append(f'<g transform="translate({x},{y})">{inside}</g>')
    rows, columns = (len(result["worlds"]) + 2) // 3, min(3, len(result["worlds"]))
    return svg(parts, columns * (PANEL + 12), rows * (TALL + 46), TITLES[metric])


def _panel(name: str, means: Sequence[Mapping], metric: str, methods: Sequence[str], counts, scale) -> str:
    low, high = scale
    at_x = lambda count: LEFT + 12 + (PANEL - LEFT - 24) * counts.index(count) / max(1, len(counts) - 1)
    at_y = lambda value: TOP + (TALL - TOP) * (high - value) / (high - low)
    parts = [f'<text x="{LEFT}" y="16">{escape(name)}</text>']
    for i in range(5):
        value = low + (high - low) * i / 4
        parts.append(f'<line x1="{LEFT}" x2="{PANEL}" y1="{at_y(value):.1f}" y2="{at_y(value):.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{at_y(value) + 4:.1f}" class="name">{value:.2f}</text>')
    for count in counts:
        parts.append(f'<text x="{at_x(count):.1f}" y="{TALL + 16}" class="label">{count}</text>')
    for number, (method, colour) in enumerate(zip(methods, colours(methods))):
        own = sorted((mean for mean in means if mean["method"] == method), key=lambda mean: mean["experts"])
        shift = 3 * (number - (len(methods) - 1) / 2)  # so that intervals do not hide each other
        points = []
        for mean in own:
            x, told = at_x(mean["experts"]) + shift, mean[metric]
            points.append(f"{x:.1f},{at_y(told['value']):.1f}")
            ends = f'y1="{at_y(told["low"]):.1f}" y2="{at_y(told["high"]):.1f}"'
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} stroke="{colour}"/>')
            parts.append(f'<circle cx="{x:.1f}" cy="{at_y(told["value"]):.1f}" r="2.5" fill="{colour}"/>')
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return "".join(parts)


def show(result: Mapping[str, Any], directory: Path) -> None:
    """The tables and findings that a person reads at the end."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for metric, title in TITLES.items():
        rows = table(result, metric)
        if not rows:
            continue
        shown = Table(title=f"{title}: {SHARES[metric]}")
        for name in ("world", "method"):
            shown.add_column(name)
        for count in result["experts"]:
            shown.add_column(f"{count} experts", justify="right")
        for world, method, cells in rows:
            shown.add_row(world, method, *cells)
        console.print(shown)
    for found in result["findings"]:
        said = "" if found["value"] is None else f" {found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
        console.print(f"{found['finding']}: {found['verdict']} ({found['of']}{said})", markup=False, soft_wrap=True)
    console.print(f"report {directory / 'report.html'}, tables {directory / 'means.csv'}", markup=False, soft_wrap=True)
