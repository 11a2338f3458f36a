"""Merges of two models that share no ancestor: units are matched by what they do on the same inputs, a row each.

A row says how units are matched; nothing here computes. What comes out is a checkpoint, not a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

from merge3.methods.base import CHECKPOINT, UNLABELLED


@dataclass(frozen=True)
class Zipped:
    """match: of learn/zip_matching.py. needs, result: as of Method."""

    name: str
    summary: str
    reference: str
    match: str
    needs: str = UNLABELLED
    result: str = CHECKPOINT


_ROWS = (
    Zipped(
        "zipit",
        "two models of different initialisations: units that do the same, in one model or in both, become one",
        "https://arxiv.org/abs/2305.03053",
        match="zip",
    ),
    Zipped(
        "permute",
        "two models of different initialisations: the second's units in the first's order, then the average",
        "https://arxiv.org/abs/2209.04836",
        match="one_to_one",
    ),
)
ZIPPED: dict[str, Zipped] = {row.name: row for row in _ROWS}
