"""Whether endpoints fit together, tensor by tensor; and what of them cannot be merged."""

from __future__ import annotations

from collections.abc import Callable

from merge3.checkpoint import Checkpoint
from merge3.checkpoint.layout import Ref, layout
from merge3.errors import CheckpointError


def align(
    endpoints: dict[str, Checkpoint], has: Callable[[Ref], bool], shape: Callable[[Ref], tuple[int, ...]]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """kept: tensors that stay the base's, with the reason; heads: endpoint -> tensors outside its backbone.

    endpoints: base first. Raises CheckpointError where an expert lacks a tensor of the base, or has another shape
    inside a layer.
    """
    (base_name, base), *experts = endpoints.items()
    kept: dict[str, str] = {}
    heads: dict[str, list[str]] = {}
    stack, base_head = layout(base.tensors), set(own_head(base))
    for model, checkpoint in experts:
        own = set(own_head(checkpoint))
        for name, info in base.tensors.items():
            if name in own:
                continue
            if not has(Ref(model, name)):
                if name in base_head:
                    continue
                raise CheckpointError(model, f"no tensor {name!r}", f"every tensor of the base {base_name}")
            found = shape(Ref(model, name))
            if found == info.shape:
                continue
            if stack.layer_of(name) is not None:
                raise CheckpointError(
                    model, f"tensor {name!r} of shape {list(found)}", f"{list(info.shape)} as in the base {base_name}"
                )
            kept.setdefault(name, f"shape {list(found)} in {model}, {list(info.shape)} in the base")
        if own:
            heads[model] = sorted(own)
    for name, info in base.tensors.items():
        if not info.dtype.is_floating_point:
            kept.setdefault(name, f"{info.dtype} buffer")
    if base_head:
        heads[base_name] = sorted(base_head)
    return kept, heads


def own_head(checkpoint: Checkpoint) -> list[str]:
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
