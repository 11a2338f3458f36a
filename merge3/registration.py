"""What candidates are asked and how their answers count: one value, the same for every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from merge3.errors import BadInput
from merge3.irt.estimation import Estimator
from merge3.space import SpaceDefinition
from merge3.tasks import Item, places_by_task
from merge3.tasks.documents import Raw

ACCURACY = "accuracy"
Judge = Callable[[Item, Raw], float]  # (a document, what its asks came to) -> its response in [0, 1]


@dataclass(frozen=True, eq=False)
class Registration:
    """The question put to every subject; `dataclasses.replace` makes another one of it.

    items: what is asked, in the order that responses will have. space: what genomes mean; None where only recipes and
    endpoints are asked. heads: task -> the endpoint whose head answers it (classification). weights: task -> its weight
    in the accuracy, default 1. estimators: task -> what makes accuracy of answers to a subset; none: the plain mean.
    objectives: names of the values that an evaluation has, of fitness.OBJECTIVES or tasks. seed: of random keeps, the
    same for every subject, so that candidates differ by their genes alone. chat: whose prompts go through the chat
    template: all tasks', or task -> its system message, empty for none. judges: task -> what makes responses of its
    documents' answers; without one these stay raw.

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
    chat: bool | Mapping[str, str] = False
    judges: Mapping[str, Judge] = field(default_factory=dict)

    def system(self, task: str) -> str | None:
        """The system message of a task's chat prompts, empty for none; None where no template is applied."""
        if isinstance(self.chat, bool):
            return "" if self.chat else None
        return self.chat.get(task)

    def tasks(self) -> dict[str, list[int]]:
        """Positions of every task's items, in order."""
        return places_by_task(self.items)


def check_weights(weights: Mapping[str, float], tasks: Iterable[str]) -> None:
    """Raises BadInput for a task's weight that is no number or below 0, which would ask for wrong answers, and where no
    task counts. tasks: all that are asked; one without a weight has 1."""
    for task, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise BadInput(f"weights: {task}", f"found {weight}", "a number, not negative")
    if not sum(weights.get(task, 1.0) for task in tasks) > 0:
        raise BadInput("weights", "none above zero", "a positive sum")
