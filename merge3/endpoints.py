"""A pool's checkpoints under one set of names, the base's, whatever each file calls its tensors; and tied outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from merge3.checkpoint import Checkpoint, open_checkpoint
from merge3.checkpoint.architecture import tied
from merge3.checkpoint.layout import Ref
from merge3.checkpoint.naming import renamed, tie_source, tie_targets
from merge3.checkpoint.towers import Tower, find_tower
from merge3.errors import CheckpointError
from merge3.recipe import ModelRef


def open_endpoints(
    models: Iterable[str | ModelRef], locate: Callable[[str], str] = str, tower: Mapping[str, str] | None = None
) -> tuple[dict[str, Checkpoint], dict[str, Tower]]:
    """(every model once, base first, by the name it was given, adapters applied; the place in the base of those that
    are merged into its language tower). locate: from a path as named to where it lies. tower: prefixes of a language
    model's names -> of the base's, where they are not to be found.

    Raises CheckpointError where two tensors of one model would go by one name, or a language model fits nowhere.
    """
    opened: dict[str, Checkpoint] = {}
    for model in models:
        ref = model if isinstance(model, ModelRef) else ModelRef.parse(model)
        if str(ref) not in opened:
            opened[str(ref)] = _open(ref, locate)
    endpoints: dict[str, Checkpoint] = {}
    towers: dict[str, Tower] = {}
    base = next(iter(opened))
    for model, checkpoint in opened.items():
        place = None
        if model != base:
            place = find_tower(model, _shapes(checkpoint), base, _shapes(endpoints[base]), tower or {})
        if place is not None:
            towers[model] = place
            names = {name: place.name(name) for name in checkpoint.tensors}
        else:
            names = renamed(checkpoint.tensors, endpoints[base].tensors if endpoints else None)
        for name, other in names.items():
            if name != other and other in checkpoint.tensors:
                raise CheckpointError(model, f"both {name!r} and {other!r}", "one of them: they name the same tensor")
        endpoints[model] = checkpoint.renamed(names)
    if tower and not towers:
        raise CheckpointError("tower", "none of the models beside the base is a language model", "one, or no `tower`")
    return endpoints, towers


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in checkpoint.tensors.items()}


class Ties:
    """Outputs that share another tensor because their model's configuration says so.

    As transformers does, an output that the file stores too, with other values, is not tied.
    """

    def __init__(self, endpoints: dict[str, Checkpoint]):
        self.endpoints = endpoints
        self._twice = {model: _stored_twice(checkpoint) for model, checkpoint in endpoints.items()}

    def stored(self, ref: Ref) -> str | None:
        """The name under which a tensor is stored: its own, or that of the one it shares; None where there is none."""
        checkpoint = self.endpoints[ref.model]
        if ref.tensor in checkpoint.tensors:
            return ref.tensor
        # An output of another endpoint, under a name that this one ties without storing it.
        return tie_source(ref.tensor, checkpoint.tensors) if tied(checkpoint.config) else None

    def shared_with(self, ref: Ref) -> str | None:
        """The tensor that an output shares; None for a tensor of its own, or none."""
        if ref.tensor in self.endpoints[ref.model].tensors:
            return self._twice[ref.model].get(ref.tensor)
        return self.stored(ref)

    def outputs(self, names: Iterable[str]) -> list[str]:
        """Those of the names that a configuration could tie and that some endpoint has as tensors of their own."""
        found = []
        for name in sorted(tie_targets(names)):
            refs = [Ref(model, name) for model in self.endpoints]
            if any(self.stored(ref) is not None and self.shared_with(ref) is None for ref in refs):
                found.append(name)
        return found


def _stored_twice(checkpoint: Checkpoint) -> dict[str, str]:
    """Outputs that are tied and stored all the same -> the tensor they share."""
    if not tied(checkpoint.config):
        return {}
    twice = {}
    for name in tie_targets(checkpoint.tensors):
        source = tie_source(name, (n for n in checkpoint.tensors if n != name))
        if source is not None and torch.equal(checkpoint.get(name), checkpoint.get(source)):
            twice[name] = source
    return twice


def _open(ref: ModelRef, locate: Callable[[str], str]) -> Checkpoint:
    if ref.lora is None:
        return open_checkpoint(locate(ref.path), ref.revision)
    from merge3.checkpoint.adapter import open_with_adapter

    return open_with_adapter(Path(locate(ref.path)), Path(locate(ref.lora.path)), ref.revision, ref.lora.revision)
