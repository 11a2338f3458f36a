"""doge against the loss as it stands, its mask over the whole model, its properties, and what it leaves alone."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge3 import METHODS, Pool, Recipe, Slot
from merge3.errors import RecipeError
from merge3.export import check_recipe
from merge3.methods.doge import common_change, lengths, shared_subspace
from tests.methods.deriving import derived, job_of

Q = "model.layers.0.self_attn.q_proj.weight"
SETTINGS = {"eta": 0.2, "subspace": 3, "steps": 25, "learning_rate": 1e-3}


def drawn(experts=3, shape=(12, 9), seed=0, scale=0.05):
    """Task vectors [T, rows, columns], float32."""
    return torch.randn(experts, *shape, generator=torch.Generator().manual_seed(seed)) * scale


def loss_of(vectors, change, scales):
    """As the paper writes it."""
    merged = (scales[:, None, None] * (vectors + change)).sum(0)
    return (vectors * (vectors - merged)).sum(2).square().sum()


def basis_of(vectors, subspace):
    """The shared directions, by SVDs alone."""
    rank = min(vectors.shape[1:])
    left = [torch.linalg.svd(vector, full_matrices=False)[0][:, : rank // len(vectors)] for vector in vectors]
    return torch.linalg.svd(torch.cat(left, 1), full_matrices=False)[0][:, : rank // subspace]


def by_autograd(vectors, eta, subspace, steps, learning_rate, step=None):
    """Float64, the gradient of the whole loss, Adam written out. step: of plain descent instead."""
    vectors = vectors.double()
    scales = eta / vectors.flatten(1).norm(dim=1)
    basis = basis_of(vectors, subspace)
    change = torch.zeros_like(vectors[0], requires_grad=True)
    first, second = torch.zeros_like(vectors[0]), torch.zeros_like(vectors[0])
    for number in range(1, steps + 1):
        (gradient,) = torch.autograd.grad(loss_of(vectors, change, scales), change)
        gradient = gradient - basis @ (basis.T @ gradient)
        with torch.no_grad():
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            size = (second / (1 - 0.999**number)).sqrt() + 1e-8
            change -= learning_rate * first / (1 - 0.9**number) / size if step is None else step * gradient
    return change.detach()


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 4), st.tuples(st.integers(4, 14), st.integers(4, 14)), st.integers(2, 6), st.integers(0, 2**20))
def test_steps_are_those_of_adam_on_the_loss(experts, shape, subspace, seed):
    vectors = drawn(experts, shape, seed, scale=0.3)
    asked = SETTINGS | {"subspace": subspace}
    ours, theirs = common_change(vectors, **asked), by_autograd(vectors, **asked)
    assert ours.isfinite().all()
    if _gap(vectors, subspace) > 1e-2:  # else which directions are the first ones is rounding's affair
        assert float((ours - theirs).norm()) <= 2e-2 * float(theirs.norm()) + 1e-9


def test_nothing_moves_where_all_is_shared():
    """Rounding is no gradient."""
    assert not common_change(drawn(1, (4, 4)), **SETTINGS | {"subspace": 1}).any()
    assert not common_change(drawn(2, (4, 9)), **SETTINGS | {"subspace": 1}).any()
    assert common_change(drawn(1, (9, 4)), **SETTINGS | {"subspace": 1}).any()


def _gap(vectors, subspace):
    """Between the last direction that is shared and the first that is not."""
    rank = min(vectors.shape[1:])
    left = [torch.linalg.svd(v.double(), full_matrices=False)[0][:, : rank // len(vectors)] for v in vectors]
    values = torch.linalg.svdvals(torch.cat(left, 1))
    last = rank // subspace
    return float(values[last - 1] - (values[last] if last < len(values) else 0)) if last else 1.0


def test_the_loss_falls_and_the_shared_subspace_stays():
    """Under plain descent nothing moves in it; Adam's own scale for every element leaves it, a little."""
    vectors = drawn(scale=0.5)
    scales, basis = lengths(vectors, 0.2), shared_subspace(vectors, 3)
    plain = by_autograd(vectors, 0.2, 3, 25, 0, step=0.01).float()
    assert plain.norm() > 0 and (basis.T @ plain).norm() < 1e-5 * plain.norm()
    change = common_change(vectors, **SETTINGS)
    assert loss_of(vectors, change, scales) < loss_of(vectors, 0 * change, scales)
    assert (basis.T @ change).norm() < 0.5 * change.norm()


