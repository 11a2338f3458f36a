"""What is evaluated, from what a request says of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from merge3.engine import Subject, Varied
from merge3.errors import BadInput
from merge3.export_task import check_task
from merge3.recipe import Recipe
from merge3_server.catalog import Accepted


def genome_of(values: Sequence[float], size: int | None) -> np.ndarray:
    """A genome, float64 [size]. size: None where there is no space. Raises BadInput."""
    genome = np.array(values)
    if size is None:
        raise BadInput(
            "genome", "these items were registered without a space", "a recipe, or a registration with a space"
        )
    if len(genome) != size:
        raise BadInput("genome", f"{len(genome)} values", f"{size}, the space's")
    if not np.isfinite(genome).all():
        at = int(np.flatnonzero(~np.isfinite(genome))[0])
        raise BadInput(f"genome[{at}]", f"found {genome[at]}", "a finite number")
    return genome


def of_task(subject: Subject, task: str, accepted: Accepted) -> Varied:
    """The subject as one task's model, which answers all items. Raises BadInput."""
    if isinstance(subject, np.ndarray):
        raise BadInput("task", "given with a genome", "a recipe whose method makes a model for each task")
    if isinstance(subject, Recipe):
        check_task(subject, task)
    return Varied(subject, (task,) * len(accepted.registered.load().items))
