"""Where a pool's weights lie within a budget of bytes: what stays on the device and what is streamed to it.

Tiers. `device`: resident, read by every swap where it lies. `host`: pinned memory, copied through a
window on the device. `file`: the memory-mapped checkpoint, through the same window; on the CPU its pages are
given back after use. `compact`: an expert held as what it differs from the base by (experts.py), which is always
resident; what it expands to passes through the window too. Of the first three the tier never changes a result.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from merge3.cgroups import memory_left
from merge3.errors import BadInput, ResourceError, Unavailable
from merge3.kernels import CHUNK, MAX_EXPERTS

DEVICE, HOST, FILE, COMPACT = "device", "host", "file", "compact"
WINDOW = 512 << 20  # bytes; larger ones stream no faster
PADDING = 256  # bytes, between what lies in a window
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part. slot: the live model; resident, host, file: weights per tier; window: the part of the
    device that streamed and compacted weights pass through. compact: experts as they are held. A model's activations
    come on top."""

    device: str
    budget: int | None
    slot: int
    resident: int
    host: int = 0
    file: int = 0
    window: int = 0
    away: Mapping[Hashable, tuple[str, int]] = field(default_factory=dict, repr=False)  # not as they are: tier, bytes
    compact: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.slot + self.resident + self.compact + self.window

    def tier(self, key: Hashable) -> str:
        """Where a tensor lies: DEVICE, HOST, FILE or COMPACT."""
        return self.away[key][0] if key in self.away else DEVICE

    def streamed(self, keys: Iterable[Hashable]) -> int:
        """Bytes that pass through the window when these tensors are used together."""
        return sum(self.away[key][1] for key in keys if key in self.away)

    def describe(self) -> str:
        """One line: what lies where."""
        here = f"live model {shown_size(self.slot)}, resident weights {shown_size(self.resident)}"
        parts = [f"{shown_size(self.total)} on {self.device}: {here}"]
        parts[0] += f", compacted experts {shown_size(self.compact)}" if self.compact else ""
        if self.away:
            parts[0] += f", window {shown_size(self.window)}"
        parts += [f"streamed from pinned memory {shown_size(self.host)}"] if self.host else []
        parts += [f"streamed from the files {shown_size(self.file)}"] if self.file else []
        parts += [f"budget {shown_size(self.budget)}" if self.budget is not None else "no budget"]
        return "memory: " + "; ".join(parts)


def plan_memory(
    groups: Iterable[Mapping[Hashable, int]],
    slot: int,
    device: str,
    budget: int | None = None,
    host: int = 0,
    compact: Mapping[Hashable, int] | None = None,
    streamed: bool = False,
    joined: int = 0,
) -> MemoryPlan:
    """Fill the budget with resident weights, in order; stream the others.

    groups: per output tensor, what it is computed from and each one's bytes (they are used together, so
    they stay or leave together). slot: bytes of the live model. host: bytes of pinned memory to use at most.
    compact: of those that are held compacted, the bytes that this takes; they stay. streamed: all others leave.
    joined: bytes of merges that lie there whatever the plan.
    Raises BadInput where not even the live model, what stays and one group at a time fit.
    """
    groups, compact = [dict(group) for group in groups], compact or {}
    whole, held = [sum(group.values()) for group in groups], sum(compact.values())
    away: dict[Hashable, tuple[str, int]] = {}
    for group in groups:
        away |= {key: (COMPACT, group.pop(key)) for key in list(group) if key in compact}
    sizes = [sum(group.values()) for group in groups]
    # Statistics read whole tensors; a swap, which reads slices, makes two buffers of the same bytes.
    window = max([2 * (4 * CHUNK + PADDING) * (MAX_EXPERTS + 1), *whole])
    least = window if away else 0
    if not streamed and (budget is None or slot + held + joined + sum(sizes) + least <= budget):
        return MemoryPlan(device, budget, slot, joined + sum(sizes), window=least, away=away, compact=held)
    window = max(window, min(WINDOW, (budget or 0) // 8))
    free = 0 if streamed else budget - slot - held - joined - window
    if free < 0:
        beside = f", compacted experts {shown_size(held)}" if held else ""
        beside += f", merges that join the models {shown_size(joined)}" if joined else ""
        raise BadInput(
            "memory_budget",
            f"found {shown_size(budget)}",
            f"at least {shown_size(slot + held + joined + window)}: the live model takes {shown_size(slot)}{beside}, "
            f"the largest tensor of all models {shown_size(window)}",
        )
    used = {DEVICE: 0, HOST: 0, FILE: 0}
    for group, size in zip(groups, sizes):
        tier = DEVICE if size <= free - used[DEVICE] else HOST if size <= host - used[HOST] else FILE
        used[tier] += size
        if tier != DEVICE:
            away.update({key: (tier, nbytes) for key, nbytes in group.items()})
    return MemoryPlan(device, budget, slot, joined + used[DEVICE], used[HOST], used[FILE], window, away, held)


def parse_size(text: int | str) -> int:
    """Bytes from a number or a text like 20GiB, 20 GB, 500MiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise BadInput("memory_budget", f"found {text!r}", "bytes, or a size such as 20GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def usable(device: str | torch.device) -> torch.device:
    """The device as tensors name theirs. Raises Unavailable for a GPU where there is none."""
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Unavailable("device", "no CUDA device can be used here", "cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def pinnable() -> int:
    """Bytes of host memory that a pool may pin: half of what is free, since pages once pinned cannot be swapped out."""
    return available(torch.device("cpu")) // 2


def available(device: torch.device) -> int:
    """Bytes that are free on a device, those that torch holds and does not use too; on the CPU in memory, as far as
    the process's control groups let it."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min([_free_memory(), *memory_left()])


def _free_memory() -> int:
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: free pages, without those that caches would give back
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def shown_size(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


@contextmanager
def enough_memory(device: torch.device):
    """Out of memory as a ResourceError with numbers; the pool and the next candidate are none the worse."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        wanted = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", str(error))
        if not isinstance(error, torch.OutOfMemoryError) and wanted is None:
            raise
        free = ""
        if device.type == "cuda":
            torch.cuda.empty_cache()
            unused, total = torch.cuda.mem_get_info(device)
            free = f", {unused / 2**30:.2f} GiB free of {total / 2**30:.2f}"
        raise ResourceError(
            str(device),
            f"out of memory: {wanted[1] if wanted else 'more'} needed{free}",
            "a smaller --memory-budget, fewer experts, or shorter items",
        ) from None
