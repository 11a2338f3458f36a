"""What a pool plans with and knows its endpoints by: bytes per tensor, and content hashes, read tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from merge3.checkpoint.layout import Ref
from merge3.checkpoint.read import combine_hashes
from merge3.errors import BadInput
from merge3.memory import MemoryPlan, available, pinnable, plan_memory, shown_size

FORWARDS = 2 << 30  # bytes that a GPU keeps for forwards at least, where nobody says what models may take


def plan_pool(pool: Any, budget: int | None, host: int, streamed: bool = False) -> MemoryPlan:
    """Which tensors are resident: derived ones before those they are derived of, then in the base's order.

    pool: a Pool, of which headers alone are read. host, streamed: see plan_memory. The live model may not be built yet:
    its dtype is the pool's, unless somebody asks for another. Merges that joined lie in memory whatever happens: of a
    budget on the CPU they are paid first. Raises BadInput where a budget is not enough.
    """
    size = lambda ref: math.prod(pool.shape(ref)) * pool.common_dtype(ref).itemsize
    joined, paid = 0, set(pool.joined) if budget is not None and pool.device.type == "cpu" else set()
    for model in paid:
        for info in pool.endpoints[model].tensors.values():
            converted = size(Ref(model, info.name))
            joined += info.nbytes + (converted if converted != info.nbytes else 0)
    groups = [{ref: size(ref)} for ref in pool.derived.refs()]
    filed = {model: checkpoint for model, checkpoint in pool.endpoints.items() if model not in paid}
    for name in dict.fromkeys(n for c in filed.values() for n in c.tensors):
        refs = [Ref(model, name) for model, checkpoint in filed.items() if name in checkpoint.tensors]
        groups.append({ref: size(ref) for ref in refs})
    slot = sum(size(Ref(pool.base, name)) for name in pool.base_checkpoint.tensors)
    compacted = pool.compacted
    plan = plan_memory(groups, slot, str(pool.device), budget, host, compacted.sizes, streamed, joined)
    shared = {alias: plan.away[ref] for alias, ref in compacted.aliases.items()}
    return replace(plan, away={**plan.away, **shared}) if shared else plan


def limits(pool: Any, budget: int | None) -> tuple[int | None, int]:
    """(the budget that a pool works with, bytes of host memory that it may pin). A pool that was given none and is more
    than what its GPU has free gets one, and says so. Raises BadInput for a budget of memory that is not free there."""
    device = pool.device
    if device.type != "cuda":
        return budget, 0
    total, free = plan_pool(pool, budget, 0).total, available(device)
    if budget is not None:
        if total > free:
            found = f"found {shown_size(budget)}, and {shown_size(free)} are free on {device}"
            raise BadInput("memory_budget", found, "what is free")
        return budget, pinnable()
    if total <= free - FORWARDS:
        return None, 0
    budget = max(0, free - FORWARDS)
    try:
        plan_pool(pool, budget, 0)
    except BadInput as error:
        found = f"{shown_size(free)} are free, {shown_size(FORWARDS)} of them for forwards"
        raise BadInput(str(device), found, error.expected) from None
    said = f"{device} has {shown_size(free)} free, and these models with the live one take {shown_size(total)}"
    pool.notes.append(f"{said}: {shown_size(budget)} are used, what does not fit is streamed (--memory-budget)")
    return budget, pinnable()


def common_dtype(pool: Any, ref: Ref) -> torch.dtype:
    """What a tensor is computed from: the pool's dtype, or the promotion over the endpoints that have this name. Of a
    derived tensor: what its first input is computed from, so that one kernel takes both."""
    if pool.dtype is not None:
        return pool.dtype
    if ref.model in pool.derived:
        ref = pool.derived.job(ref).refs[0]
    result = None
    for model in pool.endpoints:
        if pool.has(Ref(model, ref.tensor)):
            found = pool.stored_dtype(Ref(model, ref.tensor))
            result = found if result is None else torch.promote_types(result, found)
    return torch.float32 if result == torch.float64 else result


def hash_endpoints(
    pool: Any,
    hash_of: Callable[[Ref], str],
    check: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> dict[str, str]:
    """Content hashes of a pool's endpoints, name by name. check: called with each name, once its tensors have been
    read; progress: then told (bytes read, bytes in all)."""
    hashes: dict[str, dict[str, str]] = {model: {} for model in pool.endpoints}
    total, done = sum(info.nbytes for c in pool.endpoints.values() for info in c.tensors.values()), 0
    for name in sorted({n for c in pool.endpoints.values() for n in c.tensors}):
        for model, checkpoint in pool.endpoints.items():
            if name in checkpoint.tensors:
                hashes[model][name] = hash_of(Ref(model, name))
                if Ref(model, name) in pool.compacted:  # its file is not what is worked with
                    pool.give_back((Ref(model, name),))
                done += checkpoint.tensors[name].nbytes
        check(name)
        progress(done, total)
    return {model: combine_hashes(found) for model, found in hashes.items()}
