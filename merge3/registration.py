"""What candidates are asked and how their answers count: one value, the same for every engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from merge3.irt.estimation import Estimator
from merge3.space import SpaceDefinition
from merge3.tasks import Item

ACCURACY = "accuracy"


@dataclass(frozen=True, eq=False)
class Registration:
    """The question put to every subject; `dataclasses.replace` makes another one of it.

    items: what is asked, in the order that responses will have. space: what genomes mean; None where only recipes and
    endpoints are asked. heads: task -> the endpoint whose head answers it (classification). weights: task -> its weight
    in the accuracy, default 1. estimators: task -> what makes accuracy of answers to a subset; none: the plain mean.
    objectives: names of the values that an evaluation has, `accuracy` or tasks. seed: of random keeps, the same for
    every subject, so that candidates differ by their genes alone. chat: prompts go through the chat template.

        asked = Registration(tuple(read_items("items.jsonl")))
        with_other_keeps = dataclasses.replace(asked, seed=1)
    """

    items: tuple[Item, ...]
    space: SpaceDefinition | None = None
    heads: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    estimators: Mapping[str, Estimator] = field(default_factory=dict)
    objectives: tuple[str, ...] = (ACCURACY,)
    seed: int = 0
    chat: bool = False

    def tasks(self) -> dict[str, list[int]]:
        """Positions of every task's items, in order."""
        positions: dict[str, list[int]] = {}
        for i, item in enumerate(self.items):
            positions.setdefault(item.task, []).append(i)
        return positions
