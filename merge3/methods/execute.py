"""Run planned steps: jobs of one kind share one kernel call, whatever their number."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from merge3 import kernels
from merge3.errors import BadInput
from merge3.methods.base import Copy, Elementwise, Fused, Job, Method, Step
from merge3.statistics import Statistics, rows_of

Get = Callable[[Any], torch.Tensor]
Output = tuple[str, Step, torch.Tensor]  # tensor name, what to do, where to
_PLACE = re.compile(r"\b(out|base|experts)\[(\d+)\]|\btensor (\d+)\b")  # in a kernel's message
PREPARED = 512  # tables kept, a few kB each: one a swap, or one a layer where layers are merged one by one


def steps_for(method: Method, jobs: list[Job], statistics: Statistics) -> list[Step]:
    """What to run for each job, its statistics fetched in one go."""
    method.prefetch(jobs, statistics)
    return [method.step(job, statistics) for job in jobs]


def execute(outputs: Iterable[Output], get: Get, seed: int = 0, prepared: OrderedDict | None = None) -> None:
    """Write every output in place. seed: of random keeps; each tensor draws from a stream of its name.

    prepared: kept by a caller who executes ever the same tensors; see kernels.Prepared.
    """
    fused: dict[tuple, list[tuple[str, Fused, torch.Tensor]]] = {}
    rules: dict[tuple, list[tuple[str, Elementwise, torch.Tensor]]] = {}
    for name, step, out in outputs:
        if isinstance(step, Copy):
            out.copy_(get(step.source))
        elif isinstance(step, Elementwise):
            rules.setdefault((step.rule, len(step.experts)), []).append((name, step, out))
        else:
            split = step.coefficients.ndim == 3
            key = (step.modes, step.base is None, len(step.experts), split, step.columns)
            fused.setdefault(key, []).append((name, step, out))
    for (modes, no_base, _, split, columns), group in fused.items():
        if columns:
            turned = [(name, step, rows_of(out, True)) for name, step, out in group]
            _merge(modes, no_base, split, turned, lambda ref: rows_of(get(ref), True), seed, None)
            for (_, _, out), (_, _, rows) in zip(group, turned):
                exchanged = out.transpose(0, -1)
                exchanged.copy_(rows.reshape(exchanged.shape))
        else:
            _merge(modes, no_base, split, group, get, seed, None if split else prepared)
    for (rule, _), group in rules.items():
        with _named(group):
            kernels.elementwise_(
                [out for _, _, out in group],
                [get(step.base) for _, step, _ in group],
                [get(e) for _, step, _ in group for e in step.experts],
                rule,
                torch.tensor([step.scalar for _, step, _ in group], dtype=torch.float32),
                torch.from_numpy(np.stack([step.per_expert for _, step, _ in group]).astype(np.float32)),
                [step.rows for _, step, _ in group if step.rows is not None],
            )


def _merge(modes, no_base: bool, split: bool, group: list, get: Get, seed: int, prepared: OrderedDict | None) -> None:
    rows = rows_of if split else lambda tensor: (tensor,)
    outs = [row for _, _, out in group for row in rows(out)]
    bases = [] if no_base else [row for _, step, _ in group for row in rows(get(step.base))]
    experts = [
        row for _, step, _ in group for together in zip(*(rows(get(e)) for e in step.experts)) for row in together
    ]
    coefficients = torch.from_numpy(
        np.concatenate([s.coefficients if split else s.coefficients[None] for _, s, _ in group]).astype(np.float32)
    )
    lambdas = torch.from_numpy(
        np.concatenate([np.broadcast_to(s.lambda_, len(s.coefficients) if split else 1) for _, s, _ in group]).astype(np.float32)
    )
    # Rows of one tensor are drawn and thinned alike; only deterministic methods split tensors.
    ids = lambda: torch.tensor([kernels.tensor_id(name) for name, _, out in group for _ in rows(out)], dtype=torch.int64)
    tables = [table for _, step, _ in group for table in step.rank_tables]
    modes = kernels.Modes(modes.sparsify, modes.elect, modes.normalize, seed)
    if prepared is None:
        with _named(group):
            kernels.merge_(outs, bases, experts, coefficients, lambdas, modes, ids(), tables)
        return
    # What is prepared holds its tensors, so an address stands for the same memory as long as it is kept.
    key = (modes.sparsify, no_base, *(t.data_ptr() for tensors in (outs, bases, experts, tables) for t in tensors))
    if key not in prepared:
        with _named(group):
            prepared[key] = kernels.Prepared(outs, bases, experts, ids(), tables, modes.sparsify)
        while len(prepared) > PREPARED:
            prepared.popitem(last=False)
    prepared.move_to_end(key)
    prepared[key].upload(coefficients, lambdas)
    prepared[key].launch(modes)


@contextmanager
def _named(group: list[tuple[str, Step, torch.Tensor]]):
    """Kernels know a tensor by its place in a list; whoever reads their message knows it by name and model."""
    try:
        yield
    except BadInput as error:
        message = _PLACE.sub(lambda match: _name(match, group), str(error))
        if message == str(error):
            raise
        raise BadInput(message) from None


def _name(match: re.Match, group: list[tuple[str, Step, torch.Tensor]]) -> str:
    rows = []  # a split tensor gives the kernels one for each of its rows
    for name, step, _ in group:
        split = isinstance(step, Fused) and step.coefficients.ndim == 3
        rows += [(name, step)] * (len(step.coefficients) if split else 1)
    which, place = match[1], int(match[2] or match[3])
    at, expert = divmod(place, len(rows[0][1].experts)) if which == "experts" else (place, 0)
    if at >= len(rows):
        return match[0]
    name, step = rows[at]
    source = {"base": step.base, "experts": step.experts[expert]}.get(which)
    if source is None:
        return f"the merge's tensor {name!r}" if which else f"tensor {name!r}"
    return f"tensor {source.tensor!r} of {source.model}"
