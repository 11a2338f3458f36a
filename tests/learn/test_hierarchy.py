"""Which experts are merged together, and what the weights of a tree come to."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge3 import Recipe
from merge3.errors import RecipeError
from merge3.learn.hierarchy import Node, composed, task_vector_cosine, tree, weights_of
from merge3.learn.settings import Groups


def cosines(pairs):
    return lambda a, b: pairs[frozenset((a, b))]


def test_the_most_alike_are_merged_first():
    alike = dict.fromkeys(map(frozenset, itertools.combinations("abcd", 2)), 0.1)
    alike[frozenset("ac")], alike[frozenset("bd")] = 0.9, 0.5
    found = tree("abcd", Groups(size=2), cosines(alike))
    assert [node.experts for node in found.inner()] == [["a", "c"], ["b", "d"], ["a", "c", "b", "d"]]
    assert [node.name for node in found.inner()] == ["0-0", "0-1", "root"]


def test_in_the_order_of_models():
    found = tree("abcde", Groups(size=2, by="order"), None)
    assert [node.experts for node in found.inner()] == [list("ab"), list("cd"), list("abcd"), list("abcde")]


@given(st.integers(1, 11), st.integers(2, 5), st.integers(0, 3))
def test_every_expert_is_once_in_a_tree_of_small_groups(count, size, seed):
    names, table = [f"e{i}" for i in range(count)], np.random.default_rng(seed).normal(size=(count, count))
    found = tree(names, Groups(size=size), lambda a, b: table[int(a[1:]), int(b[1:])])
    assert sorted(found.experts) == sorted(names)
    for node in found.inner():
        assert len(node.parts) <= size
        assert len(node.parts) > 1 or count == 1


def test_groups_as_given():
    found = tree("abc", Groups(experts=(("c", "a"), ("b",))), None)
    assert [node.experts for node in found.inner()] == [["c", "a"], ["c", "a", "b"]]
    for wrong, odd in (((("a", "b"),), "'c'"), ((("a", "b"), ("b", "c")), "'b'"), ((("a", "b", "c", "x"),), "'x'")):
        with pytest.raises(RecipeError, match=f"fit.groups: {odd} is not in exactly one group"):
            tree("abc", Groups(experts=wrong), None)


def test_weights_of_a_tree_are_products():
    inner = {"a": [("x", 0.5), ("y", 0.25)], "b": [("x", 1.0), ("y", 2.0)]}
    found = composed({"0-0": inner, "c": None}, {"0-0": [("x", 0.5), ("y", 1.0), ("head", 3.0)], "c": [("x", 0.1)]}, {})
    assert found == {"a": [("x", 0.25), ("y", 0.25)], "b": [("x", 0.5), ("y", 2.0)], "c": [("x", 0.1)]}


def test_an_output_that_a_group_ties_goes_with_its_source():
    inner = {"a": [("embed", 0.5)], "b": [("embed", 0.25)]}
    outer = {"0-0": [("embed", 0.8), ("head", 0.4)], "c": [("embed", 1.0)]}
    found = composed({"0-0": inner, "c": None}, outer, {"head": "embed"})
    assert found["a"] == [("embed", 0.4), ("head", 0.2)] and found["b"] == [("embed", 0.2), ("head", 0.1)]


def test_the_cosine_of_whole_models(family):
    data = {"merge_method": "supermerge", "base_model": str(family / "base"), "fit": {"items": ["i"]}}
    recipe = Recipe.parse(data | {"models": [{"model": str(family / name)} for name in ("e0", "e1", "e2")]})
    from safetensors.torch import load_file

    flat = {}
    for name in ("base", "e0", "e1"):
        tensors = load_file(family / name / "model.safetensors")
        flat[name] = torch.cat([tensors[key].flatten().double() for key in sorted(tensors)])
    one, other = flat["e0"] - flat["base"], flat["e1"] - flat["base"]
    expected = float(torch.cosine_similarity(one, other, dim=0))
    assert task_vector_cosine(recipe, str(family / "e0"), str(family / "e1")) == pytest.approx(expected, abs=1e-5)


def test_an_expert_alone_is_no_merge():
    assert Node("a").inner() == [] and Node("a").experts == ["a"]
    made = {"merge_method": "task_arithmetic", "base_model": "b"}
    entries = [{"filter": "x.y", "value": 0.5}, {"filter": "*", "value": 0.0}]
    recipe = Recipe.parse(made | {"models": [{"model": "a", "parameters": {"weight": entries}}]})
    assert weights_of(recipe) == {"a": [("x.y", 0.5)]}