def test_the_subspace_is_that_of_svds():
    vectors = drawn(3, (20, 14))
    ours, theirs = shared_subspace(vectors, 2), basis_of(vectors.double(), 2)
    torch.testing.assert_close(ours @ ours.T, (theirs @ theirs.T).float(), atol=1e-4, rtol=0)
    assert ours.shape == (20, 7)
    assert shared_subspace(vectors, 14).shape == (20, 1) and shared_subspace(vectors, 15).shape == (20, 0)
    assert shared_subspace(vectors, 1).shape == (20, 12)  # three times a third of 14: there are no more


# -- the mask


def of_model(vectors, **parameters):
    return derived("doge", vectors, **({"steps": 5, "eta": 0.2} | parameters))


def model(experts=3, seed=0):
    """Task vectors of three matrices in layers, of very different size, and of a head and a norm."""
    rng, found = torch.Generator().manual_seed(seed), []
    shapes = {Q: (8, 6, 0.01), "model.layers.1.mlp.up_proj.weight": (16, 6, 0.1), "lm_head.weight": (10, 6, 1.0)}
    for _ in range(experts):
        own = {name: torch.randn(m, d, generator=rng) * s for name, (m, d, s) in shapes.items()}
        found.append(own | {"model.layers.1.norm.weight": torch.randn(6, generator=rng)})
    return found


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.8, 1.0])
def test_elements_are_ranked_among_all_of_their_model(keep):
    """Of both matrices together: small ones are kept in the larger matrix alone. One of Q that is largest shows it."""
    vectors = model()
    vectors[1][Q][2, 3] = 5.0
    layers = [name for name in vectors[0] if name.endswith("proj.weight")]
    merged = of_model(vectors, keep=keep)
    expected = {name: torch.zeros_like(vectors[0][name]) for name in layers}
    for own in vectors:
        flat = torch.cat([own[name].abs().flatten() for name in layers])
        place = len(flat) - int(len(flat) * keep)
        threshold = flat.kthvalue(place).values if place else 0.0
        for name in layers:
            stacked = torch.stack([other[name] for other in vectors])
            change = common_change(stacked, 0.2, 6, 5, 1e-4)
            expected[name] += 0.2 / own[name].norm() * (own[name] + change) * (own[name].abs() >= threshold)
    for name in layers:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-4, atol=1e-6)
    assert merged[Q][2, 3] != 0
    if keep == 0.0:  # one element of each expert
        assert sum(int((merged[name] != 0).sum()) for name in layers) == 3


def test_a_share_for_every_layer_is_of_the_whole_model():
    """What `keep` is in another layer changes nothing here: thresholds are those of the model at a tensor's share."""
    vectors = model()
    whole = of_model(vectors, keep=0.5)
    row = METHODS["doge"]
    jobs = [job_of("doge", name, t.shape, 3, keep=0.5 if name == Q else 0.1, eta=0.2) for name, t in vectors[0].items()]
    read = lambda asked: ((j, [torch.zeros(j.shape), *(own[j.name] for own in vectors)]) for j in asked)
    found = row.survey(jobs, read)
    assert found.keys() == {(f"e{i}", keep) for i in range(3) for keep in (0.1, 0.5)}
    layers = [Q, "model.layers.1.mlp.up_proj.weight"]
    flat = torch.cat([vectors[0][name].abs().flatten() for name in layers])
    assert found["e0", 0.5] == float(flat.kthvalue(len(flat) - len(flat) // 2).values)
    assert whole[Q].isfinite().all()


def test_what_is_no_matrix_of_a_layer():
    vectors = model()
    names = ["lm_head.weight", "model.layers.1.norm.weight"]
    averaged, kept = of_model(vectors), of_model(vectors, others=False)
    for name in names:
        torch.testing.assert_close(averaged[name], torch.stack([own[name] for own in vectors]).mean(0))
        assert not kept[name].any()
    assert all(torch.equal(averaged[name], kept[name]) for name in averaged if name not in names)
    convolution = "encoder.stages.0.convolution.weight"
    for own in vectors:
        own[convolution] = torch.randn(6, 2, 2, 2)
    assert torch.equal(of_model(vectors)[convolution], torch.stack([own[convolution] for own in vectors]).mean(0))
    assert not torch.equal(of_model(vectors, flatten=True)[convolution], of_model(vectors)[convolution])


# -- properties and extremes


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(3)), st.integers(0, 2**20))
def test_the_order_of_experts_does_not_matter(order, seed):
    vectors = model(seed=seed)
    one, other = of_model(vectors), of_model([vectors[i] for i in order])
    for name in one:
        assert float((one[name] - other[name]).norm()) <= 2e-2 * float(one[name].norm()), name


