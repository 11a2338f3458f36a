"""Run steps: those of one kind share one kernel call, whatever their number."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from merge3 import kernels
from merge3.errors import BadInput
from merge3.methods.base import Copy, Elementwise, Fused, Step, Unpacked
from merge3.methods.unpack import RULES
from merge3.statistics import rows_of

Get = Callable[[Any], torch.Tensor]
Output = tuple[str, Step, torch.Tensor]  # tensor name, what to do, where to
_PLACE = re.compile(r"\b(out|base|experts)\[(\d+)\]|\btensor (\d+)\b")  # in a kernel's message
PREPARED = 1024  # tables kept, a few kB each: one a swap, or one a candidate and layer that is merged by itself


def execute(outputs: Iterable[Output], get: Get, seed: int = 0, prepared: OrderedDict | None = None) -> None:
    """Write every output in place. seed: of random keeps; each tensor draws from a stream of its name.

    prepared: kept by a caller who executes ever the same tensors; see kernels.Prepared.
    """
    groups: dict[type, dict[tuple, list[Output]]] = {kind: {} for kind in _RUN}
    for output in outputs:
        step = output[1]
        groups[type(step)].setdefault(step.kernel, []).append(output)
    for kind, run in _RUN.items():
        for group in groups[kind].values():
            run(group, get, seed, prepared)


def _copy(group: list[Output], get: Get, seed: int, prepared: OrderedDict | None) -> None:
    for _, step, out in group:
        out.copy_(get(step.source))


def _fused(group: list[Output], get: Get, seed: int, prepared: OrderedDict | None) -> None:
    first = group[0][1]
    if not first.columns:
        _merge(group, get, seed, None if first.split else prepared)
        return
    turned = [(name, step, rows_of(out, True)) for name, step, out in group]
    _merge(turned, lambda ref: rows_of(get(ref), True), seed, None)
    for (_, _, out), (_, _, rows) in zip(group, turned):
        exchanged = out.transpose(0, -1)
        exchanged.copy_(rows.reshape(exchanged.shape))


def _elementwise(group: list[Output], get: Get, seed: int, prepared: OrderedDict | None) -> None:
    steps = [step for _, step, _ in group]
    bases, experts = [], []
    for step in steps:
        bases.append(get(step.base))
        experts += [get(expert) for expert in step.experts]
    with _named([(name, step) for name, step, _ in group]):
        kernels.elementwise_(
            [out for _, _, out in group],
            bases,
            experts,
            steps[0].rule,
            torch.tensor([step.scalar for step in steps], dtype=torch.float32),
            torch.from_numpy(np.stack([step.per_expert for step in steps]).astype(np.float32)),
            [step.rows for step in steps if step.rows is not None],
        )


def _unpacked(group: list[Output], get: Get, seed: int, prepared: OrderedDict | None) -> None:
    RULES[group[0][1].rule]([out for _, _, out in group], [step for _, step, _ in group])


# every kind of step, in the order they are run
_RUN = {Copy: _copy, Fused: _fused, Elementwise: _elementwise, Unpacked: _unpacked}


def together(step: Step) -> bool:
    """Whether merges of several candidates by such a step can be launched at once."""
    return isinstance(step, Fused) and not step.columns and not step.split


def execute_together(outputs: Iterable[tuple[Output, ...]], get: Get, seed: int, prepared: OrderedDict) -> None:
    """As execute, of the same outputs of several candidates, by steps that can go `together` over the same inputs."""
    groups: dict[tuple, list[tuple[Output, ...]]] = {}
    for own in outputs:
        groups.setdefault(tuple(step.kernel for _, step, _ in own), []).append(own)
    for group in groups.values():
        ready = [_ready(_gathered(own, get), replace(own[0][1].modes, seed=seed), prepared) for own in zip(*group)]
        kernels.launch_together(*zip(*ready))


def _merge(group: list[Output], get: Get, seed: int, prepared: OrderedDict | None) -> None:
    """One call of the fused kernel."""
    gathered, modes = _gathered(group, get), replace(group[0][1].modes, seed=seed)
    if prepared is not None:
        merge, how = _ready(gathered, modes, prepared)
        merge.launch(how)
        return
    numbers = gathered.coefficients, gathered.lambdas, modes, gathered.ids(), gathered.tables
    with _named(gathered.given):
        kernels.merge_(gathered.outs, gathered.bases, gathered.experts, *numbers)


class _Gathered(NamedTuple):
    """What the kernel is given. Of a step with coefficients for rows that is every row as a tensor."""

    outs: list[torch.Tensor]
    bases: list[torch.Tensor]
    experts: list[torch.Tensor]
    tables: list[torch.Tensor]
    given: list[tuple[str, Step]]
    coefficients: torch.Tensor
    lambdas: torch.Tensor

    def ids(self) -> torch.Tensor:
        """Rows of one tensor are drawn and thinned alike; only deterministic methods split tensors."""
        return torch.tensor([kernels.tensor_id(name) for name, _ in self.given], dtype=torch.int64)


def _gathered(group: Sequence[Output], get: Get) -> _Gathered:
    outs, bases, experts, tables = [], [], [], []
    given, coefficients, lambdas = [], [], []
    for name, step, out in group:
        rows = _rows(out, step.split)
        outs += rows
        given += [(name, step)] * len(rows)
        if step.base is not None:
            bases += _rows(get(step.base), step.split)
        inputs = [_rows(get(expert), step.split) for expert in step.experts]
        for side_by_side in zip(*inputs):
            experts += side_by_side
        own = step.coefficients if step.split else step.coefficients[None]
        coefficients.append(own)
        lambdas += np.broadcast_to(step.lambda_, len(own)).tolist() if step.split else [float(step.lambda_)]
        tables += step.rank_tables
    coefficients = torch.from_numpy(np.concatenate(coefficients).astype(np.float32))
    return _Gathered(outs, bases, experts, tables, given, coefficients, torch.tensor(lambdas, dtype=torch.float32))


def _ready(gathered: _Gathered, modes: kernels.Modes, prepared: OrderedDict) -> tuple[kernels.Prepared, kernels.Modes]:
    """A merge that is prepared, its numbers uploaded, and its modes."""
    outs, bases, experts, tables = gathered[:4]
    # What is prepared holds its tensors, so an address stands for the same memory as long as it is kept.
    addresses = [tensor.data_ptr() for tensor in (*outs, *bases, *experts, *tables)]
    key = (modes.sparsify, not bases, *addresses)
    if key not in prepared:
        with _named(gathered.given):
            prepared[key] = kernels.Prepared(outs, bases, experts, gathered.ids(), tables, modes.sparsify)
        while len(prepared) > PREPARED:
            prepared.popitem(last=False)
    prepared.move_to_end(key)
    prepared[key].upload(gathered.coefficients, gathered.lambdas)
    return prepared[key], modes


def _rows(tensor: torch.Tensor, split: bool) -> list[torch.Tensor]:
    return list(rows_of(tensor)) if split else [tensor]


@contextmanager
def _named(given: list[tuple[str, Step]]):
    """Kernels know a tensor by its place in a list; whoever reads their message knows it by name and model."""
    try:
        yield
    except BadInput as error:
        message = _PLACE.sub(lambda match: _name(match, given), str(error))
        if message == str(error):
            raise
        raise BadInput(message) from None


def _name(match: re.Match, given: list[tuple[str, Step]]) -> str:
    which, place = match[1], int(match[2] or match[3])
    expert = 0
    if which == "experts":
        place, expert = divmod(place, len(given[0][1].experts))
    if place >= len(given):
        return match[0]
    name, step = given[place]
    source = {"base": step.base, "experts": step.experts[expert]}.get(which)
    if source is None:
        return f"the merge's tensor {name!r}" if which else f"tensor {name!r}"
    return f"tensor {source.tensor!r} of {source.model}"
