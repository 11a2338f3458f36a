"""Trimmed, sign-elected task vectors of each expert, against the definition and another implementation of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge3 import Pool, Recipe
from merge3.errors import RecipeError
from merge3.largest import kept_from
from merge3.learn.survivors import survivors, write_survivors


def recipe_of(family, experts=("e0", "e1", "e2")):
    data = {"merge_method": "adamerging++", "base_model": str(family / "base"), "fit": {"items": ["i"]}}
    return Recipe.parse(data | {"models": [{"model": str(family / name)} for name in experts]})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0.01, 1.0), st.integers(0, 3), st.booleans())
def test_the_threshold_is_kthvalues(sizes, share, seed, ties):
    rng = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, generator=rng) for size in sizes]
    if ties:
        tensors = [(tensor * 2).round() / 2 for tensor in tensors]
    flat = torch.cat(tensors).abs()
    rank = len(flat) - int(len(flat) * share)
    expected = float(flat.kthvalue(rank).values) if rank > 0 else 0.0
    assert kept_from(lambda: ((0, tensor.abs()) for tensor in tensors), share) == {0: expected}


def test_what_survives_by_hand():
    first, second = torch.tensor([3.0, -2.0, 0.5, 2.0]), torch.tensor([-1.0, -4.0, 9.0, -2.0])
    one, other = survivors([first, second], [1.0, 2.0], majority=-1.0)
    # The second's 1 is trimmed, the first's half too; 2 and -2 sum to 0 and take the majority's sign.
    assert one.tolist() == [3.0, -2.0, 0.0, 0.0]
    assert other.tolist() == [0.0, -4.0, 9.0, -2.0]


def test_checkpoints_hold_the_survivors_of_the_whole_model(family, tmp_path):
    recipe = recipe_of(family)
    pool = Pool.open(str(family / "base"), [str(family / f"e{k}") for k in range(3)])
    made = write_survivors(recipe, pool, 0.2, tmp_path)
    assert [str(source.model) for source in made.slices[0].sources] == [str(tmp_path / f"e{k}") for k in range(3)]
    names = sorted(pool.base_checkpoint.tensors)
    base = torch.cat([pool.base_checkpoint.get(name).flatten() for name in names])
    vectors = []
    for k in range(3):
        vectors.append(torch.cat([pool.endpoints[str(family / f"e{k}")].get(name).flatten() for name in names]) - base)
    expected = split(torch.stack(vectors), 0.2)
    opened = Pool.open(str(family / "base"), [str(tmp_path / f"e{k}") for k in range(3)])
    for k in range(3):
        stored = torch.cat([opened.endpoints[str(tmp_path / f"e{k}")].get(name).flatten() for name in names])
        torch.testing.assert_close(stored - base, expected[k], atol=1e-7, rtol=0)
        share = float((expected[k] != 0).float().mean())
        assert 0.05 < share < 0.2  # signs took some of the fifth
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    write_survivors(recipe, pool, 0.2, tmp_path)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}


def split(vectors, share):
    """The same on flat vectors, [experts, all]."""
    rank = vectors.shape[1] - int(vectors.shape[1] * share)
    kept = vectors * (vectors.abs() >= vectors.abs().kthvalue(rank, dim=1, keepdim=True).values)
    signs = kept.sum(0).sign()
    signs[signs == 0] = signs.sum().sign()
    return torch.where(kept * signs > 0, kept, 0.0)


def test_two_experts_of_one_name(family, tmp_path):
    recipe = recipe_of(family)
    twice = Recipe.parse(recipe.to_dict() | {"models": [{"model": "a/e0"}, {"model": "b/e0"}]})
    with pytest.raises(RecipeError, match="models: two end in 'e0'; expected names that differ"):
        write_survivors(twice, None, 0.2, tmp_path)
