"""The pool: a base and its experts, aligned tensor by tensor, resident or streamed within a memory budget.

On the CPU the memory-mapped files are the pool, so no expert is ever copied; on another device, or
where an endpoint's dtype differs, each tensor is copied there once, or whenever it is used if the
budget has no room for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from merge3.alignment import align, check_finite
from merge3.checkpoint import Checkpoint, open_checkpoint
from merge3.checkpoint.architecture import tied
from merge3.checkpoint.layout import Layout, Ref, layout
from merge3.checkpoint.naming import renamed, tie_source, tie_targets
from merge3.checkpoint.read import combine_hashes
from merge3.errors import BadInput, CheckpointError, Unavailable
from merge3.lineage import differences
from merge3.memory import DEVICE, FILE, HOST, MemoryPlan, parse_size, pinnable, plan_memory
from merge3.recipe import ModelRef
from merge3.statistics import Statistics

T = TypeVar("T")


@dataclass
class Pool:
    """Endpoints by name (str(ModelRef)), the first being the base, whose tensor names all of them go by.

    kept: tensors that cannot be merged and stay the base's, with the reason; fixed: those that no recipe merges.
    heads: endpoint -> tensors outside the backbone, which stay with their endpoint.
    left_out: tensors of other endpoints that no merge can take, with the reason.
    warnings: what makes endpoints seem not to belong together, one line each.
    memory: which tensors are resident.
    """

    endpoints: dict[str, Checkpoint]
    device: torch.device
    dtype: torch.dtype | None = None
    kept: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    heads: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[Ref, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    statistics: Statistics = field(init=False)
    memory: MemoryPlan = field(init=False)
    _resident: dict[Ref, torch.Tensor] = field(default_factory=dict, repr=False)
    _pinned: dict[Ref, torch.Tensor] = field(default_factory=dict, repr=False)
    _mapped: dict[Ref, int] = field(default_factory=dict, repr=False)  # streamed from a file, in memory now: bytes
    _hashes: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        self.statistics = Statistics(self.get, self.in_groups)
        self.memory = MemoryPlan(str(self.device), None, 0, 0)

    @staticmethod
    def open(
        base: str | ModelRef,
        experts: Iterable[str | ModelRef],
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        memory_budget: int | str | None = None,
        locate: Callable[[str], str] = str,
        drop: Iterable[str] = (),
    ) -> Pool:
        """Open checkpoints and check that they fit together.

        dtype: convert every endpoint to it (default: as stored, promoted where endpoints differ).
        memory_budget: bytes, or a size such as "20GiB", that the live model and the weights may take on the
        device (on the CPU: of resident memory); what does not fit is streamed. Default: everything is resident.
        locate: from a path as named to where it lies; endpoints keep the names they were given.
        drop: patterns of tensors that experts have and the base lacks, and that may be lost.
        Raises CheckpointError naming endpoint and tensor where shapes differ inside a layer, or where
        an expert lacks a tensor of the base or has one more.
        """
        budget = None if memory_budget is None else parse_size(memory_budget)
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise Unavailable("device", "no CUDA device can be used here", "cpu")
        if device.type == "cuda" and device.index is None:  # as tensors name theirs
            device = torch.device("cuda", torch.cuda.current_device())
        endpoints = {}
        for model in (base, *experts):
            ref = model if isinstance(model, ModelRef) else ModelRef.parse(model)
            endpoints.setdefault(str(ref), _open(ref, locate))
        pool = Pool(_same_names(endpoints), device, dtype)
        found = align(pool.endpoints, pool.has, pool.shape, drop)
        pool.fixed, pool.kept, pool.heads, pool.left_out = found.fixed, found.kept, found.heads, found.left_out
        for name in list(pool.endpoints)[1:]:
            pool.warnings += differences(pool.base, pool.base_checkpoint, name, pool.endpoints[name])
        pool._plan(budget)
        return pool

    @property
    def base(self) -> str:
        return next(iter(self.endpoints))

    @property
    def base_checkpoint(self) -> Checkpoint:
        return self.endpoints[self.base]

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """Of what can be merged: tensors that are left out have no place."""
        return {
            name: layout(n for n in c.tensors if Ref(name, n) not in self.left_out) for name, c in self.endpoints.items()
        }

    @cached_property
    def ties(self) -> dict[str, dict[str, str]]:
        """endpoint -> output -> the tensor it shares, for outputs tied by the endpoint's configuration.

        As transformers does, an output that the file stores too, with other values, is not tied.
        """
        return {name: _ties(checkpoint) for name, checkpoint in self.endpoints.items()}

    def has(self, ref: Ref) -> bool:
        return ref.tensor in self.endpoints[ref.model].tensors or self._alias(ref) is not None

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return self._info(ref).shape

    def shared_with(self, ref: Ref) -> str | None:
        """The tensor that an output shares because its model ties it; None for a tensor of its own, or none."""
        stored = ref.tensor in self.endpoints[ref.model].tensors
        return self.ties[ref.model].get(ref.tensor) if stored else self._alias(ref)

    @cached_property
    def outputs(self) -> list[str]:
        """Outputs that a configuration could tie and that some endpoint has as tensors of their own: what a live model
        must hold apart to be any merge of these endpoints."""
        stored = {n for model, c in self.endpoints.items() for n in c.tensors if Ref(model, n) not in self.left_out}
        own = lambda ref: self.has(ref) and self.shared_with(ref) is None
        return sorted(n for n in tie_targets(stored) if any(own(Ref(model, n)) for model in self.endpoints))

    def stored_dtype(self, ref: Ref) -> torch.dtype:
        """The dtype in the file; `get` may give the common dtype of all endpoints instead."""
        return self._info(ref).dtype

    def common_dtype(self, tensor: str) -> torch.dtype:
        """What a tensor is computed from: the pool's dtype, or the promotion over the endpoints."""
        if self.dtype is not None:
            return self.dtype
        result = None
        for model in self.endpoints:
            if self.has(Ref(model, tensor)):
                found = self._info(Ref(model, tensor)).dtype
                result = found if result is None else torch.promote_types(result, found)
        return torch.float32 if result == torch.float64 else result

    def get(self, ref: Ref) -> torch.Tensor:
        """A tensor on the pool's device, in the common dtype of its name (integers as they are)."""
        return self.staged(ref).to(self.device)

    def staged(self, ref: Ref) -> torch.Tensor:
        """The same where it lies: a streamed tensor in host memory, pinned or a view of the mapped file."""
        if ref in self._resident:
            return self._resident[ref]
        if ref in self._pinned:
            return self._pinned[ref]
        tensor = self._stored(ref)
        tensor = tensor.to(self._dtype_of(ref, tensor))
        tier = self.memory.tier(ref)
        if tier == DEVICE:
            self._resident[ref] = tensor = tensor.to(self.device)  # on the CPU a view of the mapped file: costs no memory
        elif tier == HOST:
            self._pinned[ref] = tensor = tensor.pin_memory()
        else:
            self._use(ref)
        return tensor

    def part(self, ref: Ref, begin: int, end: int) -> torch.Tensor:
        """Elements [begin, end) of a tensor, flat, where it lies."""
        if self.memory.tier(ref) != FILE:
            return self.staged(ref).reshape(-1)[begin:end]
        self._use(ref)
        tensor = self._stored(ref).reshape(-1)[begin:end]  # converted in parts, where it has to be
        return tensor.to(self._dtype_of(ref, tensor))

    def resident(self, refs: Iterable[Ref]) -> bool:
        """Whether these tensors stay where a kernel finds them."""
        return all(self.memory.tier(ref) == DEVICE for ref in refs)

    def in_groups(self, requests: Iterable[T], refs_of: Callable[[T], Iterable[Ref]]) -> Iterator[list[T]]:
        """Requests in groups whose streamed tensors fit the window together."""
        group, size = [], 0
        for request in requests:
            more = self.memory.streamed(refs_of(request))
            if group and more and size + more > self.memory.window:
                yield group
                group, size = [], 0
            group.append(request)
            size += more
        if group:
            yield group

    def give_back(self, refs: Iterable[Ref]) -> None:
        """Take a mapped file's pages out of memory. Harmless while they are in use: they are read again."""
        for ref in refs:
            if self._mapped.pop(ref, None) is not None:
                self.endpoints[ref.model].release(self._info(ref).name)

    def _stored(self, ref: Ref) -> torch.Tensor:
        return self.endpoints[ref.model].get(self._info(ref).name)

    def _dtype_of(self, ref: Ref, tensor: torch.Tensor) -> torch.dtype:
        return self.common_dtype(ref.tensor) if tensor.is_floating_point() else tensor.dtype

    def _use(self, ref: Ref) -> None:
        """Count a streamed tensor's pages as in memory; those used longest ago leave for it."""
        size = self.memory.streamed((ref,))
        self.give_back((ref,))
        while self._mapped and sum(self._mapped.values()) + size > self.memory.window:
            self.give_back((next(iter(self._mapped)),))
        self._mapped[ref] = size

    def release(self, refs: Iterable[Ref]) -> None:
        """Drop tensors and their statistics: a merge to disk streams through the pool."""
        for ref in refs:
            self._resident.pop(ref, None)
            if self.has(ref):
                self.endpoints[ref.model].release(self._info(ref).name)
            self.statistics.forget(ref)

    def read_all(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read every byte once: content hashes, Gram matrices, and the check for NaN and infinity.

        Raises CheckpointError naming tensor and endpoint of the first task vector that is not finite.
        progress(bytes read, bytes in all) is called after each tensor.
        """
        total = sum(info.nbytes for c in self.endpoints.values() for info in c.tensors.values())
        hashes: dict[str, dict[str, str]] = {model: {} for model in self.endpoints}
        done = 0
        for name in sorted({n for c in self.endpoints.values() for n in c.tensors}):
            for model, checkpoint in self.endpoints.items():
                if name in checkpoint.tensors:
                    self._read(Ref(model, name))
                    hashes[model][name] = checkpoint.tensor_hash(name)
                    done += checkpoint.tensors[name].nbytes
            self._check_finite(name)
            progress(done, total)
        self._hashes = {model: combine_hashes(h) for model, h in hashes.items()}

    def content_hashes(self) -> dict[str, str]:
        """SHA-256 of each endpoint's tensors."""
        for model, checkpoint in self.endpoints.items():
            if model not in self._hashes:
                hashes = {}
                for name in checkpoint.tensors:
                    self._read(Ref(model, name))
                    hashes[name] = checkpoint.tensor_hash(name)
                self._hashes[model] = combine_hashes(hashes)
        return dict(self._hashes)

    def _check_finite(self, name: str) -> None:
        base = Ref(self.base, name)
        if not self.has(base) or not self.get(base).is_floating_point() or name in self.kept:
            return
        experts = [Ref(m, name) for m in list(self.endpoints)[1:] if self.has(Ref(m, name))]
        experts = [e for e in experts if name not in self.heads.get(e.model, ())][:8]
        if not experts:
            return
        self.statistics.prefetch_gram([(base, tuple(experts))])
        check_finite(self.statistics.gram(base, tuple(experts)), base, experts)

    def _info(self, ref: Ref):
        checkpoint = self.endpoints.get(ref.model)
        if checkpoint is None:
            raise BadInput(ref.model, "not in the pool", ", ".join(self.endpoints))
        info = checkpoint.tensors.get(ref.tensor) or checkpoint.tensors.get(self._alias(ref) or "")
        if info is None:
            raise CheckpointError(ref.model, f"no tensor {ref.tensor!r}", "every tensor of the base")
        return info

    def _alias(self, ref: Ref) -> str | None:
        """The stored tensor that stands for one that is tied and therefore not stored."""
        stored, ties = self.endpoints[ref.model].tensors, self.ties[ref.model]
        if ref.tensor in ties:
            return ties[ref.tensor]
        # An output of another endpoint, under a name that this one ties without storing it.
        if tied(self.endpoints[ref.model].config):
            return tie_source(ref.tensor, stored)
        return None

    def _read(self, ref: Ref) -> None:
        if not self.resident((ref,)):
            self._use(ref)

    def _plan(self, budget: int | None) -> None:
        # The live model is not built yet: its dtype is the pool's, unless somebody asks for another.
        sizes = {
            name: {
                Ref(model, name): math.prod(c.tensors[name].shape) * self.common_dtype(name).itemsize
                for model, c in self.endpoints.items() if name in c.tensors
            }
            for name in dict.fromkeys(n for c in self.endpoints.values() for n in c.tensors)
        }  # fmt: skip
        slot = sum(sizes[name][Ref(self.base, name)] for name in self.base_checkpoint.tensors)
        host = pinnable() if self.device.type == "cuda" and budget is not None else 0
        self.memory = plan_memory(sizes.values(), slot, str(self.device), budget, host)


def _same_names(endpoints: dict[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Endpoints under the base's tensor names. Raises CheckpointError where two tensors of one would go by one name."""
    result: dict[str, Checkpoint] = {}
    for model, checkpoint in endpoints.items():
        names = renamed(checkpoint.tensors, next(iter(result.values())).tensors if result else None)
        for name, other in names.items():
            if name != other and other in checkpoint.tensors:
                raise CheckpointError(model, f"both {name!r} and {other!r}", "one of them: they name the same tensor")
        result[model] = checkpoint.renamed(names)
    return result


def _ties(checkpoint: Checkpoint) -> dict[str, str]:
    if not tied(checkpoint.config):
        return {}
    ties = {}
    for name in tie_targets(checkpoint.tensors):
        source = tie_source(name, (n for n in checkpoint.tensors if n != name))
        if source is not None and torch.equal(checkpoint.get(name), checkpoint.get(source)):
            ties[name] = source
    return ties


def _open(ref: ModelRef, locate: Callable[[str], str]) -> Checkpoint:
    if ref.lora is None:
        return open_checkpoint(locate(ref.path), ref.revision)
    from merge3.checkpoint.adapter import open_with_adapter

    return open_with_adapter(Path(locate(ref.path)), Path(locate(ref.lora.path)), ref.revision, ref.lora.revision)
