"""Fronts as numbers: dominance, crowding, hypervolume, the knee."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from merge3.search.pareto import best_first, crowding, dominates, hypervolume, knee, ranks, spread_out

POINTS = st.integers(2, 4).flatmap(
    lambda m: arrays(np.float64, st.tuples(st.integers(1, 9), st.just(m)), elements=st.integers(0, 6).map(float))
)


def dominated_by(a, b):
    """Whether b dominates a, from its definition."""
    return all(y >= x for x, y in zip(a, b)) and any(y > x for x, y in zip(a, b))


@given(POINTS)
@settings(max_examples=100, deadline=None)
def test_ranks_peel_front_after_front(values):
    found, left = ranks(values), set(range(len(values)))
    for rank in range(found.max() + 1):
        front = {i for i in left if not any(dominated_by(values[i], values[j]) for j in left)}
        assert front and front == set(np.flatnonzero(found == rank))
        left -= front
    assert not left
    over = dominates(values)
    assert all(over[i, j] == dominated_by(values[j], values[i]) for i in range(len(values)) for j in range(len(values)))


@given(POINTS)
@settings(max_examples=100, deadline=None)
def test_hypervolume_is_the_number_of_cells_covered(values):
    """Of points on a grid: cells between the reference and a point."""
    m = values.shape[1]
    cells = np.stack(np.meshgrid(*[np.arange(6.0)] * m, indexing="ij"), -1).reshape(-1, m)
    covered = (values[None] >= cells[:, None] + 1).all(-1).any(1)
    assert hypervolume(values, np.zeros(m)) == covered.sum()
    assert hypervolume(values, np.full(m, 6.0)) == 0.0


@pytest.mark.parametrize("m", [2, 3, 4])
def test_hypervolume_is_the_reference_implementations(m):
    moocore = pytest.importorskip("moocore")
    for seed in range(5):
        g = np.random.default_rng(seed)
        values, reference = g.normal(size=(12, m)), g.normal(size=m) - 1
        assert hypervolume(values, reference) == pytest.approx(moocore.hypervolume(-values, ref=-reference), rel=1e-12)


def test_what_is_spread_out_keeps_the_ends_and_no_crowd():
    line = np.linspace(0, 1, 11)
    crowd = 0.5 + np.linspace(-0.01, 0.01, 20)
    values = np.concatenate([line, crowd])
    points = np.stack([values, 1 - values], 1)
    kept = points[spread_out(points, 6), 0]
    assert len(kept) == 6 and {0.0, 1.0} <= set(kept) and np.diff(np.sort(kept)).max() < 0.35
    assert list(spread_out(points, 99)) == list(range(31))
    assert np.isinf(crowding(points)[[0, 10]]).all() and np.isfinite(crowding(points)[1:10]).all()


def test_best_first_goes_by_rank_then_by_room():
    values = np.array([[0, 0], [0, 4], [2, 2], [2.1, 1.9], [4, 0], [3, 0.2]])
    found = list(best_first(values))
    assert set(found[:2]) == {1, 4} and found[-1] == 0


def test_the_knee_gives_up_least_in_the_fronts_own_units():
    values = np.array([[0.0, 100.0], [0.8, 90.0], [0.9, 20.0], [1.0, 0.0]])
    assert knee(values) == 1 and knee(values * [1000, 0.01]) == 1 and knee(values[:1]) == 0
