"""Pictures of a front: two objectives each, every member with a standard error each way, the baselines beside it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import combinations
from typing import Any

from merge3.client.report_parts import HEIGHT, PAD, WIDTH, axis, svg


def front_pictures(front: Mapping[str, Any], baselines: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(title, SVG) of each pair of objectives. front: of result.json; baselines: its baselines_detail."""
    found = []
    for across, up in combinations(front["objectives"], 2):
        found.append((f"{up} over {across}", _picture(front, baselines, across, up)))
    return found


def _picture(front: Mapping[str, Any], baselines: Mapping[str, Mapping[str, Any]], across: str, up: str) -> str:
    members = [(str(one["member"]), one["heldout"][across], one["heldout"][up]) for one in front["members"]]
    others = [(name, one["objectives"][across], one["objectives"][up]) for name, one in baselines.items()]
    height = HEIGHT + 120
    x, first, last = _scale([point[1] for point in members + others], PAD, WIDTH - 12)
    y, lowest, highest = _scale([point[2] for point in members + others], height - PAD + 10, 10)
    parts = [axis(lowest, highest, y)]
    for i in range(5):
        value = first + (last - first) * i / 4
        parts.append(f'<text x="{x(value):.1f}" y="{height - 20}" class="label">{value:.3g}</text>')
    better = front["objectives"]
    told = f"across: {across} ({better[across]} is better), up: {up} ({better[up]} is better)"
    parts.append(f'<text x="{WIDTH / 2}" y="{height - 4}" class="label">{escape(told)}</text>')
    for kind, points in (("answered", others), ("estimated", members)):
        for name, (a, a_error), (b, b_error) in points:
            at, left, right = (x(v) for v in (a, a - a_error, a + a_error))
            place, low, high = (y(v) for v in (b, b - b_error, b + b_error))
            parts += [
                _line(kind, left, right, place, place),
                _line(kind, at, at, low, high),
                f'<circle class="{kind}" cx="{at:.1f}" cy="{place:.1f}" r="3.5"><title>{escape(name)}</title></circle>',
                f'<text x="{at + 6:.1f}" y="{place - 5:.1f}" class="tick">{escape(name)}</text>',
            ]
    return svg(parts, WIDTH, height, f"The front: {escape(up)} over {escape(across)}")


def _line(kind: str, left: float, right: float, low: float, high: float) -> str:
    return f'<line class="{kind}" x1="{left:.1f}" x2="{right:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'


def _scale(points, start: float, end: float):
    """(from a value to its place, the lowest and the highest value shown). points: (value, standard error) each."""
    low, high = min(v - e for v, e in points), max(v + e for v, e in points)
    margin = 0.05 * (high - low) or 0.05
    low, high = low - margin, high + margin
    return lambda v: start + (end - start) * (v - low) / (high - low), low, high
