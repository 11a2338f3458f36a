"""iso_c, tsv_m and wudi against plain float64 linear algebra, their properties, and what is no matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge3.methods import METHODS
from merge3.methods.matrices import matrix_shape, orthogonal, singular
from merge3.methods.spectral import isotropic, least_interference, least_interference_closed, separated
from tests.methods.deriving import derived, job_of

WAYS = {
    "iso_c": {},
    "tsv_m": {},
    "wudi": {"steps": 40, "learning_rate": 1e-3},
    "wudi closed": {"closed": True},
}
SHAPES = st.tuples(st.integers(2, 12), st.integers(2, 12))


def drawn(shape, experts, seed, rank=None, scale=1.0):
    """Task vectors of one matrix."""
    rng, found = torch.Generator().manual_seed(seed), []
    for _ in range(experts):
        matrix = torch.randn(*shape, generator=rng)
        if rank is not None:
            matrix = torch.randn(shape[0], rank, generator=rng) @ torch.randn(rank, shape[1], generator=rng)
        found.append(matrix * scale)
    return found


def of_one(way, vectors, name="model.layers.0.q.weight", **parameters):
    (merged,) = derived(way.split()[0], [{name: vector} for vector in vectors], **WAYS[way] | parameters).values()
    return merged


def near(ours, theirs, tolerance=1e-4):
    assert ours.isfinite().all()
    assert float((ours.double() - theirs.double()).norm()) <= tolerance * (1e-9 + float(theirs.double().norm()))


# -- formulas


def iso_c(vectors):
    u, s, v = torch.linalg.svd(sum(vectors), full_matrices=False)
    return u @ torch.diag(s.mean().expand(len(s))) @ v


def tsv_m(vectors):
    """By whole matrices of singular directions, as the paper writes it."""
    k, parts = min(vectors[0].shape) // len(vectors), []
    for vector in vectors:
        u, s, v = torch.linalg.svd(vector, full_matrices=False)
        parts.append((u[:, :k], s[:k], v[:k]))
    polar = lambda matrix: (lambda usv: usv[0] @ usv[2])(torch.linalg.svd(matrix, full_matrices=False))
    left, values, right = (torch.cat([part[i] for part in parts], 1 if i == 0 else 0) for i in range(3))
    return polar(left) @ torch.diag(values) @ polar(right)


def wudi(vectors, steps, learning_rate):
    """Adam, written out, on the loss as it stands, by autograd."""
    merged = sum(vectors).clone().requires_grad_()
    first, second = torch.zeros_like(merged), torch.zeros_like(merged)
    for step in range(1, steps + 1):
        loss = sum(((merged - own) @ own.T).square().sum() / own.square().sum() for own in vectors)
        (gradient,) = torch.autograd.grad(loss, merged)
        with torch.no_grad():
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            size = (second / (1 - 0.999**step)).sqrt() + 1e-8
            merged -= learning_rate * first / (1 - 0.9**step) / size
    return merged.detach()


def wudi_closed(vectors, mu):
    grams = [own.T @ own / own.square().sum() for own in vectors]
    damping = mu * sum(grams).trace() / len(grams[0])
    right = sum(own @ gram for own, gram in zip(vectors, grams)) + damping * sum(vectors)
    return right @ torch.linalg.inv(sum(grams) + damping * torch.eye(len(grams[0])).double())


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(1, 4), st.integers(0, 2**20))
def test_formulas(shape, experts, seed):
    vectors = drawn(shape, experts, seed)
    exact = [vector.double() for vector in vectors]
    near(isotropic(vectors), iso_c(exact), 1e-3)  # a random square matrix may be nearly singular
    if min(shape) >= experts:
        near(separated(vectors), tsv_m(exact), 1e-3)
    near(least_interference_closed(vectors, 0.1), wudi_closed(exact, 0.1), 1e-5)
    near(least_interference(vectors, 30, 1e-2), wudi(exact, 30, 1e-2), 1e-3)


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (20, 20), (5, 11)])
def test_both_ways_to_the_same_gradient(shape):
    """Wide matrices go by their factor, others by the Gram matrix."""
    vectors = drawn(shape, 2, 0)
    exact = [vector.double() for vector in vectors]
    near(least_interference(vectors, 100, 1e-3), wudi(exact, 100, 1e-3), 1e-5)
    near(least_interference_closed(vectors, 0.02), wudi_closed(exact, 0.02), 1e-5)


def test_closed_form_is_near_what_steps_come_to():
    """Its loss is below that of the sum, and of 300 steps with the damping's weight on the way."""
    vectors = drawn((30, 20), 3, 1, scale=0.01)
    loss = lambda merged: sum(float(((merged - v) @ v.T).square().sum() / v.square().sum()) for v in vectors)
    closed = least_interference_closed(vectors, 0.1).float()
    stepped = least_interference(vectors, 300, 1e-4)
    assert loss(closed) < 0.5 * loss(sum(vectors)) and loss(stepped) < 0.5 * loss(sum(vectors))
    cosine = torch.nn.functional.cosine_similarity(
        (closed - sum(vectors)).flatten(), (stepped - sum(vectors)).flatten(), 0
    )
    assert cosine > 0.6


