"""Which units are one: against the authors' code (recorded), a naive oracle, and what every matching must be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge3.learn.zip_correlation import SMALLEST, Moments
from merge3.learn.zip_grouping import Grouping
from merge3.learn.zip_matching import (
    in_order,
    match_as_they_are,
    match_one_to_one,
    match_zip,
    matched_correlation,
)


def states(tokens, units, salt):
    """Whole and half numbers that anybody can make again."""
    i, j = np.indices((tokens, units))
    return ((i * i * 7 + j * j * 13 + i * j * 5 + salt * (i + 3 * j)) % 17 + (i * j) % 5 * 0.5).astype(float)


def correlation_of(found):
    covariance = np.cov(found.T, bias=True)
    deviation = np.sqrt(np.diag(covariance))
    return covariance / np.maximum(np.outer(deviation, deviation), SMALLEST)


def random_correlation(seed, units):
    rng = np.random.default_rng(seed)
    mixed = np.eye(2 * units) + 0.5 * rng.normal(size=(2 * units, 2 * units))
    return correlation_of(rng.normal(size=(3 * units + 2, 2 * units)) @ mixed)


def naive(correlation, alpha, beta):
    """The formulas of section 4 on lists that shrink, as slow as they are plain."""
    units = len(correlation) // 2
    groups = [[unit] for unit in range(2 * units)]
    sims = {(a, b): correlation[a, b] for a in range(2 * units) for b in range(2 * units) if a != b}
    model = lambda group: groups[group][0] // units
    left = {0: int(units // 2 * beta + 1e-4), 1: int(units // 2 * beta + 1e-4)}
    alive = list(range(2 * units))
    while len(alive) > units:
        first, second = max(((a, b) for a in alive for b in alive if a < b), key=lambda pair: sims[pair])
        same = model(first) == model(second)
        for other in alive:
            if other not in (first, second):
                low = min(sims[first, other], sims[second, other])
                sims[first, other] = sims[other, first] = low if low == -np.inf else alpha * low
        groups[first] = sorted(groups[first] + groups[second])
        alive.remove(second)
        if same:
            left[model(first)] -= 1
            if left[model(first)] <= 0:
                own = [group for group in alive if model(group) == model(first)]
                sims |= {(a, b): -np.inf for a in own for b in own}
    places = np.zeros(2 * units, dtype=int)
    for place, group in enumerate(alive):
        places[groups[group]] = place
    return in_order(places)


# What match_tensors_zipit and match_tensors_permute of the authors' code (gstoica27/ZipIt, 1b6ca40) gave for these.
RECORDED = [
    ((4, 24, 1, 0.3, 0.125), [[0, 1, 2, 3], [1, 2, 3, 3]], [1, 2, 3, 0]),
    ((4, 24, 1, 1.0, 1.0), [[0, 1, 2, 3], [1, 2, 3, 3]], [1, 2, 3, 0]),
    ((6, 40, 2, 0.3, 0.0), [[0, 0, 1, 2, 3, 4], [4, 1, 2, 3, 5, 1]], [5, 2, 3, 4, 1, 0]),
    ((6, 40, 3, 0.5, 0.5), [[0, 1, 2, 3, 4, 3], [5, 0, 4, 3, 5, 1]], [4, 0, 2, 3, 5, 1]),
    ((8, 40, 5, 1e-4, 0.075), [[0, 1, 2, 3, 4, 5, 6, 2], [7, 3, 4, 6, 0, 1, 7, 5]], [5, 7, 0, 6, 4, 3, 1, 2]),
]


@pytest.mark.parametrize("case, zipped, permuted", RECORDED)
def test_as_the_authors_code(case, zipped, permuted):
    units, tokens, salt, alpha, beta = case
    correlation = correlation_of(states(tokens, 2 * units, salt))
    assert match_zip(correlation, alpha, beta).tolist() == zipped
    assert match_one_to_one(correlation)[1].tolist() == permuted


@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([0.0, 1e-4, 0.3, 0.9, 1.0]), st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_as_a_naive_oracle(seed, units, alpha, beta):
    correlation = random_correlation(seed, units)
    assert np.array_equal(match_zip(correlation, alpha, beta), naive(correlation, alpha, beta))


@given(st.integers(0, 10**6), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_ties_go_to_the_smallest(seed, units):
    """Correlations of five values alone, most of them there many times."""
    rng = np.random.default_rng(seed)
    values = np.triu(rng.choice([-0.5, 0.0, 0.25, 0.5, 1.0], size=(2 * units, 2 * units)), 1)
    correlation = values + values.T + np.eye(2 * units)
    assert np.array_equal(match_zip(correlation, 0.5, 0.5), naive(correlation, 0.5, 0.5))


@given(st.integers(0, 10**6), st.integers(2, 16), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_a_matching_is_one(seed, units, beta):
    correlation = random_correlation(seed, units)
    before = correlation.copy()
    for places in (match_zip(correlation, 0.3, beta), match_one_to_one(correlation), match_as_they_are(correlation)):
        assert sorted(set(places.ravel())) == list(range(units)) and places.shape == (2, units)
        assert np.array_equal(in_order(places.ravel()), places)
    assert np.array_equal(correlation, before)
    assert Grouping.of(match_one_to_one(correlation)).one_to_one


@given(st.integers(0, 10**6), st.integers(2, 16), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_the_budget_bounds_merges_within_a_model(seed, units, beta):
    """As many as beta says of the first model, and one where that is none."""
    places = match_zip(random_correlation(seed, units), 1.0, beta)
    # Units of the first model are merged with each other in no other way.
    assert units - len(set(places[0])) <= max(1, int(units // 2 * beta + 1e-4))


def test_alpha_keeps_groups_small():
    """The same units with and without: the largest group shrinks."""
    sizes = {}
    for alpha in (1.0, 0.01):
        largest = [np.bincount(match_zip(random_correlation(s, 16), alpha, 1.0).ravel()).max() for s in range(10)]
        sizes[alpha] = np.mean(largest)
    assert sizes[0.01] < sizes[1.0]


def test_a_permuted_copy_is_found():
    rng = np.random.default_rng(0)
    own, order = rng.normal(size=(100, 12)), rng.permutation(12)
    correlation = correlation_of(np.concatenate([own, own[:, order]], axis=1))
    for match in (match_zip, match_one_to_one):
        places = match(correlation)
        assert places[0].tolist() == list(range(12)) and places[1].tolist() == order.tolist()
        assert matched_correlation(correlation, places) == pytest.approx(1.0)
    assert matched_correlation(correlation, match_as_they_are(correlation)) < 0.5


@given(st.integers(0, 10**6), st.integers(1, 10))
@settings(max_examples=30, deadline=None)
def test_m_u_is_the_identity(seed, units):
    grouping = Grouping.of(match_zip(random_correlation(seed, units), 0.3, 0.5))
    eye = torch.eye(units, dtype=torch.float64)
    m = torch.cat([grouping.merged(eye, model, 0) for model in (0, 1)], dim=1)  # [n, 2n]
    u = torch.cat([grouping.unmerged(eye, model, 1) for model in (0, 1)], dim=0)  # [2n, n]
    assert torch.allclose(m @ u, eye, atol=1e-12) and set(u.unique().tolist()) <= {0.0, 1.0}
    assert torch.allclose(m, u.T / u.sum(0)[:, None], atol=1e-12)


def test_sums_are_the_products_with_both_matrices():
    """W* = Σ M W U, the matrices written out."""
    grouping, g = Grouping.of(match_zip(random_correlation(3, 6), 0.5, 1.0)), torch.Generator().manual_seed(0)
    assert not grouping.one_to_one
    eye = torch.eye(6, dtype=torch.float64)
    for model in (0, 1):
        weight = torch.randn(6, 6, 3, dtype=torch.float64, generator=g)
        m, u = grouping.merged(eye, model, 0), grouping.unmerged(eye, model, 1)
        found = grouping.unmerged(grouping.merged(weight, model, 0), model, 1)
        assert torch.allclose(found, torch.einsum("go,oik,iu->guk", m, weight, u), atol=1e-12)


def test_moments_are_numpys_correlation():
    found, moments = torch.from_numpy(states(30, 8, 4)), Moments()
    for part in found.split(7):
        moments.add(part[:, :4].float(), part[:, 4:].float())
    assert np.allclose(moments.correlation(), np.corrcoef(found.numpy().T), atol=1e-9)


def test_units_that_never_change():
    """They are like each other across models, and like nothing else."""
    found, moments = torch.from_numpy(states(30, 6, 4)), Moments()
    found[:, 1], found[:, 4] = 0.0, 2.0
    moments.add(found[:, :3], found[:, 3:])
    correlation = moments.correlation()
    assert correlation[1, 4] == correlation[4, 1] == 1.0
    assert np.abs(np.delete(correlation[1], 4)).max() == 0.0 and np.isfinite(correlation).all()
    assert match_zip(correlation)[1, 1] == 1