@pytest.mark.parametrize("experts", [1, 2, 8])
@pytest.mark.parametrize("shape", [(2, 2), (2, 30), (30, 2), (5, 5)])
def test_more_experts_than_directions(experts, shape):
    vectors = drawn(experts, shape)
    assert common_change(vectors, **SETTINGS).isfinite().all()
    assert shared_subspace(vectors, 1).shape[1] <= experts * (min(shape) // experts)


def test_so_little_is_shared_that_nothing_is():
    assert shared_subspace(drawn(), 100).shape == (12, 0)
    vectors = drawn(scale=0.3)
    near = by_autograd(vectors, **SETTINGS | {"subspace": 100})
    assert float((common_change(vectors, **SETTINGS | {"subspace": 100}) - near).norm()) < 1e-3 * float(near.norm())


@pytest.mark.parametrize("scale", [1e-18, 1e-8, 1e6])
def test_no_scale_makes_nan(scale):
    merged = of_model([{Q: vector} for vector in drawn(scale=scale)])
    assert merged[Q].isfinite().all()


def test_experts_that_change_nothing():
    """No part of the sum, nor of what is shared; where all are so, nothing is changed."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model()[0].items()}
    assert not any(tensor.any() for tensor in of_model([zeros, zeros]).values())
    merged = of_model([*model(2), zeros])
    assert (
        all(tensor.isfinite().all() for tensor in merged.values()) and merged["model.layers.1.mlp.up_proj.weight"].any()
    )
    assert float(lengths(torch.zeros(2, 3, 4), 0.1).abs().sum()) == 0.0


def test_copies_of_an_expert_keep_its_elements():
    (vector,) = drawn(1)
    merged = of_model([{Q: vector}] * 3, steps=0, keep=0.25)[Q]
    place = vector.numel() - vector.numel() // 4
    kept = vector.abs() >= vector.abs().flatten().kthvalue(place).values
    torch.testing.assert_close(merged, 3 * 0.2 * vector / vector.norm() * kept, rtol=1e-5, atol=1e-7)


# -- in a recipe


def recipe_of(family, **parameters):
    models = [{"model": str(family / f"e{i}")} for i in range(3)]
    base = str(family / "base")
    return Recipe.parse({"merge_method": "doge", "base_model": base, "models": models, "parameters": parameters})


@pytest.mark.parametrize("wrong", [
    {"keep": 1.5}, {"keep": -0.1}, {"eta": 0.0}, {"eta": -1.0}, {"subspace": 0}, {"steps": -1}, {"steps": 10**7},
    {"learning_rate": -0.1}, {"others": "yes"}, {"subspace": float("nan")}, {"eta": "much"},
])  # fmt: skip
def test_values_out_of_range(family, wrong):
    pool = Pool.open(str(family / "base"), [str(family / f"e{i}") for i in range(3)])
    (name,) = wrong
    with pytest.raises(RecipeError, match=f"{name}: found"):
        check_recipe(recipe_of(family, **wrong), pool)


def test_thresholds_are_found_once(family, tmp_path, monkeypatch):
    """With what is derived: neither another lambda nor another run looks at the models again."""
    row, surveys = METHODS["doge"], []

    def survey(jobs, read):
        surveys.append(len(jobs))
        return row.survey(jobs, read)

    monkeypatch.setitem(METHODS, "doge", dataclasses.replace(row, survey=survey))
    found = []
    for _ in range(2):
        pool = Pool.open(str(family / "base"), [str(family / f"e{i}") for i in range(3)], derived_folder=tmp_path)
        slot = Slot(pool)
        for scale in (0.5, 1.0):
            slot.swap(recipe_of(family, steps=10, **{"lambda": scale}))
        found.append(slot.model.lm_head.weight.clone())
    assert surveys == [len(pool.base_checkpoint.tensors)] and torch.equal(*found)
