"""The pool: a base and its experts, resident or memory-mapped, aligned tensor by tensor.

On the CPU the memory-mapped files are the pool, so no expert is ever copied; on another device, or
where an endpoint's dtype differs, each tensor is copied there once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from merge3.checkpoint import Checkpoint, open_checkpoint
from merge3.checkpoint.layout import Layout, Ref, layout
from merge3.checkpoint.read import combine_hashes
from merge3.errors import BadInput, CheckpointError, Unavailable
from merge3.recipe import ModelRef
from merge3.statistics import Statistics


@dataclass
class Pool:
    """Endpoints by name (str(ModelRef)), the first being the base.

    kept: tensors that cannot be merged and stay the base's, with the reason.
    heads: expert -> tensors outside the backbone, which stay with their expert.
    """

    endpoints: dict[str, Checkpoint]
    device: torch.device
    dtype: torch.dtype | None = None
    kept: dict[str, str] = field(default_factory=dict)
    heads: dict[str, list[str]] = field(default_factory=dict)
    statistics: Statistics = field(init=False)
    _resident: dict[Ref, torch.Tensor] = field(default_factory=dict, repr=False)
    _hashes: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        self.statistics = Statistics(self.get)

    @staticmethod
    def open(
        base: str | ModelRef,
        experts: Iterable[str | ModelRef],
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
        locate: Callable[[str], str] = str,
    ) -> Pool:
        """Open checkpoints and check that they fit together.

        dtype: convert every endpoint to it (default: as stored, promoted where endpoints differ).
        memory_budget: not available yet; everything is resident or memory-mapped.
        locate: from a path as named to where it lies; endpoints keep the names they were given.
        Raises CheckpointError naming endpoint and tensor where shapes differ inside a layer, or where
        an expert lacks a tensor of the base.
        """
        if memory_budget is not None:
            raise Unavailable("memory_budget", "streaming tiers are not built yet", "None")
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise Unavailable("device", "no CUDA device can be used here", "cpu")
        endpoints = {}
        for model in (base, *experts):
            ref = model if isinstance(model, ModelRef) else ModelRef.parse(model)
            endpoints.setdefault(str(ref), _open(ref, locate))
        pool = Pool(endpoints, device, dtype)
        pool._align()
        return pool

    @property
    def base(self) -> str:
        return next(iter(self.endpoints))

    @property
    def base_checkpoint(self) -> Checkpoint:
        return self.endpoints[self.base]

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        return {name: layout(c.tensors) for name, c in self.endpoints.items()}

    def has(self, ref: Ref) -> bool:
        return ref.tensor in self.endpoints[ref.model].tensors or self._alias(ref) is not None

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return self._info(ref).shape

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
        if ref in self._resident:
            return self._resident[ref]
        tensor = self.endpoints[ref.model].get(self._info(ref).name)
        wanted = self.common_dtype(ref.tensor) if tensor.is_floating_point() else tensor.dtype
        if tensor.dtype != wanted or tensor.device != self.device:
            tensor = tensor.to(self.device, wanted)
        self._resident[ref] = tensor  # on the CPU a view of the mapped file: costs no memory
        return tensor

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
                    hashes[model][name] = checkpoint.tensor_hash(name)
                    done += checkpoint.tensors[name].nbytes
            self._check_finite(name)
            progress(done, total)
        self._hashes = {model: combine_hashes(h) for model, h in hashes.items()}

    def content_hashes(self) -> dict[str, str]:
        """SHA-256 of each endpoint's tensors."""
        for model, checkpoint in self.endpoints.items():
            if model not in self._hashes:
                self._hashes[model] = checkpoint.content_hash()
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
        """A head that is tied to the embedding and therefore not stored."""
        checkpoint = self.endpoints[ref.model]
        if not ref.tensor.endswith("lm_head.weight") or not tied(checkpoint.config):
            return None
        return next((n for n in checkpoint.tensors if re.search(r"(embed_tokens|wte|embed_in)\.weight$", n)), None)

    def _align(self) -> None:
        base = self.base_checkpoint
        stack = layout(base.tensors)
        for model, checkpoint in list(self.endpoints.items())[1:]:
            own = set(self._own_head(checkpoint))
            for name, info in base.tensors.items():
                if name in own:
                    continue
                if not self.has(Ref(model, name)):
                    if name in set(self._own_head(base)):
                        continue
                    raise CheckpointError(model, f"no tensor {name!r}", f"every tensor of the base {self.base}")
                found = self._info(Ref(model, name)).shape
                if found == info.shape:
                    continue
                if stack.layer_of(name) is not None:
                    raise CheckpointError(
                        model, f"tensor {name!r} of shape {list(found)}", f"{list(info.shape)} as in the base {self.base}"
                    )
                self.kept.setdefault(name, f"shape {list(found)} in {model}, {list(info.shape)} in the base")
            if own:
                self.heads[model] = sorted(own)
        for name, info in base.tensors.items():
            if not info.dtype.is_floating_point:
                self.kept.setdefault(name, f"{info.dtype} buffer")
        own = set(self._own_head(base))
        if own:
            self.heads[self.base] = sorted(own)

    @staticmethod
    def _own_head(checkpoint: Checkpoint) -> list[str]:
        """Tensors outside the backbone of a model whose head answers a question of its own."""
        architecture = (checkpoint.config.get("architectures") or [""])[0]
        if "Classification" not in architecture:
            return []
        prefix = layout(checkpoint.tensors).prefix.split(".")[0]
        return [n for n in checkpoint.tensors if not n.startswith(prefix + ".")]


def check_finite(gram, base: Ref, experts: list[Ref]) -> None:
    """Name the first endpoint whose tensor is not finite. gram: [K+1, K+1] of [θ, τ_1, ..]."""
    for i, ref in enumerate((base, *experts)):
        if not (abs(gram[i][i]) < float("inf")):
            raise CheckpointError(ref.model, f"NaN or infinity in tensor {ref.tensor!r}", "finite weights")


def tied(config: Mapping) -> bool:
    """Whether a transformers config ties the head to the embedding."""
    text = config.get("text_config")
    return bool(config.get("tie_word_embeddings", (text or {}).get("tie_word_embeddings", False)))


def _open(ref: ModelRef, locate: Callable[[str], str]) -> Checkpoint:
    if ref.lora is None:
        return open_checkpoint(locate(ref.path), ref.revision)
    from merge3.checkpoint.adapter import open_with_adapter

    return open_with_adapter(Path(locate(ref.path)), Path(locate(ref.lora.path)), ref.revision, ref.lora.revision)