@pytest.mark.parametrize("shape", [(30, 20), (6, 40), (20, 20)])
def test_the_least_damping_solves_what_has_no_one_minimum(shape):
    """Of low-rank experts, copies among them."""
    vectors = drawn(shape, 2, 0, rank=2)
    merged = least_interference_closed([*vectors, vectors[0]], 1e-6)
    near(merged, wudi_closed([vector.double() for vector in (*vectors, vectors[0])], 1e-6), 1e-4)


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 30), st.integers(1, 30)), st.integers(1, 30), st.integers(0, 2**20))
def test_singular_directions(shape, rank, seed):
    (matrix,) = drawn(shape, 1, seed, rank=min(rank, *shape))
    u, s, v = singular(matrix)
    assert len(s) == min(rank, *shape) or s.min() < 1e-4 * s.max()  # none that is not there
    near(u * s @ v, matrix, 1e-5)
    eye = torch.eye(len(s)).double()
    assert (u.T @ u - eye).abs().max() < 1e-3 and (v @ v.T - eye).abs().max() < 1e-3
    assert (s[:-1] >= s[1:]).all()
    near(orthogonal(matrix) @ matrix.double().T @ orthogonal(matrix), matrix, 1e-3)


# -- properties


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(list(WAYS)), SHAPES, st.permutations(range(4)), st.integers(0, 2**20), st.sampled_from([None, 1, 2])
)
def test_the_order_of_experts_does_not_matter(way, shape, order, seed, rank):
    vectors = drawn(shape, 4, seed, rank)
    near(of_one(way, [vectors[i] for i in order]), of_one(way, vectors), 1e-3)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["iso_c", "tsv_m", "wudi closed"]), SHAPES, st.integers(1, 4), st.integers(0, 2**20))
def test_task_vectors_twice_as_long_merge_to_twice_as_much(way, shape, experts, seed):
    vectors = drawn(shape, experts, seed)
    near(of_one(way, [2 * vector for vector in vectors]), 2 * of_one(way, vectors), 1e-3)


@pytest.mark.parametrize("way", ["tsv_m", "wudi", "wudi closed"])
def test_one_expert_is_itself(way):
    (vector,) = drawn((9, 6), 1, 0)
    near(of_one(way, [vector]), vector, 1e-5)


def test_one_experts_singular_values_are_made_equal():
    (vector,) = drawn((9, 6), 1, 0)
    values = torch.linalg.svdvals(of_one("iso_c", [vector]))
    near(values, torch.linalg.svdvals(vector).mean().expand(6), 1e-5)


@pytest.mark.parametrize("copies", [2, 3])
def test_copies_of_an_expert(copies):
    """iso_c counts them, tsv_m has of them what one may have of its directions."""
    (vector,) = drawn((12, 8), 1, 3)
    u, s, v = torch.linalg.svd(vector)
    k = 8 // copies
    near(of_one("tsv_m", [vector] * copies), u[:, :k] * s[:k] @ v[:k], 1e-4)
    near(of_one("iso_c", [vector] * copies), copies * of_one("iso_c", [vector]), 1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_experts_that_change_nothing(way):
    vectors = drawn((10, 8), 2, 5)
    zeros = torch.zeros(10, 8)
    assert not of_one(way, [zeros, zeros, zeros]).any()
    if way != "tsv_m":  # which shares directions out by the number of experts
        near(of_one(way, [*vectors, zeros]), of_one(way, vectors), 1e-5)
    assert of_one(way, [*vectors, zeros]).isfinite().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1e-18, 1e-8, 1e12])
def test_no_scale_makes_nan(way, scale):
    assert of_one(way, drawn((10, 8), 3, 7, scale=scale)).isfinite().all()


def test_weights_scale_task_vectors_before_anything_is_derived():
    vectors = drawn((12, 9), 3, 2)
    weights = [0.5, -1.0, 2.0]
    expected = tsv_m([weight * vector.double() for weight, vector in zip(weights, vectors)])
    near(of_one("tsv_m", vectors, weights=weights), expected, 1e-4)


# -- which tensors


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(7,), (1, 7), (7, 1), (), (4, 3, 2, 2), (1, 5, 6), (0, 4)])
def test_what_is_no_matrix_is_averaged(way, shape):
    vectors = [torch.randn(shape) for _ in range(3)]
    near(of_one(way, vectors), torch.stack(vectors).mean(0), 1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_flattened_convolutions(way):
    vectors = [torch.randn(6, 5, 1, 2) for _ in range(3)]
    flat = of_one(way, [vector.reshape(6, 10) for vector in vectors])
    assert torch.equal(of_one(way, vectors, flatten=True), flat.reshape(6, 5, 1, 2))


def test_matrices_with_fewer_rows_than_experts():
    """No direction is left for each: their mean; other methods have no such bound."""
    vectors = drawn((3, 9), 4, 0)
    near(of_one("tsv_m", vectors), torch.stack(vectors).mean(0), 1e-6)
    assert of_one("iso_c", vectors).isfinite().all() and of_one("wudi", vectors).isfinite().all()


@pytest.mark.parametrize("shape, flatten, expected", [
    ((4, 5), False, (4, 5)), ((4, 5), True, (4, 5)), ((1, 4, 5), True, (4, 5)), ((1, 4, 5), False, None),
    ((8, 3, 2, 2), True, (8, 12)), ((8, 1, 4), True, (8, 4)), ((8, 1), True, None), ((8, 1), False, None),
    ((5,), True, None), ((1, 1, 1), True, None), ((), True, None), ((0, 3), False, None),
])  # fmt: skip
def test_shapes_of_matrices(shape, flatten, expected):
    assert matrix_shape(job_of("iso_c", "x", shape, 2, flatten=flatten)) == expected


def test_what_is_searched_is_not_derived_by():
    for name in ("iso_c", "tsv_m", "wudi", "doge"):
        row = METHODS[name]
        assert row.searched == ("lambda",) and set(row.deriving) == set(row.parameters) - {"lambda"}
