"""ZipIt! (2305.03053): two models of one architecture, whatever each was trained from, become one up to a depth.

    found = measure_zip(models, batches, depth)            what units do on the same inputs
    zipped = zip_models(models, found, match)              which are one, and the weights that follow

Layers below the depth are one stack for both. Above it each model goes on with its own layers, which read that stack:
U is folded into the first of them, so both results are ordinary models whose first layers are the same. Where a
residual stream runs across the depth no tensor stands between its two sides, and un-merging has to be a renaming: such
a stream is matched one to one, and the rest of the second model follows its new order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from merge3.errors import BadInput, CheckpointError
from merge3.learn.zip_correlation import Batch, correlations
from merge3.learn.zip_grouping import Grouping
from merge3.learn.zip_heads import match_heads
from merge3.learn.zip_maps import Map, Row, map_of
from merge3.learn.zip_matching import Match, match_as_they_are, match_one_to_one, matched_correlation

States = Mapping[str, torch.Tensor]
# Keys of config.json that say nothing of what a unit is.
_LABELS = ("id2label", "label2id", "num_labels")
_TOLD = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "problem_type",
         "tie_word_embeddings")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Seen:
    """What is known of two models before any matching. limit: rows of this layer and above stay each model's own;
    correlations: space -> float64 [2n, 2n]."""

    map: Map
    depth: int
    limit: int
    correlations: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Zipped:
    """common: tensors that both results have; own: those of each that differ; names as in the live model's state.
    groupings: of each merged space; correlation: space -> mean over matched units (before, after)."""

    common: States
    own: tuple[States, ...]
    groupings: Mapping[str, Grouping] = field(default_factory=dict)
    correlation: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def one(self) -> bool:
        """Whether nothing is left to each model."""
        return not any(self.own)


def measure_zip(
    models: Sequence[torch.nn.Module],
    batches: Sequence[Batch],
    depth: int | float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Seen:
    """Run both models over the same inputs. depth: a share of the layers, or how many of them.

    Raises BadInput for a family without a map, models that differ, or a depth that they do not have.
    """
    check_alike(models)
    found = map_of(models[0])
    layers = depth_of(depth, found.layers)
    whole = layers == found.layers and same_question(models)
    limit = layers + 1 if whole else layers
    return Seen(found, layers, limit, correlations(models, found, batches, limit, progress))


def zip_models(models: Sequence[torch.nn.Module], seen: Seen, match: Match) -> Zipped:
    """Match every space that is merged, and write the weights that follow."""
    groupings, correlation = match_spaces(seen, match)
    common, own = rewritten(seen.map, groupings, [model.state_dict() for model in models], seen.limit)
    return Zipped(common, own, groupings, correlation)


def match_spaces(seen: Seen, match: Match) -> tuple[dict[str, Grouping], dict[str, tuple[float, float]]]:
    """(space -> grouping, space -> correlation before and after) of every space with a tensor below the limit."""
    merged = {space for space, row in seen.map.made() if row.layer < seen.limit}
    beyond = {space for space, row in seen.map.made() if row.layer >= seen.limit}
    places: dict[str, np.ndarray] = {}
    for attention in seen.map.attentions:
        if attention.mixed in seen.correlations and attention.query in merged:
            places |= match_heads(attention, seen.correlations, match)
    for space in sorted(merged - places.keys()):
        goes_on = space in beyond and match is not match_as_they_are
        places[space] = (match_one_to_one if goes_on else match)(seen.correlations[space])
    told = {}
    for space, own in places.items():
        whole = seen.correlations[space]
        told[space] = matched_correlation(whole, match_as_they_are(whole)), matched_correlation(whole, own)
    return {space: Grouping.of(own) for space, own in places.items()}, told


def rewritten(
    found: Map, groupings: Mapping[str, Grouping], states: Sequence[States], limit: int
) -> tuple[dict[str, torch.Tensor], tuple[dict[str, torch.Tensor], ...]]:
    """(tensors in common, each model's own): W* = Σ M W U of rows below the limit; the others read with U, and where
    they make a space that is merged they do so in its order. Sums in float64."""
    common: dict[str, torch.Tensor] = {}
    own: tuple[dict[str, torch.Tensor], ...] = tuple({} for _ in states)
    for name, first in states[0].items():
        row = found.row(name)
        if row.layer >= limit:
            for model, state in enumerate(states):
                own[model][name] = _of(state[name], row, groupings, model, apart=True)
        elif not first.is_floating_point():
            common[name] = first.clone()
        else:
            parts = [_of(state[name].double(), row, groupings, model) for model, state in enumerate(states)]
            total = parts[0] + parts[1]
            if not any(axis.startswith("+") for axis in row.axes):
                total = total / 2  # what makes no space that is matched: the mean of both
            common[name] = total.to(first.dtype)
    return common, own


def _of(
    tensor: torch.Tensor, row: Row, groupings: Mapping[str, Grouping], model: int, apart: bool = False
) -> torch.Tensor:
    """One model's part of a tensor. apart: as it stays with that model."""
    for dim, axis in enumerate(row.axes):
        grouping = groupings.get(axis[1:])
        if grouping is None:
            continue
        grouping = Grouping(grouping.places.to(tensor.device))
        makes = axis.startswith("+") and not apart
        tensor = grouping.merged(tensor, model, dim) if makes else grouping.unmerged(tensor, model, dim)
    return tensor


def built(model: torch.nn.Module, tensors: States) -> torch.nn.Module:
    """A copy of a live model with these tensors. Outputs that were tied to the embeddings are untied where the two
    came out differently: an embedding's columns are means, an output's are sums."""
    owners: dict[tuple[int, torch.Size], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        owner = owners.setdefault((tensor.data_ptr(), tensor.shape), name) if tensor.numel() else name
        if owner != name:
            tied[name] = owner
    made = copy.deepcopy(model)
    if any(not torch.equal(tensors[name], tensors[owner]) for name, owner in tied.items()):
        for name in tied:
            module, _, attribute = name.rpartition(".")
            own = torch.nn.Parameter(tensors[name].clone(), requires_grad=False)
            setattr(made.get_submodule(module), attribute, own)
        made.config.tie_word_embeddings = False
    made.load_state_dict(dict(tensors))
    return made.eval()


def depth_of(depth: int | float, layers: int) -> int:
    """How many layers. depth: a share of them where it is a float, else how many. Raises BadInput."""
    found = round(depth * layers) if isinstance(depth, float) else depth
    if not 0 <= found <= layers:
        raise BadInput("depth", f"{depth} layers", f"at most the models' {layers}")
    return found


def same_question(models: Sequence[torch.nn.Module]) -> bool:
    """Whether heads have the same labels, or are those of language models."""
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in models]
    labels = [model.config.label2id for model in models]
    return shapes[0] == shapes[1] and labels[0] == labels[1]


def check_alike(models: Sequence[torch.nn.Module]) -> None:
    """Raises CheckpointError unless both are of one class and one configuration, but for labels."""
    if len({type(model) for model in models}) > 1:
        first, second = (type(model).__name__ for model in models)
        raise CheckpointError("models", f"a {first} and a {second}", "two models of one architecture")
    first, second = (model.config.to_dict() for model in models)
    for key in sorted({*first, *second} - {*_LABELS, *_TOLD}):
        if first.get(key) != second.get(key):
            found = f"config.json: {key} is {first.get(key)} in the first, {second.get(key)} in the second"
            raise CheckpointError("models", found, "two models of one architecture and size")
    shapes = [{name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} for model in models]
    limit = map_of(models[0])
    for name in sorted({*shapes[0], *shapes[1]}):
        row = limit.row(name)
        head = row is not None and row.layer == limit.layers
        if shapes[0].get(name) != shapes[1].get(name) and not head:
            found = f"tensor {name!r} of shape {shapes[0].get(name)} in the first, {shapes[1].get(name)} in the second"
            raise CheckpointError("models", found, "equal shapes")
