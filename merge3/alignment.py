"""Whether endpoints fit together, tensor by tensor: what is merged, kept, left out, refused, and why."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from merge3.checkpoint import Checkpoint
from merge3.checkpoint.architecture import loading
from merge3.checkpoint.layout import Ref, layout, stack_of
from merge3.checkpoint.naming import is_buffer
from merge3.checkpoint.towers import Tower
from merge3.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass
class Alignment:
    """What becomes of every tensor of these endpoints.

    fixed: tensors that no recipe merges, with the reason: buffers, heads that answer other questions.
    kept: those, and tensors that stay the base's where these endpoints are merged.
    heads: endpoint -> tensors outside its backbone, which stay with their endpoint.
    left_out: other endpoints' tensors that no merge can take, with the reason.
    notes: rows that are not merged because only one of two models has them, one line for each tensor.
    warnings: what is merged and may not be meant, one line each.
    """

    fixed: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    heads: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[Ref, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def align(
    endpoints: dict[str, Checkpoint],
    has: Callable[[Ref], bool],
    shape: Callable[[Ref], Shape],
    drop: Iterable[str] = (),
    towers: Mapping[str, Tower] | None = None,
) -> Alignment:
    """Compare every endpoint with the base. endpoints: base first, under the base's tensor names. has, shape: of a
    tensor, stored or tied. drop: patterns of tensors that may be left out. towers: of the experts that are merged into
    the base's language tower: what is beside it stays the base's, and tables of words may differ in length.

    Raises CheckpointError where an expert lacks a tensor of the base, has one that the base lacks, or has another
    shape inside a layer. Layers beyond the shallower of two models are not compared: a recipe says which it takes.
    """
    (base_name, base), *experts = endpoints.items()
    found = Alignment()
    base_head = own_head(base)
    if base_head:
        found.heads[base_name] = sorted(base_head)
    for name, info in base.tensors.items():
        if is_buffer(name, info.shape):
            found.fixed[name] = "a buffer, which models compute themselves"
        elif not info.dtype.is_floating_point:
            found.fixed[name] = f"{str(info.dtype).removeprefix('torch.')} buffer"
    for name in sorted(base_head):
        for model, checkpoint in experts:
            if not _same_question(name, base, checkpoint):
                found.fixed[name] = f"the head of {base_name}; that of {model} answers another question"
    alike = lambda other: base.config.get("finetuning_task") and len(_tasks(base, other)) == 1
    unnamed = [model for model, other in experts if _labels(base) is None and not alike(other)]
    if unnamed and any(name not in found.fixed for name in base_head):
        more = f" and {len(unnamed) - 1} more" if len(unnamed) > 1 else ""
        said = f"{unnamed[0]}{more}: heads whose labels have no names are merged with that of {base_name}"
        found.warnings.append(f"{said} as if they answered one question; `label2id` in config.json tells them apart")
    found.kept.update(found.fixed)
    towers = towers or {}
    # Whole models first: what is kept for a language model's sake is compared in those that have it.
    for model, checkpoint in sorted(experts, key=lambda expert: expert[0] in towers):
        own = own_head(checkpoint)
        if own:
            found.heads[model] = sorted(own)
        tower = towers.get(model)
        _compare_shapes(model, checkpoint, base_name, base, own, has, shape, tower, found)
        _find_missing(model, checkpoint, base_name, base, own | base_head, has, tower, found)
        _find_extra(model, checkpoint, base_name, base, own, has, tuple(drop), found)
    return found


def _compare_shapes(model, checkpoint, base_name, base, own, has, shape, tower, found: Alignment) -> None:
    stack = layout(base.tensors)
    for name in dict.fromkeys((*base.tensors, *checkpoint.tensors)):
        if name in own or name in found.kept or not has(Ref(model, name)) or not has(Ref(base_name, name)):
            continue
        theirs, expected = shape(Ref(model, name)), shape(Ref(base_name, name))
        if theirs == expected:
            continue
        if stack.layer_of(name) is not None:
            raise CheckpointError(
                model, f"tensor {name!r} of shape {list(theirs)}", f"{list(expected)} as in the base {base_name}"
            )
        if tower is not None and common_rows(theirs, expected):
            found.notes.append(_rows(model, name, theirs[0], base_name, expected[0]))
            continue
        found.kept[name] = f"shape {list(theirs)} in {model}, {list(expected)} in the base"


def common_rows(*shapes: Shape) -> int:
    """How many rows tables of words have in common, which may differ in length alone; 0 where they differ otherwise."""
    alike = all(len(shape) == len(shapes[0]) > 0 and shape[1:] == shapes[0][1:] for shape in shapes)
    return min(shape[0] for shape in shapes) if alike else 0


def _rows(model: str, name: str, own: int, base_name: str, rows: int) -> str:
    what = f"{model}: {name} has {own} rows, {rows} in {base_name}: the first {min(own, rows)} are merged"
    return f"{what}, the others stay the base's" if own < rows else f"{what}, the others are left out"


def _find_missing(model, checkpoint, base_name, base, heads, has, tower, found: Alignment) -> None:
    stack, depth = layout(base.tensors), layout(checkpoint.tensors).layers
    complete = None
    for name in base.tensors:
        layer = stack.layer_of(name)
        beyond = layer is not None and layer >= depth
        if beyond or name in heads or name in found.kept or has(Ref(model, name)):
            continue
        if tower is not None and layer is None and not tower.holds(name):
            found.kept[name] = f"not in {model}, a language model: it is beside the language tower"
            continue
        # A pooler, say, that the expert's own architecture does without. Inside layers nothing is optional.
        if layer is None and (place := stack_of(name)) is not None:
            _check_stack(model, checkpoint, base_name, base, *place)
        if layer is None and complete is None:
            complete = _complete(checkpoint)
        if layer is not None or not complete:
            raise CheckpointError(model, f"no tensor {name!r}", f"every tensor of the base {base_name}")
        found.kept[name] = f"not in {model}, whose architecture does without it"


def _check_stack(model, checkpoint, base_name, base, prefix: str, number: int) -> None:
    """A stack beside the main one, such as an encoder, is as deep in an expert as in the base, or not there at all."""
    own, theirs = (
        {place[1] for name in c.tensors if (place := stack_of(name)) is not None and place[0] == prefix}
        for c in (base, checkpoint)
    )
    if theirs and number not in theirs:
        raise CheckpointError(model, f"{prefix} has {len(theirs)} layers", f"{len(own)} as in the base {base_name}")


def _find_extra(model, checkpoint, base_name, base, own, has, drop: tuple[str, ...], found: Alignment) -> None:
    stack, depth = layout(checkpoint.tensors), layout(base.tensors).layers
    foreign: set[str] | None = None
    for name, info in checkpoint.tensors.items():
        layer = stack.layer_of(name)
        beyond = layer is not None and layer >= depth
        if beyond or has(Ref(base_name, name)):
            continue
        reason = None
        if name in own:
            reason = f"the head of {model}, which stays with it"
        elif is_buffer(name, info.shape):
            reason = "a buffer, which models compute themselves"
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in drop):
            reason = "dropped, as asked"
        else:
            if foreign is None:
                said = loading(checkpoint.config, {n: i.shape for n, i in checkpoint.tensors.items()})
                foreign = set(said.unexpected) if said else set()
            if name in foreign:
                reason = f"no parameter of {model}'s own architecture"
        if reason is None:
            raise CheckpointError(
                model,
                f"tensor {name!r} is not in the base {base_name}, a merge would lose it",
                "only tensors that the base has",
                "another base, or --drop with its name to merge without it",
            )
        found.left_out[Ref(model, name)] = reason


def _same_question(name: str, base: Checkpoint, other: Checkpoint) -> bool:
    """Whether a tensor of the base's head has its counterpart in another's head with the same labels. Labels without
    names are the same; then it is another question where both say of what task they were tuned, and it is not one."""
    theirs = other.tensors.get(name)
    if theirs is None or theirs.shape != base.tensors[name].shape:
        return False
    return _labels(base) == _labels(other) and (_labels(base) is not None or len(_tasks(base, other) - {None}) < 2)


def _tasks(*checkpoints: Checkpoint) -> set[Any]:
    """What they were tuned for; None is among them where one does not say."""
    return {checkpoint.config.get("finetuning_task") for checkpoint in checkpoints}


def _labels(checkpoint: Checkpoint) -> frozenset | None:
    """A classifier's labels by name and number; None where nobody named them."""
    named = checkpoint.config.get("label2id") or {
        label: number for number, label in (checkpoint.config.get("id2label") or {}).items()
    }
    names = frozenset((str(label), str(number)) for label, number in named.items())
    return None if all(re.fullmatch(r"LABEL_\d+", label) for label, _ in names) else names


