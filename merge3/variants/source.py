"""What is packed of a merge: the tensors of its base, its experts and its common model, each as it would be stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from merge3.checkpoint import Checkpoint
from merge3.checkpoint.layout import Ref
from merge3.checkpoint.write import Spec
from merge3.errors import RecipeError
from merge3.methods import Job
from merge3.pool import Pool
from merge3.program import Program


class Parts(NamedTuple):
    """What a kind makes of a source. specs: part -> (dtype, shape), in the order in which `tensors` gives them.
    about: task -> what is said of it beside, known once all tensors were given. varied: names that differ."""

    specs: Mapping[str, Spec]
    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]
    about: Callable[[], Mapping[str, Mapping[str, Any]]]
    varied: Mapping[str, list[str]]  # task -> names


@dataclass(frozen=True)
class Source:
    """settings: of the recipe's row. where: names the recipe in messages.

    Tensors come in the dtype of the common model, so that packing sees what a variant is made of later."""

    program: Program
    pool: Pool
    common: Checkpoint
    settings: Mapping[str, Any]
    where: str = "recipe"

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Of the tensors that may differ between tasks."""
        return self.program.varied

    @property
    def tasks(self) -> list[str]:
        """In the recipe's order."""
        return list(self.program.tasks)

    def dtype(self, job: Job) -> torch.dtype:
        """Of the tensor in the common model, and in every variant."""
        return self.common.tensors[job.name].dtype

    def base(self, job: Job) -> torch.Tensor:
        """The base's tensor. Raises RecipeError where the merge has none."""
        ref = job.base if job.base is not None else _of(job, self.pool.base)
        if ref is None:
            raise RecipeError(f"{self.where}: base_model", f"none for tensor {job.name!r}", "a base")
        return self._read(job, ref)

    def expert(self, job: Job, task: str) -> torch.Tensor:
        """The tensor of the model that a task belongs to."""
        return self._read(job, _of(job, self.program.tasks[task]))

    def shared(self, job: Job) -> torch.Tensor:
        """The common model's."""
        return self.common.get(job.name).to(self.pool.device)

    def check(self, job: Job, sums: torch.Tensor) -> None:
        """Raises RecipeError where a task vector is not finite. sums: of its magnitudes, [tasks]."""
        for task, total in zip(self.tasks, sums.tolist()):
            if not total < float("inf"):
                found = f"NaN or infinity in tensor {job.name!r} of {self.program.tasks[task]}"
                raise RecipeError(self.where, found, "finite weights")

    def done(self, job: Job) -> None:
        """What was read of a tensor may leave memory."""
        self.pool.give_back(job.refs)
        self.common.release(job.name)

    def _read(self, job: Job, ref: Ref) -> torch.Tensor:
        return self.pool.get(ref).to(self.dtype(job))


def _of(job: Job, model: str) -> Ref | None:
    return next((ref for ref in job.refs if ref.model == model), None)
