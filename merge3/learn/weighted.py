"""The live model as a function of the weights of task vectors, and the gradient of a loss with respect to them.

The merged weights are the slot's, written in place before a step. Backward gives one parameter's gradient at a time;
as soon as it is there it becomes a number for each expert, dL/dw_k = <dL/dθ, τ_k>, and is dropped. So what is resident
is the pool, one set of merged weights, and one gradient: never the task vectors times their weights. Of small models
the gradients of a step's passes are summed first, which is faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch

from merge3 import differentiable
from merge3.errors import RecipeError
from merge3.live.slot import Slot
from merge3.methods import Job
from merge3.program import Program

SMALL = 2**28  # bytes of parameters up to which their gradients may all be there at once


class _Part(NamedTuple):
    """Where a merged tensor and a parameter are the same memory. at: of the jobs. of_parameter, of_tensor: (size,
    stride, offset) of the shared part within each; None: all of it."""

    at: int
    of_parameter: tuple | None
    of_tensor: tuple | None


class Weighted:
    """program: of a task_arithmetic recipe over the slot's pool. Raises RecipeError where a tensor that it merges is no
    part of a parameter that has a gradient."""

    def __init__(self, slot: Slot, program: Program):
        self.slot, self.program = slot, program
        self.jobs: tuple[Job, ...] = program.jobs
        self.gradient = torch.zeros(len(self.jobs[0].sources), len(self.jobs), dtype=torch.float64)
        self._parts: list[tuple[torch.nn.Parameter, list[_Part]]] = []
        self._known: dict[_Part, list[torch.Tensor]] = {}
        self._memory = slot.pool.memory  # the plan under which these are resident
        slot.use_head(None)
        tensors, parameters = slot.written(), _by_memory(slot.model)
        for name in slot.pool.heads.get(slot.pool.base, ()):
            if name in tensors:  # the merge's own, which is copied to where the model has it
                tensors[name] = slot.model.get_parameter(name).data
        found: dict[int, list[_Part]] = {}
        places = {job.name: at for at, job in enumerate(self.jobs)}
        # An output that the merge ties, in a live model that holds it apart, is a copy: its gradient is the source's.
        copies = [(places[source], name) for name, source in program.ties.items() if source in places]
        for at, name in [*((at, name) for name, at in places.items()), *copies]:
            for parameter, part in _shared(at, tensors[name], parameters) if name in tensors else ():
                if part not in found.setdefault(id(parameter), []):
                    found[id(parameter)].append(part)
        by_id = {id(p): p for own in parameters.values() for p in own}
        self._parts = [(by_id[key], parts) for key, parts in found.items()]
        covered = {part.at for _, parts in self._parts for part in parts}
        size = sum(parameter.numel() * parameter.element_size() for parameter, _ in self._parts)
        self._summed = size <= SMALL and all(p.dtype == torch.float32 for p, _ in self._parts)  # nothing is rounded
        largest = max((parameter.numel() * parameter.element_size() for parameter, _ in self._parts), default=0)
        self.gradient_bytes = size if self._summed else largest  # that are there at once
        self.constant = [job.name for at, job in enumerate(self.jobs) if at not in covered]  # buffers: no gradient

    def write(self, weights: torch.Tensor) -> None:
        """Merge with these weights, float32 [experts, tensors], in place: the bits of the recipe's own merge."""
        jobs = []
        for at, job in enumerate(self.jobs):
            own = zip(job.per_source, weights[:, at].tolist())
            jobs.append(replace(job, per_source=tuple({**known, "weight": weight} for known, weight in own)))
        self.slot.run(replace(self.program, jobs=tuple(jobs)))

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """While it lasts parameters have gradients, and what every backward gives is in `gradient` afterwards, float64
        [experts, tensors], which begins at 0. Heads that are shown meanwhile are constants."""
        self.gradient.zero_()
        handles = []
        try:
            for parameter, parts in self._parts:
                parameter.requires_grad_(True)
                if not self._summed:
                    hook = lambda own, parts=parts: self._take(own, parts)
                    handles.append(parameter.register_post_accumulate_grad_hook(hook))
            yield
            for parameter, parts in self._parts:
                if parameter.grad is not None:
                    self._take(parameter, parts)
        finally:
            for handle in handles:
                handle.remove()
            for parameter, _ in self._parts:
                parameter.requires_grad_(False)
                parameter.grad = None

    def _take(self, parameter: torch.nn.Parameter, parts: Sequence[_Part]) -> None:
        whole, parameter.grad = parameter.grad, None
        pool = self.slot.pool
        for part in parts:
            job = self.jobs[part.at]
            gradient = _of(whole, part.of_parameter)
            base, *experts = self._inputs(part)
            # A live model may be wider than what is stored: gradients are not rounded to that.
            kind = torch.promote_types(gradient.dtype, base.dtype)
            if base.dtype != kind:
                base, *experts = (tensor.to(kind) for tensor in (base, *experts))
            self.gradient[:, part.at] += differentiable.weight_gradient(gradient.to(kind), base, experts)
            if not pool.resident(job.refs):
                pool.give_back(job.refs)

    def _inputs(self, part: _Part) -> list[torch.Tensor]:
        """Base and experts; what is resident is looked up once."""
        pool, job = self.slot.pool, self.jobs[part.at]
        if pool.memory is not self._memory:
            self._known, self._memory = {}, pool.memory
        if part in self._known:
            return self._known[part]
        found = [_of(pool.get(ref), part.of_tensor) for ref in job.refs]
        if part.of_tensor is None and pool.resident(job.refs):
            self._known[part] = found
        return found


def check_refs(jobs: Sequence[Job]) -> None:
    """Raises RecipeError for a program that has no weights to learn."""
    if not jobs or jobs[0].base is None:
        raise RecipeError("fit", "no tensor that a weight could be learned for", "a base and experts that differ")


def _by_memory(model: torch.nn.Module) -> dict[int, list[torch.nn.Parameter]]:
    """Storage's address -> the parameters in it."""
    found: dict[int, list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        found.setdefault(parameter.untyped_storage().data_ptr(), []).append(parameter)
    return found


def _shared(at: int, tensor: torch.Tensor, parameters) -> Iterator[tuple[torch.nn.Parameter, _Part]]:
    """The parameters that a merged tensor is, is a part of (experts that transformers fuses), or is made of (tensors
    that it splits)."""
    for parameter in parameters.get(tensor.untyped_storage().data_ptr(), ()):
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        offset = tensor.storage_offset() - parameter.storage_offset()
        if offset == 0 and tensor.shape == parameter.shape and tensor.stride() == parameter.stride():
            yield parameter, _Part(at, None, None)
        elif parameter.is_contiguous() and 0 <= offset < parameter.numel() and tensor.numel() <= parameter.numel():
            yield parameter, _Part(at, (tensor.shape, tensor.stride(), offset), None)
        elif tensor.is_contiguous() and 0 <= -offset < tensor.numel() and parameter.numel() < tensor.numel():
            yield parameter, _Part(at, None, (parameter.shape, parameter.stride(), -offset))


def _of(tensor: torch.Tensor, part: tuple | None) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor if part is None else tensor.as_strided(*part).contiguous()
