"""Where a pool's tensors lie now, as its memory plan has it: on the device, in pinned host memory, or in a mapped
file whose pages are in memory only as far as a window has room for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch

from merge3.checkpoint.layout import Ref
from merge3.experts import Compacted
from merge3.memory import COMPACT, DEVICE, FILE, HOST, MemoryPlan

T = TypeVar("T")


class Source(Protocol):
    """Where tensors come from; see Pool."""

    device: torch.device
    compacted: Compacted

    def stored(self, ref: Ref) -> torch.Tensor:
        """See Pool."""

    def common_dtype(self, ref: Ref) -> torch.dtype:
        """See Pool."""

    def unmap(self, ref: Ref) -> None:
        """See Pool."""


class Residence:
    """The tensors of one source. plan: what lies where; see `follow`."""

    def __init__(self, source: Source):
        self.source = source
        self.plan = MemoryPlan(str(source.device), None, 0, 0)
        self._resident: dict[Ref, torch.Tensor] = {}
        self._pinned: dict[Ref, torch.Tensor] = {}
        self._mapped: dict[Ref, int] = {}  # streamed from a file, in memory now: bytes

    def follow(self, plan: MemoryPlan) -> None:
        """Keep to a new plan: what is to lie elsewhere leaves."""
        self.plan = plan
        for ref in [ref for ref in self._resident if plan.tier(ref) != DEVICE]:
            self.forget(ref)
        for ref in [ref for ref in self._pinned if plan.tier(ref) != HOST]:
            del self._pinned[ref]
        for ref in [ref for ref in self._mapped if plan.tier(ref) in (DEVICE, HOST)]:
            del self._mapped[ref]

    def staged(self, ref: Ref) -> torch.Tensor:
        """A tensor where it lies, in the common dtype of its name (integers as they are)."""
        if ref.rows is not None:
            return self.staged(ref.whole)[slice(*ref.rows)]
        if ref in self._resident:
            return self._resident[ref]
        if ref in self._pinned:
            return self._pinned[ref]
        if self.plan.tier(ref) == COMPACT:  # made anew whenever it is used
            return self.source.stored(ref)
        tensor = self._converted(ref, self.source.stored(ref))
        tier = self.plan.tier(ref)
        if tier == DEVICE:
            tensor = tensor.to(self.source.device)  # on the CPU a view of the mapped file: costs no memory
            self._resident[ref] = tensor
        elif tier == HOST:
            self._pinned[ref] = tensor = tensor.pin_memory()
        else:
            self.use(ref)
        return tensor

    def part(self, ref: Ref, begin: int, end: int) -> torch.Tensor:
        """Elements [begin, end) of a tensor, flat, where it lies."""
        if self.plan.tier(ref.whole) == COMPACT:
            return self.source.compacted.part(ref, begin, end)
        if self.plan.tier(ref.whole) != FILE:
            return self.staged(ref).reshape(-1)[begin:end]
        self.use(ref.whole)
        return self._converted(ref, self.source.stored(ref).reshape(-1)[begin:end])  # in parts, where it has to be

    def resident(self, refs: Iterable[Ref]) -> bool:
        """Whether these tensors stay where a kernel finds them."""
        return all(self.plan.tier(ref.whole) == DEVICE for ref in refs)

    def in_groups(self, requests: Iterable[T], refs_of: Callable[[T], Iterable[Ref]]) -> Iterator[list[T]]:
        """Requests in groups whose streamed tensors fit the window together."""
        group, size = [], 0
        for request in requests:
            more = self.plan.streamed(ref.whole for ref in refs_of(request) if ref is not None)
            if group and more and size + more > self.plan.window:
                yield group
                group, size = [], 0
            group.append(request)
            size += more
        if group:
            yield group

    def use(self, ref: Ref) -> None:
        """Count a streamed tensor's pages as in memory; those used longest ago leave for it."""
        size = self.plan.streamed((ref,))
        self.give_back((ref,))
        while self._mapped and sum(self._mapped.values()) + size > self.plan.window:
            self.give_back((next(iter(self._mapped)),))
        self._mapped[ref] = size

    def give_back(self, refs: Iterable[Ref]) -> None:
        """Take a mapped file's pages out of memory. Harmless while they are in use: they are read again."""
        for ref in (ref.whole for ref in refs):
            if self._mapped.pop(ref, None) is not None:
                self.source.unmap(ref)

    def forget(self, ref: Ref) -> None:
        """Drop a tensor that is on the device, and its pages."""
        self._resident.pop(ref.whole, None)
        self.source.unmap(ref)

    def _converted(self, ref: Ref, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.source.common_dtype(ref)) if tensor.is_floating_point() else tensor
