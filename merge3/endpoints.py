"""A pool's checkpoints under one set of names, the base's, whatever each file calls its tensors; and tied outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from merge3.checkpoint import Checkpoint, open_checkpoint
from merge3.checkpoint.architecture import tied, ties
from merge3.checkpoint.layout import Ref
from merge3.checkpoint.naming import has_copies, renamed, tie_source, tie_targets
from merge3.checkpoint.towers import Tower, find_tower
from merge3.errors import CheckpointError
from merge3.recipe import ModelRef


def open_endpoints(
    models: Iterable[str | ModelRef], locate: Callable[[str], str] = str, tower: Mapping[str, str] | None = None
) -> tuple[dict[str, Checkpoint], dict[str, Tower]]:
    """(every model once, base first, by the name it was given, adapters applied; the place in the base of those that
    are merged into its language tower). locate: from a path as named to where it lies. tower: prefixes of a language
    model's names -> of the base's, where they are not to be found.

    Raises CheckpointError where two tensors of one model would go by one name, a language model fits nowhere, or one
    model is there under two names.
    """
    opened: dict[str, Checkpoint] = {}
    places: dict[tuple, str] = {}
    for model in models:
        ref = model if isinstance(model, ModelRef) else ModelRef.parse(model)
        if str(ref) in opened:
            continue
        lora = ref.lora and replace(ref.lora, path=locate(ref.lora.path))
        place = replace(ref, path=locate(ref.path), lora=lora).place
        if place in places:  # it would be merged with itself, and a base be an expert
            raise CheckpointError(str(ref), f"the model that is also written {places[place]}", "one way to write it")
        places[place] = str(ref)
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


Groups = Sequence[tuple[list[str], list[str]]]


class Ties:
    """Tensors that share another one because their model's configuration says so: outputs, and what else its class
    ties, such as the embeddings of an encoder and a decoder.

    As transformers does, one that the file stores too, with other values, is not tied.
    """

    def __init__(self, endpoints: dict[str, Checkpoint]):
        self.endpoints = endpoints
        copied = {model: checkpoint for model, checkpoint in endpoints.items() if has_copies(_shapes(checkpoint))}
        self._asked = {model: _groups(checkpoint) for model, checkpoint in copied.items()}
        self._copies = {name for groups in self._asked.values() for there, _ in groups for name in there[1:]}
        self._twice = {model: _stored_twice(c, self._asked.get(model, ())) for model, c in endpoints.items()}

    def stored(self, ref: Ref) -> str | None:
        """The name under which a tensor is stored: its own, or that of the one it shares; None where there is none."""
        checkpoint = self.endpoints[ref.model]
        if ref.tensor in checkpoint.tensors:
            return ref.tensor
        # A tensor of another endpoint, under a name that this one ties without storing it.
        source = tie_source(ref.tensor, checkpoint.tensors) if tied(checkpoint.config) else None
        if source is None and ref.tensor in self._copies:
            if ref.model not in self._asked:
                self._asked[ref.model] = _groups(checkpoint)
            groups = self._asked[ref.model]
            source = next((there[0] for there, names in groups if _named(ref.tensor, names)), None)
        return self._twice[ref.model].get(source, source)

    def shared_with(self, ref: Ref) -> str | None:
        """The tensor that another one shares; None for a tensor of its own, or none."""
        if ref.tensor in self.endpoints[ref.model].tensors:
            return self._twice[ref.model].get(ref.tensor)
        return self.stored(ref)

    def outputs(self, names: Iterable[str]) -> list[str]:
        """Those of the names that a configuration could tie and that some endpoint has as tensors of their own."""
        found = []
        for name in sorted({*tie_targets(names := set(names)), *(names & self._copies)}):
            refs = [Ref(model, name) for model in self.endpoints]
            if any(self.stored(ref) is not None and self.shared_with(ref) is None for ref in refs):
                found.append(name)
        return found


def _groups(checkpoint: Checkpoint) -> Groups:
    """(tensors of a checkpoint that its architecture ties, in the architecture's order; all names that such a tensor
    has in the model), of those that it stores at all. Asks transformers."""
    found = []
    for names in ties(checkpoint.config):
        there = dict.fromkeys(stored for name in names for stored in checkpoint.tensors if _named(stored, (name,)))
        if there:
            found.append((list(there), names))
    return found


def _named(name: str, names: Iterable[str]) -> bool:
    """Whether a checkpoint's name is one of these of a model, with the backbone's prefix or without."""
    bare = lambda text: text.partition(".")[2]
    return any(other in (name, bare(name)) or bare(other) == name for other in names)


def _stored_twice(checkpoint: Checkpoint, groups: Groups) -> dict[str, str]:
    """Tensors that are tied and stored all the same -> the tensor they share. groups: see _groups."""
    twice: dict[str, str] = {}
    for (source, *others), _ in groups:
        twice |= {name: source for name in others if torch.equal(checkpoint.get(name), checkpoint.get(source))}
    if not tied(checkpoint.config):
        return twice
    for name in tie_targets(checkpoint.tensors):
        source = tie_source(name, (n for n in checkpoint.tensors if n != name))
        if name not in twice and source is not None and torch.equal(checkpoint.get(name), checkpoint.get(source)):
            twice[name] = twice.get(source, source)
    return twice


def _open(ref: ModelRef, locate: Callable[[str], str]) -> Checkpoint:
    if ref.lora is None:
        return open_checkpoint(locate(ref.path), ref.revision)
    from merge3.checkpoint.adapter import open_with_adapter

    return open_with_adapter(Path(locate(ref.path)), Path(locate(ref.lora.path)), ref.revision, ref.lora.revision)
