"""Experts that a method derives of all its experts at once, by an SVD of their task vectors, say: computed once, kept
in a file, and from then on experts like any other, so that weights over them are searched at the fused kernel's speed.

A derived model has one float32 tensor for each job of a recipe. In a pool it goes by `derived:` and a hash of the
method, the parameters it is derived by, and the tensors it reads. Its folder goes by the same hash with the endpoints'
contents in the place of their names, so that a later run finds it wherever the models lie by then.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from merge3 import __version__
from merge3.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from merge3.checkpoint.layout import Ref
from merge3.checkpoint.read import SINGLE
from merge3.errors import BadInput, CheckpointError, ResourceError

PREFIX = "derived:"
Job = Any  # methods.base.Job: here a name, refs, a shape, and the parameters that the tensor is derived by
Read = Callable[[Iterable[Job]], Iterator[tuple[Job, list[torch.Tensor]]]]  # each job's inputs, one job's at a time
Compute = Callable[..., torch.Tensor]  # of (job, inputs), or of (job, inputs, what the survey found)
Survey = Callable[[Sequence[Job], Read], Any]


class Source(Protocol):
    """Where the inputs come from; see Pool."""

    device: torch.device

    def stored(self, ref: Ref) -> torch.Tensor:
        """See Pool."""

    def unmap(self, ref: Ref) -> None:
        """See Pool."""

    def content_hashes(self) -> dict[str, str]:
        """See Pool."""


@dataclass
class _Model:
    method: str
    compute: Compute
    jobs: dict[str, Job]
    survey: Survey | None = None
    checkpoint: Checkpoint | None = None  # once it is computed or found

    def hash(self, endpoints: Mapping[str, str]) -> str:
        """Of all that its values depend on. endpoints: what stands for each model that is read."""
        tensors = []
        for job in self.jobs.values():
            refs = [(endpoints[ref.model], ref.tensor) for ref in job.refs]
            tensors.append((job.name, job.shape, job.base is not None, refs, job.shared, job.per_source))
        everything = json.dumps([__version__, self.method, tensors], sort_keys=True)
        return hashlib.sha256(everything.encode()).hexdigest()[:16]


class Derived:
    """The derived models of one source. folder: where they are kept and found again, each in a folder of its own;
    default: a temporary one, which goes with this object."""

    def __init__(self, source: Source, folder: str | Path | None = None):
        self.source = source
        self._folder = None if folder is None else Path(folder)
        self._models: dict[str, _Model] = {}

    def __contains__(self, model: str) -> bool:
        return model in self._models

    def __len__(self) -> int:
        return len(self._models)

    def add(self, method: str, compute: Compute, jobs: Iterable[Job], survey: Survey | None = None) -> str:
        """Make a model known; nothing is computed yet. Returns its name, which is the same for equal arguments.
        survey: called once before the first tensor is computed; see Method."""
        known = _Model(method, compute, {job.name: job for job in jobs}, survey)
        names = {ref.model: ref.model for job in known.jobs.values() for ref in job.refs}
        model = PREFIX + known.hash(names)
        self._models.setdefault(model, known)
        return model

    def refs(self) -> list[Ref]:
        """Every tensor of every model, computed or not."""
        return [Ref(model, name) for model, known in self._models.items() for name in known.jobs]

    def has(self, ref: Ref) -> bool:
        """Whether a model that is known here has a tensor of this name."""
        return ref.tensor in self._models[ref.model].jobs

    def job(self, ref: Ref) -> Job:
        """What a tensor is derived of. Raises CheckpointError where the model has none of this name."""
        job = self._models[ref.model].jobs.get(ref.tensor)
        if job is None:
            raise CheckpointError(ref.model, f"no tensor {ref.tensor!r}", "one of those the recipe merges")
        return job

    def get(self, ref: Ref) -> torch.Tensor:
        """The tensor, float32, a view of its mapped file. The first call computes the whole model, unless it is found.

        Computing holds one job's inputs, as float32, and its result at a time. Raises CheckpointError where an input or
        the result is not finite, ResourceError where the file cannot be written.
        """
        known = self._models[ref.model]
        if known.checkpoint is None:
            folder = self._folder_of(ref.model)
            if not (folder / SINGLE).exists():
                self._compute(known, folder)
            known.checkpoint = open_checkpoint(folder)
        return known.checkpoint.get(ref.tensor)

    def unmap(self, ref: Ref) -> None:
        """Take a tensor's pages out of memory."""
        checkpoint = self._models[ref.model].checkpoint
        if checkpoint is not None:
            checkpoint.release(ref.tensor)

    @cached_property
    def _temporary(self) -> tempfile.TemporaryDirectory:
        return tempfile.TemporaryDirectory(prefix="merge3-derived-")

    def _folder_of(self, model: str) -> Path:
        if self._folder is None:  # never to be found again, so no contents are read to name it
            return Path(self._temporary.name) / model.removeprefix(PREFIX)
        return self._folder / self._models[model].hash(self.source.content_hashes())

    def _compute(self, known: _Model, folder: Path) -> None:
        specs = {name: (torch.float32, job.shape) for name, job in known.jobs.items()}
        jobs = list(known.jobs.values())
        try:
            with CheckpointWriter(folder, specs, shard_size=sys.maxsize) as writer, torch.no_grad():
                found = () if known.survey is None else (known.survey(jobs, self._read),)
                for job, inputs in self._read(jobs):
                    writer.put(job.name, _computed(known, job, inputs, *found))
        except (BadInput, ResourceError):
            if not (folder / SINGLE).exists():  # else another process was faster
                raise

    def _read(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[torch.Tensor]]]:
        for job in jobs:
            inputs = [self.source.stored(ref).to(self.source.device).float() for ref in job.refs]
            for ref, tensor in zip(job.refs, inputs):
                if not tensor.isfinite().all():
                    raise CheckpointError(ref.model, f"NaN or infinity in tensor {ref.tensor!r}", "finite weights")
            yield job, inputs
            for ref in job.refs:
                self.source.unmap(ref)


def _computed(known: _Model, job: Job, inputs: list[torch.Tensor], *found: Any) -> torch.Tensor:
    result = known.compute(job, inputs, *found)
    assert result.dtype == torch.float32 and tuple(result.shape) == job.shape, f"{known.method}: {job.name}"
    if not result.isfinite().all():
        raise CheckpointError(known.method, f"tensor {job.name!r} derived as NaN or infinity", "finite weights")
    return result
