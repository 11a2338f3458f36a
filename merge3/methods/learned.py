"""Learned merges: task arithmetic whose weights are fitted to items by gradient, a row each.

A row says what is learned from and how; nothing here computes. The result is an ordinary recipe with a weight for every
tensor, which mergekit merges too.
"""

from __future__ import annotations

from dataclasses import dataclass

from merge3.errors import RecipeError
from merge3.methods.base import DERIVED, LABELLED, RECIPE, UNLABELLED
from merge3.methods.task_arithmetic import PLAIN_SUM

RESULT = PLAIN_SUM  # the method of the recipe that a fit ends in


@dataclass(frozen=True)
class Learned:
    """loss: of learn/losses.py. labels: whether items' answers are read. bound: of learn/coefficients.py, how weights
    follow from what is learned; start: of every weight. survivors: the method that goes on over task vectors that
    are trimmed and whose signs are elected first; empty where they are taken whole. The others: defaults of `fit:`."""

    name: str
    summary: str
    reference: str
    loss: str
    labels: bool
    bound: str
    learning_rate: float
    steps: int
    start: float = 0.3
    survivors: str = ""

    @property
    def needs(self) -> str:
        """What it takes beside the models."""
        return LABELLED if self.labels else UNLABELLED

    @property
    def result(self) -> str:
        """What it ends in."""
        return DERIVED if self.survivors else RECIPE


_SUPERMERGE = "https://arxiv.org/abs/2412.10416"
_ADAMERGING = "https://arxiv.org/abs/2310.02575"
_ROWS = (
    Learned(
        "supermerge",
        "a weight per tensor, from a few labelled items of every task",
        _SUPERMERGE,
        loss="cross_entropy",
        labels=True,
        bound="tanh",
        learning_rate=1e-2,
        steps=200,
    ),
    Learned(
        "adamerging",
        "a weight per tensor that makes answers certain: entropy on unlabelled items",
        _ADAMERGING,
        loss="entropy",
        labels=False,
        bound="clamp",
        learning_rate=1e-3,
        steps=500,
    ),
    Learned(
        "adamerging++",
        "adamerging over task vectors that are trimmed and whose signs are elected, as in TIES",
        _ADAMERGING,
        loss="entropy",
        labels=False,
        bound="clamp",
        learning_rate=1e-3,
        steps=500,
        survivors="adamerging",
    ),
    Learned(
        "expert_kl",
        "a weight per tensor by which the merge says what each expert says of its own task's unlabelled items",
        "https://arxiv.org/abs/2509.25712",
        loss="expert_kl",
        labels=False,
        bound="none",
        learning_rate=1e-2,
        steps=200,
    ),
)
LEARNED: dict[str, Learned] = {row.name: row for row in _ROWS}


def learned_named(name: str, where: str = "merge_method") -> Learned:
    """The row of a recipe with `fit:`. Raises RecipeError for a method that learns nothing."""
    if name not in LEARNED:
        raise RecipeError(where, f"{name!r} learns nothing, and there is `fit:`", " or ".join(LEARNED))
    return LEARNED[name]
