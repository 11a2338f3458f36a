"""mergekit on merge3's kernels: import this, and mergekit's task arithmetic family runs on them.

    import merge3.adapters.mergekit                             # then mergekit as always
    python -m merge3.adapters.mergekit recipe.yaml merged/      # mergekit-yaml, with all its options

mergekit reads, plans and writes as it does; what is replaced is the arithmetic of task_arithmetic, ties, dare_linear,
dare_ties, della, della_linear, breadcrumbs and breadcrumbs_ties. It is float32 with one rounding, so with
`dtype: float32` the result is mergekit's to rounding, and with a narrower dtype closer to the exact one. Random
keeps come from merge3's generator under mergekit's own seed: the same share, other elements. What the kernels
do not take (more than 8 models, float64, a density of 0, a device they were not built for) mergekit computes
itself, and a warning says so once.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge

from merge3.kernels import MAX_EXPERTS, build_info
from merge3.methods import METHODS, Job, execute
from merge3.program import Program
from merge3.statistics import Statistics

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BASE = "base"
_mergekits_own = GeneralizedTaskArithmeticMerge.merge_group


def merge_group(self: GeneralizedTaskArithmeticMerge, group: Any, /, **parameters: Any) -> torch.Tensor:
    """In the place of mergekit's: group.base and group.non_base hold the tensors, parameters are already resolved."""
    base, entries = group.base.tensor, group.non_base
    if not entries:
        return base
    if problem := _problem(self, base, entries, parameters):
        warnings.warn(f"merge3: {problem}: mergekit computes this itself", stacklevel=2)
        return _mergekits_own(self, group, **parameters)
    tensors: dict[Any, torch.Tensor] = {k: entry.tensor.to(base.dtype).contiguous() for k, entry in enumerate(entries)}
    tensors[_BASE] = base.contiguous()
    own = [name for name in ("weight", "density", "gamma", "epsilon") if name in parameters]
    job = Job(
        group.metadata.name or "tensor",
        _BASE,
        tuple(range(len(entries))),
        {name: parameters[name] for name in ("lambda", "normalize", "rescale", "int8_mask")},
        tuple({name: parameters[name][entry.id] for name in own} for entry in entries),
        tuple(base.shape),
    )
    out = torch.empty_like(tensors[_BASE])
    program = Program(METHODS[self.method_name], (job,), shapes={job.name: job.shape})
    steps = program.steps(program.shapes, Statistics(tensors.__getitem__))
    execute([(job.name, steps[job.name], out)], tensors.__getitem__, seed=torch.initial_seed() % 2**31)
    return out


def _problem(
    method: GeneralizedTaskArithmeticMerge, base: torch.Tensor, entries: Any, parameters: dict[str, Any]
) -> str:
    """What the kernels do not take; empty where they do."""
    if method.method_name not in METHODS:
        return f"{method.method_name} is not one of its methods"
    if len(entries) > MAX_EXPERTS:
        return f"{len(entries)} models, more than {MAX_EXPERTS}"
    if base.dtype not in _DTYPES:
        return f"{base.dtype} tensors"
    if base.device.type not in build_info()["devices"]:
        return f"no kernels for {base.device.type} in this build"
    if any(parameters["density"][entry.id] <= 0 for entry in entries):
        return "a density of 0"
    return ""


def install() -> None:
    """Make mergekit's task-arithmetic methods merge with these kernels, in this process; see merge_group."""
    GeneralizedTaskArithmeticMerge.merge_group = merge_group


def uninstall() -> None:
    """mergekit as it was."""
    GeneralizedTaskArithmeticMerge.merge_group = _mergekits_own


install()

if __name__ == "__main__":
    from mergekit.scripts.run_yaml import main

    main()