def _complete(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has every parameter of its own architecture."""
    said = loading(checkpoint.config, {n: i.shape for n, i in checkpoint.tensors.items()})
    return said is not None and not said.missing


def own_head(checkpoint: Checkpoint) -> set[str]:
    """Tensors outside the backbone of a model whose head answers a question of its own."""
    architecture = (checkpoint.config.get("architectures") or [""])[0]
    if "Classification" not in architecture:
        return set()
    prefix = layout(checkpoint.tensors).prefix.split(".")[0]
    return {n for n in checkpoint.tensors if not n.startswith(prefix + ".")}


def check_finite(gram, base: Ref, experts: list[Ref]) -> None:
    """Name the first endpoint whose tensor is not finite. gram: [K+1, K+1] of [θ, τ_1, ..]."""
    for i, ref in enumerate((base, *experts)):
        if not (abs(gram[i][i]) < float("inf")):
            raise CheckpointError(ref.model, f"NaN or infinity in tensor {ref.tensor!r}", "finite weights")


def check_task_vectors(pool: Any, name: str) -> None:
    """Raises CheckpointError naming the first endpoint whose tensor of this name is not finite, base first. pool: whose
    endpoints are aligned; see Pool."""
    base = Ref(pool.base, name)
    if not pool.has(base) or not pool.get(base).is_floating_point() or name in pool.fixed:
        return
    experts = [Ref(m, name) for m in list(pool.endpoints)[1:] if pool.has(Ref(m, name))]
    experts = [e for e in experts if name not in pool.heads.get(e.model, ())][:8]
    for ref in [e for e in experts if pool.shape(e) != pool.shape(base)]:  # in a tower, with words of its own
        experts.remove(ref)
        check_finite([[0.0], [0.0, float((pool.get(ref) * 0).sum())]], base, [ref])
    if not experts:
        return
    pool.statistics.prefetch_gram([(base, tuple(experts))])
    check_finite(pool.statistics.gram(base, tuple(experts)), base, experts)
