"""A model as a path through layers of several models: hops, and the recipe that says the same.

Every hop has a scale, which multiplies the state that enters it (Akiba et al. 2024, W of the data flow space; one a hop
says as much on a path as one for every pair of layers). Blocks that norm what they read and add what they make, do not
see the size of a state: RMSNorm and LayerNorm give the same for c x as for x, c > 0, but for their epsilon. So with
x_k = S_k y_k, S_k = s_1 .. s_k, the path without any scales whose blocks write 1 / S_k times as much gives y_k, and the
final norm does not see the rest: the scales fold into the matrices that write to the state, and mergekit's slices with
`scale` filters are the whole path.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from merge3.errors import ConfigError
from merge3.methods.averages import AS_IT_IS
from merge3.recipe import ModelRef, Recipe, Slice, Source

SCALE = "scale"  # the parameter that multiplies a tensor
_NEAR = 4  # neighbours of a quotient that are tried


class Hop(NamedTuple):
    """One layer of a path. scale: of the state that enters it."""

    model: str
    layer: int
    scale: float = 1.0


class Family(NamedTuple):
    """Architectures whose layers can be put in any order. types: model_type of config.json. norms: parts of a layer
    that norm, each before a block. writers: parts of tensors' names that write to the state, bias and all."""

    types: tuple[str, ...]
    norms: frozenset[str]
    writers: tuple[str, ...]


FAMILIES = (
    Family(
        ("llama", "mistral", "qwen2", "qwen3"),
        frozenset({"input_layernorm", "post_attention_layernorm"}),
        ("o_proj", "down_proj"),
    ),
    Family(("gpt2",), frozenset({"ln_1", "ln_2"}), ("c_proj",)),
)
TYPES = tuple(name for family in FAMILIES for name in family.types)


def writers_of(layer_names: Iterable[str], where: str = "genome: space") -> tuple[str, ...]:
    """The family's writers, by the names of a layer's tensors. Raises ConfigError for layers of other families: with
    norms after their blocks, which would undo what is folded, or without a place where a scale could go."""
    if not (found := writers_known(layer_names)):
        said = f"layers with {', '.join(sorted(_norms(layer_names))) or 'no norms'}"
        hint = "scales fold into a layer only where its norms stand before its blocks, and nowhere else"
        raise ConfigError(where, said, f"a model of type {', '.join(TYPES)}", hint)
    return found


def writers_known(layer_names: Iterable[str]) -> tuple[str, ...]:
    """The same; empty for layers of other families."""
    names = list(layer_names)
    for family in FAMILIES:
        there = all(any(f"{writer}." in name for name in names) for writer in family.writers)
        if there and _norms(names) == family.norms:
            return family.writers
    return ()


def _norms(layer_names: Iterable[str]) -> set[str]:
    parts = {name.partition(".")[0] for name in layer_names}
    return {part for part in parts if "norm" in part or part.startswith("ln_")}


def path_recipe(hops: Sequence[Hop], outside: str, writers: Sequence[str], **others: Any) -> Recipe:
    """The recipe of a path, which any tool with mergekit's rules merges: a slice for each run of layers.

    outside: the model whose embedding, final norm and head it has. others: of the recipe, dtype and the like.
    """
    slices: list[tuple[str, int, int, float]] = []  # model, first, last, factor
    factor = 1.0
    for hop in hops:
        factor = factor / hop.scale
        last = slices[-1] if slices else None
        if last is not None and last[:1] == (hop.model,) and last[2:] == (hop.layer, factor):
            slices[-1] = (hop.model, last[1], hop.layer + 1, factor)
        else:
            slices.append((hop.model, hop.layer, hop.layer + 1, factor))
    nothing = (outside, 0, 0, 1.0)  # what stands before and after the stack is the first and the last slice's
    if slices[0][0] != outside:
        slices.insert(0, nothing)
    if slices[-1][0] != outside:
        slices.append(nothing)
    return Recipe(AS_IT_IS, tuple(_slice(*part, writers) for part in slices), **others)


def hops_of(recipe: Recipe, writers: Sequence[str]) -> tuple[Hop, ...] | None:
    """The path that a recipe is; None for any other merge. The inverse of `path_recipe`, so that its recipe is the same
    again to the last bit."""
    if recipe.method != AS_IT_IS or recipe.whole or recipe.parameters or recipe.tasks or not writers:
        return None
    hops, before = [], 1.0
    for part in recipe.slices:
        source = part.sources[0]
        factor = _factor(part, writers)
        if factor is None or source.layer_range is None:
            return None
        for layer in range(*source.layer_range):
            hops.append(Hop(str(source.model), layer, _quotient(before, factor)))
            before = factor
    return tuple(hops) or None


def read_hops(recipe: Recipe) -> tuple[Hop, ...] | None:
    """The same of a recipe alone, whatever the family of its models."""
    return next((hops for family in FAMILIES if (hops := hops_of(recipe, family.writers))), None)


def outside_of(recipe: Recipe) -> tuple[str, str]:
    """The models whose tensors stand before and after the stack of a path."""
    return str(recipe.slices[0].sources[0].model), str(recipe.slices[-1].sources[0].model)


def shown(hops: Iterable[Hop], name: dict[str, str] | None = None) -> str:
    """A path in one line: `base 0-3, math 2-3 (x 0.81)`. name: of models in it."""
    parts: list[list[Any]] = []
    for hop in hops:
        last = parts[-1] if parts else None
        if last is not None and (last[0], last[2] + 1) == (hop.model, hop.layer) and hop.scale == 1.0:
            last[2] = hop.layer
        else:
            parts.append([hop.model, hop.layer, hop.layer, hop.scale])
    texts = []
    for model, first, last, scale in parts:
        layers = f"{first}" if first == last else f"{first}-{last}"
        texts.append(f"{(name or {}).get(model, model)} {layers}" + (f" (x {scale:.2f})" if scale != 1.0 else ""))
    return ", ".join(texts)


def _slice(model: str, first: int, last: int, factor: float, writers: Sequence[str]) -> Slice:
    parameters = {}
    if factor != 1.0:
        parameters[SCALE] = [*({"filter": name, "value": factor} for name in writers), {"value": 1.0}]
    return Slice((Source(ModelRef.parse(model), (first, last), parameters),))


def _factor(part: Slice, writers: Sequence[str]) -> float | None:
    """What the writers of a slice's layers are multiplied by; None where that is not all that is done."""
    source = part.sources[0]
    if len(part.sources) != 1 or part.parameters or part.base_model or set(source.parameters) - {SCALE}:
        return None
    setting = source.parameters.get(SCALE, 1.0)
    if setting == 1.0:
        return 1.0
    if not isinstance(setting, (list, tuple)) or not all(isinstance(entry, dict) for entry in setting):
        return None
    *named, rest = setting
    values = {entry.get("value") for entry in named}
    if "filter" in rest or rest.get("value") != 1 or {entry.get("filter") for entry in named} != set(writers):
        return None
    (factor,) = values if len(values) == 1 else (None,)
    known = isinstance(factor, (int, float)) and not isinstance(factor, bool) and factor > 0
    return float(factor) if known else None


def _quotient(before: float, after: float) -> float:
    """The scale by which `before` was divided to give `after`: of neighbours the one that gives it again."""
    near = before / after
    low = high = near
    for _ in range(_NEAR):
        for scale in (low, high):
            if before / scale == after:
                return scale
        low, high = math.nextafter(low, 0.0), math.nextafter(high, math.inf)
    return near
