"""Merges over compacted experts that read them as they are held: one kernel call, nothing expanded but in cache.

On the CPU, where base and compacted experts are resident. All else is expanded through the window; see streaming.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from merge3 import kernels
from merge3.compact import merge_compact_
from merge3.methods.base import Fused, Step
from merge3.methods.execute import Output
from merge3.pool import Pool


def readable(step: Step, pool: Pool) -> bool:
    """Whether a kernel can read a step's experts as they are held."""
    if pool.device.type != "cpu" or not isinstance(step, Fused) or not step.sliceable:
        return False
    for ref in step.refs:
        if ref not in pool.compacted:
            if not pool.resident((ref,)):
                return False
            continue
        base = pool.compacted.of(ref)[1]
        alike = pool.common_dtype(base) == pool.common_dtype(ref)
        if ref == step.base or ref.rows is not None or not alike or not pool.resident((base,)):
            return False
    return True


def execute_held(outputs: Iterable[Output], pool: Pool, seed: int = 0) -> None:
    """As methods.execute.execute, for outputs whose steps are `readable`."""
    alike: dict[tuple, list[Output]] = {}
    for output in outputs:
        alike.setdefault(output[1].kernel, []).append(output)
    for group in alike.values():
        _merge(group, pool, seed)


def _merge(group: list[Output], pool: Pool, seed: int) -> None:
    steps = [step for _, step, _ in group]
    bases, experts, compact, tables = [], [], [], []
    for step in steps:
        if step.base is not None:
            bases.append(pool.get(step.base))
        for ref in step.experts:
            held, near = pool.compacted.of(ref) if ref in pool.compacted else (None, ref)
            experts.append(pool.get(near))
            compact.append(held)
        tables += step.rank_tables
    merge_compact_(
        [out for _, _, out in group],
        bases,
        experts,
        compact,
        torch.from_numpy(np.stack([step.coefficients for step in steps]).astype(np.float32)),
        torch.tensor([float(step.lambda_) for step in steps], dtype=torch.float32),
        replace(steps[0].modes, seed=seed),
        torch.tensor([kernels.tensor_id(name) for name, _, _ in group]),
        tables,
    )
