"""Hierarchical SuperMerge: groups of similar experts are merged, each on its own tasks, and the results in turn.

What is in memory at once is a base and one group's models, g + 1 copies instead of T + 1 (2412.10416, whose groups are
of tasks that are alike; how is not said there, so by the cosine of task vectors here).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from merge3.errors import RecipeError
from merge3.learn.fit import merged_with, of_experts
from merge3.learn.settings import Groups
from merge3.pool import Pool
from merge3.program import compile
from merge3.recipe import Recipe

Weights = dict[str, list[tuple[str, float]]]  # model -> (tensor, weight) of each tensor


@dataclass(frozen=True)
class Node:
    """An expert, or the merge of several nodes. name: of an expert its own, else its place in the tree."""

    name: str
    parts: tuple[Node, ...] = ()

    @property
    def experts(self) -> list[str]:
        """Below it, in order."""
        return [e for part in self.parts for e in part.experts] if self.parts else [self.name]

    def inner(self) -> list[Node]:
        """Every merge below it and itself, in the order they are to be made."""
        return [n for part in self.parts for n in part.inner()] + [self] if self.parts else []


def tree(experts: Sequence[str], groups: Groups, cosine: Callable[[str, str], float]) -> Node:
    """Groups of at most `groups.size` nodes, the most alike first, merged until one is left. cosine(a, b): of two
    experts; of groups it is their members' mean. Groups that were given are merged in one more step.

    Raises RecipeError for groups that are not the experts, each once.
    """
    leaves = [Node(expert) for expert in experts]
    if groups.experts is not None:
        return _given(leaves, groups.experts)
    nodes, level = leaves, 0
    while len(nodes) > groups.size:
        alike = None if groups.by == "order" else _similarities(nodes, cosine)
        parts = _grouped(len(nodes), groups.size, alike)
        nodes = [_node(f"{level}-{i}", [nodes[at] for at in part]) for i, part in enumerate(parts)]
        level += 1
    return _node("root", nodes)


def task_vector_cosine(recipe: Recipe, first: str, other: str) -> float:
    """<τ_1, τ_2> / |τ_1| |τ_2| over all tensors that the recipe merges. Opens a base and two experts, for as long as it
    takes, and holds a tensor at a time."""
    pair = of_experts(recipe, [first, other])
    settings = {"tokenizer": recipe.tokenizer, "tower": recipe.tower}
    pool, gram = Pool.open(str(recipe.base_model), [first, other], **settings), np.zeros((3, 3))
    for job in compile(merged_with(pair, {first: 1.0, other: 1.0}), pool).jobs:
        gram += pool.statistics.gram(job.base, job.sources)
        pool.release(job.refs)
    norm = np.sqrt(gram[1, 1] * gram[2, 2])
    return float(gram[1, 2] / norm) if norm > 0 else 1.0


def composed(outer: Mapping[str, Weights | None], weights: Weights, ties: Mapping[str, str]) -> Weights:
    """Weights of experts: those of a merge of groups, times those within each. outer: node of `weights` -> the weights
    within it, None for an expert. ties: output -> the tensor that models without one of their own share it with."""
    found: Weights = {}
    for name, own in weights.items():
        inner = outer[name]
        if inner is None:
            found[name] = own
            continue
        for expert, parts in inner.items():
            within = dict(parts)
            # Within a group whose models tie it an output goes with its source. What neither is there is a head: a
            # group's result has the base's, which is merged where no other is left; an expert's own never is.
            inside = [(tensor, weight, within.get(tensor, within.get(ties.get(tensor)))) for tensor, weight in own]
            found[expert] = [(tensor, weight * factor) for tensor, weight, factor in inside if factor is not None]
    return found


def weights_of(recipe: Recipe) -> Weights:
    """Of a fitted recipe with a weight for every tensor."""
    found: Weights = {}
    for source in recipe.slices[0].sources:
        entries = source.parameters["weight"]
        found[str(source.model)] = [(e["filter"], e["value"]) for e in entries if e["filter"] != "*"]
    return found


def _given(leaves: Sequence[Node], groups: Sequence[Sequence[str]]) -> Node:
    named = [name for group in groups for name in group]
    by_name = {leaf.name: leaf for leaf in leaves}
    if not all(groups):
        raise RecipeError("fit.groups", "an empty group", "every model in one group")
    if sorted(named) != sorted(by_name):
        odd = sorted({*named} ^ {*by_name}) or [name for name in named if named.count(name) > 1]
        raise RecipeError("fit.groups", f"{odd[0]!r} is not in exactly one group", "every model in one group")
    return _node("root", [_node(f"0-{i}", [by_name[name] for name in group]) for i, group in enumerate(groups)])


def _node(name: str, parts: Sequence[Node]) -> Node:
    return parts[0] if len(parts) == 1 else Node(name, tuple(parts))


def _similarities(nodes: Sequence[Node], cosine: Callable[[str, str], float]) -> np.ndarray:
    known: dict[tuple[str, str], float] = {}

    def of(a: str, b: str) -> float:
        key = (min(a, b), max(a, b))
        if key not in known:
            known[key] = cosine(*key)
        return known[key]

    alike = np.eye(len(nodes))
    for i, one in enumerate(nodes):
        for j, other in enumerate(nodes[:i]):
            alike[i, j] = alike[j, i] = np.mean([of(a, b) for a in one.experts for b in other.experts])
    return alike


def _grouped(count: int, size: int, alike: np.ndarray | None) -> list[list[int]]:
    """Places in groups of `size`, the last perhaps smaller. alike: [count, count]; None: in order."""
    if alike is None:
        return [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    left, groups = list(range(count)), []
    while left:
        if len(left) <= size:
            groups.append(left)
            break
        pairs = [(alike[i, j], -i, -j) for i in left for j in left if i < j]
        _, i, j = max(pairs)
        group = [-i, -j]
        while len(group) < size:
            rest = [at for at in left if at not in group]
            group.append(max(rest, key=lambda at: (alike[at, group].mean(), -at)))
        groups.append(sorted(group))
        left = [at for at in left if at not in group]
    return groups
