"""Run planned steps: jobs of one kind share one kernel call, whatever their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from merge3 import kernels
from merge3.methods.base import Copy, Elementwise, Fused, Job, Method, Step
from merge3.statistics import Statistics, rows_of

Get = Callable[[Any], torch.Tensor]
Output = tuple[str, Step, torch.Tensor]  # tensor name, what to do, where to


def steps_for(method: Method, jobs: list[Job], statistics: Statistics) -> list[Step]:
    """What to run for each job, its statistics fetched in one go."""
    method.prefetch(jobs, statistics)
    return [method.step(job, statistics) for job in jobs]


def execute(outputs: Iterable[Output], get: Get, seed: int = 0) -> None:
    """Write every output in place. seed: of random keeps; each tensor draws from a stream of its name."""
    fused: dict[tuple, list[tuple[str, Fused, torch.Tensor]]] = {}
    rules: dict[tuple, list[tuple[Elementwise, torch.Tensor]]] = {}
    for name, step, out in outputs:
        if isinstance(step, Copy):
            out.copy_(get(step.source))
        elif isinstance(step, Elementwise):
            rules.setdefault((step.rule, len(step.experts)), []).append((step, out))
        else:
            split = step.coefficients.ndim == 3
            key = (step.modes, step.base is None, len(step.experts), split, step.columns)
            fused.setdefault(key, []).append((name, step, out))
    for (modes, no_base, _, split, columns), group in fused.items():
        if columns:
            turned = [(name, step, rows_of(out, True)) for name, step, out in group]
            _merge(modes, no_base, split, turned, lambda ref: rows_of(get(ref), True), seed)
            for (_, _, out), (_, _, rows) in zip(group, turned):
                exchanged = out.transpose(0, -1)
                exchanged.copy_(rows.reshape(exchanged.shape))
        else:
            _merge(modes, no_base, split, group, get, seed)
    for (rule, _), group in rules.items():
        kernels.elementwise_(
            [out for _, out in group],
            [get(step.base) for step, _ in group],
            [get(e) for step, _ in group for e in step.experts],
            rule,
            torch.tensor([step.scalar for step, _ in group], dtype=torch.float32),
            torch.from_numpy(np.stack([step.per_expert for step, _ in group]).astype(np.float32)),
            [step.rows for step, _ in group if step.rows is not None],
        )


def _merge(modes, no_base: bool, split: bool, group: list, get: Get, seed: int) -> None:
    rows = rows_of if split else lambda tensor: (tensor,)
    outs = [row for _, _, out in group for row in rows(out)]
    bases = [] if no_base else [row for _, step, _ in group for row in rows(get(step.base))]
    experts = [
        row for _, step, _ in group for together in zip(*(rows(get(e)) for e in step.experts)) for row in together
    ]
    coefficients = np.concatenate([s.coefficients if split else s.coefficients[None] for _, s, _ in group])
    lambdas = np.concatenate([np.broadcast_to(s.lambda_, len(s.coefficients) if split else 1) for _, s, _ in group])
    # Rows of one tensor are drawn and thinned alike; only deterministic methods split tensors.
    ids = [kernels.tensor_id(name) for name, _, out in group for _ in rows(out)]
    kernels.merge_(
        outs, bases, experts,
        torch.from_numpy(coefficients.astype(np.float32)),
        torch.from_numpy(lambdas.astype(np.float32)),
        kernels.Modes(modes.sparsify, modes.elect, modes.normalize, seed),
        torch.tensor(ids, dtype=torch.int64),
        [table for _, step, _ in group for table in step.rank_tables],
    )  # fmt: skip
