"""What the pictures of reports are made of."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT, PAD = 720, 260, 46


def axis(low: float, high: float, y) -> str:
    """Five lines across a picture with their values. y: from a value to its place."""
    parts = []
    for i in range(5):
        v = low + (high - low) * i / 4
        parts.append(f'<line x1="{PAD}" x2="{WIDTH - 12}" y1="{y(v):.1f}" y2="{y(v):.1f}" class="grid"/>')
        parts.append(f'<text x="{PAD - 6}" y="{y(v) + 4:.1f}" class="name">{v:.2f}</text>')
    return "".join(parts)


def svg(parts: Sequence[str], width: float, height: float, title: str) -> str:
    """A picture of these parts."""
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img"><title>{title}</title>{"".join(parts)}</svg>'
    )
