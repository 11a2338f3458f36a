"""Extraction and estimation: exact where all is known, better than the mean where it is not, every edge."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge3.irt import Responses
from merge3.irt import estimation as irt
from merge3.irt.bank import ItemBank, sigmoid
from merge3.irt.extraction import METHODS, Subset, extract
from merge3.irt.fitting import fit
from merge3.irt.responses import ResponsesError

ENDPOINTS = ("m0", "m1", "m2")


@pytest.fixture(scope="module")
def world():
    """30 calibration models, 200 others between the same endpoints, 400 items: (bank, responses, others, truth)."""
    g = np.random.default_rng(1)
    a, b = np.exp(g.normal(0, 0.5, 400)), g.normal(0, 1.2, 400)
    mixtures = g.dirichlet(np.ones(3), 227) @ [0.5, 0.9, 0.1]
    theta = np.concatenate([[0.5, 0.9, 0.1], mixtures + g.normal(0, 0.4, 227)])
    y = (g.random((230, 400)) < sigmoid(theta[:, None] * a - b)).astype(float)
    responses = Responses(tuple(f"m{i}" for i in range(30)), tuple(f"i{i}" for i in range(400)), y[:30])
    return fit(responses, steps=1200), responses, y[30:], y[30:].mean(1)


def bank_of(a, b, theta):
    n, m = len(b), len(theta)
    return ItemBank(
        tuple(f"i{i}" for i in range(n)),
        tuple(f"m{i}" for i in range(m)),
        np.asarray(a, float),
        np.asarray(b, float),
        np.asarray(theta, float),
        np.tile(0.01 * np.eye(np.shape(a)[1] + 1), (n, 1, 1)),
        np.tile(0.01 * np.eye(np.shape(a)[1]), (m, 1, 1)),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 20, 399, 400])
def test_a_subset_is_distinct_items_with_weights_that_sum_to_one(world, method, size):
    bank, responses, _, _ = world
    subset = extract(bank, responses, method, size, seed=3, endpoints=ENDPOINTS)
    assert len(set(subset.index)) == size and (np.diff(subset.index) > 0).all()
    assert abs(subset.weights.sum() - 1) < 1e-9 and (subset.weights >= 0).all()
    again = extract(bank, responses, method, size, seed=3, endpoints=ENDPOINTS)
    assert np.array_equal(subset.index, again.index) and np.array_equal(subset.weights, again.weights)


@pytest.mark.parametrize("method", ["irt", "correctness"])
def test_over_many_subsets_every_item_counts(world, method):
    bank, responses, _, truth = world
    subsets = [extract(bank, responses, method, 10, seed, anywhere=True) for seed in range(200)]
    central = [extract(bank, responses, method, 10, seed) for seed in range(200)]
    seen = lambda chosen: len(set(np.concatenate([s.index for s in chosen]).tolist()))
    assert seen(subsets) > 350 and seen(subsets) > 1.2 * seen(central)
    # Any item of a cluster, weighted by the cluster's share, gives the mean without bias.
    p = bank.probability(bank.theta[:1])[0]
    found = np.array([(s.weights * p[s.index]).sum() for s in subsets])
    assert abs(found.mean() - p.mean()) < 4 * found.std() / len(found) ** 0.5


@pytest.mark.parametrize("method", METHODS)
def test_extraction_survives_missing_and_constant_columns(world, method):
    bank, responses, _, _ = world
    values = responses.values.copy()
    values[:, :5], values[:, 5:10], values[:, 10:15] = np.nan, 1.0, 0.0
    subset = extract(bank, Responses(responses.models, responses.items, values), method, 12, endpoints=ENDPOINTS)
    assert len(subset.index) == 12 and np.isfinite(subset.weights).all()


@pytest.mark.parametrize("size,method", [(0, "irt"), (401, "irt"), (5, "best")])
def test_extraction_refuses_what_it_cannot_do(world, size, method):
    with pytest.raises(ResponsesError, match="extract"):
        extract(world[0], world[1], method, size)


@pytest.mark.parametrize("method", irt.METHODS)
def test_all_items_answered_is_the_exact_mean(world, method):
    bank, responses, others, truth = world
    subset = extract(bank, responses, "random", 400)
    found = irt.estimate(irt.prepare(bank, responses, subset, method, ENDPOINTS), others[:20])
    assert np.allclose(found.value, truth[:20], atol=1e-12) and (found.stderr < 1e-9).all()


@pytest.mark.parametrize("method", ["p-irt", "gp-irt", "mp-irt", "gmp-irt"])
def test_estimates_beat_the_mean_and_know_their_error(world, method):
    bank, responses, others, truth = world
    gains, covered = [], []
    for seed in range(5):
        subset = extract(bank, responses, "random", 20, seed)
        mean = irt.estimate(irt.prepare(bank, responses, subset, "mean"), others[:, subset.index])
        found = irt.estimate(irt.prepare(bank, responses, subset, method, ENDPOINTS), others[:, subset.index])
        gains.append(np.abs(mean.value - truth) - np.abs(found.value - truth))
        covered.append(np.abs(found.value - truth) < 2 * found.stderr)
    gains = np.concatenate(gains)
    assert gains.mean() > 3 * gains.std() / len(gains) ** 0.5
    assert 0.88 <= np.mean(covered) <= 0.995


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(1, 12), method=st.sampled_from(irt.METHODS))
def test_any_pattern_of_answers_gives_a_finite_estimate(world, data, n, method):
    bank, responses, _, _ = world
    subset = extract(bank, responses, "random", n, seed=n)
    scores = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1), st.just(float("nan")))
    row = np.array(data.draw(st.lists(scores, min_size=n, max_size=n)))
    if np.isnan(row).all():
        row[0] = 1.0
    found = irt.estimate(irt.prepare(bank, responses, subset, method, ENDPOINTS), row)
    assert np.isfinite(found.value).all() and (found.stderr >= 0).all()
    assert -1e-9 <= found.value[0] <= 1 + 1e-9


def test_estimates_are_vectorised_over_candidates(world):
    bank, responses, others, _ = world
    subset = extract(bank, responses, "irt", 20)
    estimator = irt.prepare(bank, responses, subset, "gmp-irt", ENDPOINTS)
    together = irt.estimate(estimator, others[:, subset.index])
    for c in (0, 7, 199):
        alone = irt.estimate(estimator, others[c, subset.index])
        assert np.allclose([alone.value[0], alone.stderr[0]], [together.value[c], together.stderr[c]], atol=1e-9)


def test_an_ability_is_where_the_posterior_peaks(world):
    from scipy.optimize import minimize

    bank, responses, others, _ = world
    subset = extract(bank, responses, "random", 15)
    estimator = irt.prepare(bank, responses, subset, "p-irt")
    y, a, b = others[0, subset.index], bank.a[subset.index, 0], bank.b[subset.index]

    def loss(x):
        p = sigmoid(a * x[0] - b)
        return (
            -(y * np.log(p) + (1 - y) * np.log1p(-p)).sum()
            + 0.5 * estimator.precision[0, 0] * (x[0] - estimator.centre[0]) ** 2
        )

    assert abs(minimize(loss, [0.0]).x[0] - irt.estimate(estimator, y).theta[0, 0]) < 1e-4


def test_one_endpoint_makes_mp_irt_p_irt_and_says_so(world):
    bank, responses, others, _ = world
    subset = extract(bank, responses, "random", 10)
    one = irt.prepare(bank, responses, subset, "mp-irt", ("m0",))
    assert "mp-irt is p-irt" in one.note
    plain = irt.prepare(bank, responses, subset, "p-irt")
    assert np.allclose(
        irt.estimate(one, others[:5, subset.index]).value, irt.estimate(plain, others[:5, subset.index]).value
    )


def test_mixtures_stay_between_the_endpoints_where_abilities_have_two_dimensions():
    g = np.random.default_rng(0)
    a, b = np.abs(g.normal(0.8, 0.3, (60, 2))), g.normal(0, 1, 60)
    theta = np.concatenate([[[2.0, -1.0], [-1.0, 2.0]], np.outer(np.linspace(0, 1, 10), [3, -3]) + [-1, 2]])
    bank = bank_of(a, b, theta)
    y = (g.random((12, 60)) < bank.probability(theta)).astype(float)
    responses = Responses(bank.models, bank.items, y)
    subset = extract(bank, responses, "random", 30)
    estimator = irt.prepare(bank, responses, subset, "mp-irt", ("m0", "m1"))
    found = irt.estimate(estimator, y[:, subset.index])
    # Mixtures of two endpoints lie near their line, whose sum of coordinates is 1: nearer than abilities
    # estimated without knowing the endpoints' line.
    away = lambda theta: np.abs(theta.sum(1) - 1)
    free = irt.estimate(
        replace(estimator, basis=np.eye(2), centre=np.array([0.5, 0.5]), precision=np.eye(2)), y[:, subset.index]
    )
    assert away(found.theta).max() < 0.7 and away(found.theta).mean() < 0.7 * away(free.theta).mean()


def test_endpoints_of_equal_ability_are_no_obstacle(world):
    bank, responses, others, _ = world
    same = ItemBank(
        bank.items,
        bank.models,
        bank.a,
        bank.b,
        np.concatenate([bank.theta[:1]] * 3 + [bank.theta[3:]]),
        bank.item_covariance,
        bank.theta_covariance,
    )
    subset = extract(same, responses, "random", 10)
    found = irt.estimate(irt.prepare(same, responses, subset, "gmp-irt", ENDPOINTS), others[:, subset.index])
    error = lambda value: np.abs(value - others.mean(1)).mean()
    assert error(found.value) < error(others[:, subset.index].mean(1))  # still better than the mean


def test_the_papers_share_can_be_fixed(world):
    bank, responses, others, _ = world
    subset = extract(bank, responses, "random", 10)
    half = irt.prepare(bank, responses, subset, "gp-irt", share=0.5)
    parts = [
        irt.estimate(irt.prepare(bank, responses, subset, m), others[:, subset.index]).value for m in ("mean", "p-irt")
    ]
    assert np.allclose(irt.estimate(half, others[:, subset.index]).value, (parts[0] + parts[1]) / 2)


def test_bad_answers_are_refused(world):
    bank, responses, _, _ = world
    estimator = irt.prepare(bank, responses, Subset(np.array([3, 9]), np.array([0.5, 0.5])), "p-irt")
    for answers, message in [
        ([[0.5, 1.5]], "candidate 0, item 'i9': score 1.5"),
        ([[1, 0], [np.nan, np.nan]], "candidate 1: none"),
        ([[1, 0, 1]], "3 per candidate; expected 2"),
    ]:
        with pytest.raises(ResponsesError, match=message):
            irt.estimate(estimator, answers)
    with pytest.raises(ResponsesError, match="method 'best'"):
        irt.prepare(bank, responses, Subset(np.array([0]), np.ones(1)), "best")
