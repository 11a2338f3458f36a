"""report.html of a run: one self-contained page, pictures drawn as SVG, its curve as a chart too; no network."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import accumulate
from pathlib import Path

import yaml

from merge3.client.charts import body, head
from merge3.client.front import cell
from merge3.client.front_report import front_pictures
from merge3.client.report_parts import HEIGHT, PAD, WIDTH, axis, svg
from merge3.client.search_charts import search_charts
from merge3.errors import ResumeMismatch
from merge3.files import write_atomically
from merge3.hops import read_hops
from merge3.recipe import Recipe
from merge3.search.compaction import told_of_experts
from merge3.search.journal import Candidate, Journal, read_result
from merge3.search.measure import unseen
from merge3.search.watching import JournalReader


def write_report(directory: str | Path) -> Path:
    """Draw report.html from the journal, best.yaml and result.json. Raises ResumeMismatch if they are not there."""
    import jinja2

    directory = Path(directory)
    if not (directory / "run.db").exists():
        raise ResumeMismatch(directory, "no run.db", "a run directory")
    result = read_result(directory)
    begun = list(accumulate(one["candidates"] for one in result.get("rounds", ())))[:-1]
    with closing(Journal(directory)) as journal:
        candidates = journal.candidates()
        with closing(JournalReader(directory)) as reader:
            charts = search_charts(reader.new(), begun)
    recipe = Recipe.from_yaml(directory / "best.yaml")
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    rows = [("evolved", result["heldout_detail"], True)]
    rows += sorted(((n, b, False) for n, b in result["baselines_detail"].items()), key=lambda r: -r[1]["accuracy"])
    page = jinja2.Template(template, autoescape=True).render(
        result=result,
        rows=rows,
        tasks=list(result["heldout_detail"]["tasks"]),
        curve=fitness_curve(candidates, begun),
        maps=heat_maps(recipe),
        unseen=unseen(result),
        bars=bars(rows, "Held-out accuracy" if unseen(result) else "Accuracy on the search's own items"),
        checks=[(name, spot_checks(made)) for name, made in checks_by_objective(result["checks"]["made"]).items()],
        experts=told_of_experts(result),
        front=result.get("front"),
        rounds=result.get("rounds"),
        fronts=front_pictures(result["front"], result["baselines_detail"]) if "front" in result else [],
        cell=cell,
        recipe=recipe.to_yaml(),
        head=head() if charts else "",
        body=body({"kind": "search", "alive": False, "state": "done", "charts": charts}) if charts else "",
        charts=charts,
        config=yaml.safe_dump(yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8")), sort_keys=False),
    )
    write_atomically(directory / "report.html", page)
    return directory / "report.html"


def fitness_curve(candidates: list[Candidate], begun: Sequence[int] = ()) -> str:
    """Every candidate as a dot; the best so far and each generation's mean as lines. begun: how many there were when
    each later round began, which a line marks."""
    known = [(i, c.value) for i, c in enumerate(candidates) if not math.isnan(c.value)]
    if not known:
        return ""
    low, high = min(v for _, v in known), max(v for _, v in known)
    span = (high - low) or 1.0
    low, high = low - 0.05 * span, high + 0.05 * span
    x = lambda i: PAD + (WIDTH - PAD - 12) * i / max(1, len(candidates) - 1)
    y = lambda v: 10 + (HEIGHT - PAD) * (high - v) / (high - low)
    parts = [
        axis(low, high, y),
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" class="label">candidate (1 to {len(candidates)})</text>',
    ]
    for number, i in enumerate(begun, 2):
        at = x(i - 0.5)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="10" y2="{HEIGHT - PAD + 10}" class="round"/>')
        parts.append(f'<text x="{at + 4:.1f}" y="20" class="tick">round {number}</text>')
    parts += [f'<circle cx="{x(i):.1f}" cy="{y(v):.1f}" r="1.8" class="dot"/>' for i, v in known]
    best, line = -math.inf, []
    for i, v in known:
        if v > best:
            line += [(i, best), (i, v)] if line else [(i, v)]
            best = v
    line.append((len(candidates) - 1, best))
    generations: dict[int, list[tuple[int, float]]] = {}
    for i, v in known:
        generations.setdefault(candidates[i].generation, []).append((i, v))
    means = [tuple(map(statistics.fmean, zip(*own))) for own in generations.values()]
    for name, points in (("mean", means), ("best", line)):
        parts.append(f'<polyline class="{name}" points="{" ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in points)}"/>')
    return svg(parts, WIDTH, HEIGHT, "Fitness of every candidate")


def checks_by_objective(made: list) -> dict[str, list]:
    """Spot checks of result.json, those of each objective by its name; of accuracy alone they have none."""
    found: dict[str, list] = {}
    for generation, estimate, error, mean, mean_error, *name in made:
        found.setdefault(name[0] if name else "", []).append((generation, estimate, error, mean, mean_error))
    return found


def spot_checks(made: list) -> str:
    """Estimates beside the means of further answers, each with a standard error each way. made: of result.json."""
    if not made:
        return ""
    marks = []
    for i, (_, estimate, error, mean, mean_error) in enumerate(made):
        marks += [("estimated", i - 0.12, estimate, error), ("answered", i + 0.12, mean, mean_error)]
    low, high = min(v - e for *_, v, e in marks) - 0.01, max(v + e for *_, v, e in marks) + 0.01
    x = lambda i: PAD + (WIDTH - PAD - 12) * (i + 0.5) / len(made)
    y = lambda v: 10 + (HEIGHT - PAD) * (high - v) / (high - low)
    parts = [axis(low, high, y), f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" class="label">generation</text>']
    parts += [
        f'<text x="{x(i):.1f}" y="{HEIGHT - 20}" class="label">{generation}</text>'
        for i, (generation, *_) in enumerate(made)
    ]
    for name, i, v, e in marks:
        parts.append(f'<line class="{name}" x1="{x(i):.1f}" x2="{x(i):.1f}" y1="{y(v - e):.1f}" y2="{y(v + e):.1f}"/>')
        parts.append(f'<circle class="{name}" cx="{x(i):.1f}" cy="{y(v):.1f}" r="3.5"/>')
    return svg(parts, WIDTH, HEIGHT, "Spot checks")


def bars(rows, title: str = "Held-out accuracy") -> str:
    """Accuracy of the winner and the baselines, with a standard error each way."""
    height = 24 * len(rows) + 12
    scale = (WIDTH - 260) / max(0.01, max(d["accuracy"] + d["stderr"] for _, d, _ in rows))
    parts = []
    for i, (name, detail, evolved) in enumerate(rows):
        y, length, error = 6 + 24 * i, detail["accuracy"] * scale, detail["stderr"] * scale
        end = 204 + length
        parts += [
            f'<text x="196" y="{y + 14}" class="name">{_escape(name)}</text>',
            f'<rect x="204" y="{y}" width="{length:.1f}" height="18" class="{"win" if evolved else "bar"}"/>',
            f'<line x1="{end - error:.1f}" x2="{end + error:.1f}" y1="{y + 9}" y2="{y + 9}" class="error"/>',
            f'<text x="{212 + length + error:.1f}" y="{y + 14}">{detail["accuracy"]:.3f}</text>',
        ]
    return svg(parts, WIDTH, height, title)


def heat_maps(recipe: Recipe) -> list[tuple[str, str]]:
    """(parameter, SVG) of the winner's coefficients: a row per model, a column per layer group and filter. Of a path a
    column per hop, with the scale of the state that enters it."""
    if hops := read_hops(recipe):
        columns = [f"{number}: layer {hop.layer}" for number, hop in enumerate(hops, 1)]
        rows = {}
        for model in dict.fromkeys(hop.model for hop in hops):
            rows[Path(model).name] = [hop.scale if hop.model == model else None for hop in hops]
        return [("scales along the path", heat_map(columns, rows))]
    table = coefficients(recipe)
    return [(name, heat_map(columns, rows)) for name, (columns, rows) in table.items()]


def coefficients(recipe: Recipe) -> dict[str, tuple[list[str], dict[str, list[float]]]]:
    """parameter -> (column names, model -> values), read back from a recipe's slices: what comes before the
    stack, its layers, what comes after."""
    table: dict[str, tuple[list[str], dict[str, list[float]]]] = {}
    for index, part in enumerate(recipe.slices):
        span = _span(part.sources[0].layer_range)
        owners = [(Path(str(source.model)).name, source.parameters) for source in part.sources]
        for owner, parameters in [*owners, ("all models", part.parameters)]:
            for parameter, setting in parameters.items():
                columns, rows = table.setdefault(parameter, ([], {}))
                # Conditions for tensors outside the stack stand first; those of the last slice follow it.
                cells = sorted(_cells(setting, span), key=lambda cell: cell[2] and index > 0)
                for column, value, _ in cells:
                    if column not in columns:
                        columns.append(column)
                    rows.setdefault(owner, []).append(value)
    return table


def _span(layer_range) -> str:
    if layer_range is None:
        return "all layers"
    first, last = layer_range[0], layer_range[1] - 1
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def _cells(setting, span: str):
    """(column, value, whether the tensor is outside the stack)"""
    if not isinstance(setting, (list, tuple)):
        setting = [{"value": setting}]
    elif not isinstance(setting[0], dict):
        setting = [{"value": list(setting)}]
    for condition in setting:
        pattern = condition.get("filter")
        values = condition["value"] if isinstance(condition["value"], (list, tuple)) else [condition["value"]]
        outside = pattern is not None and pattern.endswith((".weight", ".bias"))
        for i, value in enumerate(values):
            name = f"{span}[{i}]" if len(values) > 1 else span
            if outside:
                name = pattern.removeprefix("model.").removesuffix(".weight")
            elif pattern:
                name += f" {pattern}"
            yield name, float(value), outside


def heat_map(columns: list[str], rows: Mapping[str, Sequence[float | None]]) -> str:
    """Coefficients as colours and numbers: a row each of `rows`, whose cells follow the columns; None: an empty one."""
    cell, left, top = max(30, min(64, 640 // max(1, len(columns)))), 150, 110
    values = [v for row in rows.values() for v in row if v is not None]
    highest = max(1e-9, *map(abs, values))
    parts = []
    for j, column in enumerate(columns):
        x = left + j * cell + cell / 2
        parts.append(
            f'<text transform="translate({x:.0f},{top - 8}) rotate(-45)" class="tick">{_escape(column)}</text>'
        )
    for i, (name, row) in enumerate(rows.items()):
        y = top + i * 28
        parts.append(f'<text x="{left - 8}" y="{y + 19}" class="name">{_escape(name)}</text>')
        for j, value in enumerate(row):
            if value is None:
                continue
            ink = "#fff" if abs(value) > 0.6 * highest else "#222"
            middle = left + j * cell + cell / 2 - 1
            parts.append(
                f'<rect x="{left + j * cell}" y="{y}" width="{cell - 2}" height="26" fill="{_color(value / highest)}"/>'
                f'<text x="{middle:.0f}" y="{y + 17}" class="cell" fill="{ink}">{value:.2f}</text>'
            )
    return svg(parts, left + cell * len(columns) + 90, top + 28 * len(rows) + 8, "Coefficients of the winner")


def _color(share: float) -> str:
    """White at 0, blue up to 1, red down to -1."""
    strong = (33, 102, 172) if share >= 0 else (178, 24, 43)
    return "#" + "".join(f"{round(255 + (s - 255) * min(1, abs(share))):02x}" for s in strong)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
