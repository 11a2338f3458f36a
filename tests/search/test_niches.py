"""Who is chosen as an elite: M2N2's shared fitness and attraction on tables of answers with a known right choice."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge3.search.niches import complementary, item_weights, shared_fitness
from merge3.tasks import Item

RNG = np.random.default_rng(0)


def items(**counts):
    return [Item(f"{i}", task, "generate", "?", answer=("x",)) for task, count in counts.items() for i in range(count)]


def even(table):
    return np.full(table.shape[1], 1 / table.shape[1])


def test_by_hand():
    """Two share the first item, one has the second, nobody solves the third."""
    table = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert shared_fitness(table, np.ones(3)).tolist() == [1.5, 0.5]
    assert shared_fitness(table, np.ones(3), alpha=0.0).tolist() == [2.0, 1.0]  # nobody shares: accuracies
    assert np.allclose(shared_fitness(table, np.ones(3), alpha=2.0), [1.25, 0.25])
    first, second = complementary(table, np.ones(3), 1, 2)
    assert (first.index, first.gain, second.index, second.gain) == (1, 0.5, 0, 1.0)
    assert (first.together, second.together) == pytest.approx((1 / 3, 2 / 3))


def test_as_the_code_of_the_paper_has_it():
    """`update_archive` and `sample_parents` (SakanaAI/natural_niches), in plain loops."""
    table, alpha = RNG.random((5, 30)) * (RNG.random((5, 30)) > 0.4), 1.3
    z = [sum(row[i] for row in table) or 1.0 for i in range(30)]
    ours = shared_fitness(table, np.ones(30), alpha)
    assert np.allclose(ours, [sum(row[i] / z[i] ** alpha for i in range(30)) for row in table])
    attraction = lambda b, a: sum(max(0.0, (table[b][i] - table[a][i]) / z[i] ** alpha) for i in range(30))
    second = max((b for b in range(5) if b != 2), key=lambda b: attraction(b, 2))
    chosen = complementary(table, np.ones(30), 2, 2, alpha)
    assert chosen[1].index == second and chosen[1].gain == pytest.approx(attraction(second, 2))


def test_specialists_are_chosen_before_copies_of_the_best():
    """The best and ten that are nearly it, all better than either specialist: the second elite adds a task, the third
    what is still left, and no copy is taken while anybody adds more."""
    best = np.r_[np.ones(80), np.zeros(80)]
    copies = [np.where(RNG.random(160) < 0.01, 1 - best, best) for _ in range(10)]
    italian = np.r_[np.zeros(80), np.ones(50), np.zeros(30)]
    code = np.r_[np.zeros(130), np.ones(30)]
    table = np.array([best, *copies, italian, code])
    assert [one.index for one in complementary(table, even(table), 0, 3)] == [0, 11, 12]
    assert complementary(table, even(table), 0, 3)[2].together == pytest.approx(1.0)


def test_who_solves_what_nobody_else_does_comes_before_who_solves_as_much_of_what_many_do():
    common, rare = np.r_[np.zeros(10), np.ones(10), np.zeros(10)], np.r_[np.zeros(20), np.ones(10)]
    best = np.r_[np.ones(10), np.zeros(20)]
    table = np.array([best, common, common, common, rare])
    assert [one.index for one in complementary(table, even(table), 0, 2)] == [0, 4]
    assert [one.index for one in complementary(table, even(table), 0, 2, alpha=0.0)] == [0, 1]  # as many: the earlier


def test_where_nobody_adds_anything_the_fittest_follow_and_of_equals_the_earlier():
    table = np.array([[1.0, 1, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]])
    assert [one.index for one in complementary(table, even(table), 0, 9)] == [0, 2, 3, 1]
    assert [one.gain for one in complementary(table, even(table), 0, 9)[1:]] == [0, 0, 0]


def test_every_task_counts_as_the_search_counts_it():
    weights = item_weights(items(math=30, italian=10), {"italian": 3.0})
    assert weights.sum() == pytest.approx(1) and weights[:30].sum() == pytest.approx(0.25)
    best = np.r_[np.ones(10), np.zeros(30)]
    math, italian = np.r_[np.zeros(10), np.ones(20), np.zeros(10)], np.r_[np.zeros(30), np.ones(5), np.zeros(5)]
    table = np.array([best, math, italian])
    assert complementary(table, weights, 0, 2)[1].index == 2  # 5 of 10 items that count 3 against 20 of 30 that count 1


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 12), st.integers(1, 40), st.integers(0, 2**31), st.floats(0.0, 2.0))
def test_properties(candidates, count, seed, alpha):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 2, (candidates, count)).astype(float)
    chosen = complementary(table, even(table), int(rng.integers(candidates)), candidates, alpha)
    assert sorted(one.index for one in chosen) == list(range(candidates))
    together = [one.together for one in chosen]
    assert together == sorted(together) and together[-1] == pytest.approx(table.max(axis=0).mean())
    gains = [one.gain for one in chosen[1:]]  # submodular: greedy gains never grow
    assert all(a >= b - 1e-9 for a, b in pairwise(gains))
    assert chosen[0].gain == pytest.approx(chosen[0].shared)
    order = rng.permutation(count)  # which item is which does not matter
    assert np.allclose(shared_fitness(table[:, order], even(table), alpha), shared_fitness(table, even(table), alpha))


def test_a_table_with_gaps_estimates_the_full_ones_fitness():
    """Eight generations of eight, each asked 60 of 400 items: estimates are within a tenth of the full table's on
    average, and a short list by them has most of the right ones."""
    ability = np.linspace(0.3, 0.7, 64)
    table = (RNG.random((64, 400)) < ability[:, None]).astype(float)[RNG.permutation(64)]
    truth = shared_fitness(table, even(table))
    found = []
    for _ in range(100):
        part = np.full(table.shape, np.nan)
        for generation in range(8):
            asked = RNG.permutation(400)[:60]
            part[8 * generation : 8 * generation + 8, asked] = table[8 * generation : 8 * generation + 8, asked]
        found.append(shared_fitness(part, even(table)))
    found = np.array(found)
    assert np.abs(found.mean(axis=0) / truth - 1).mean() < 0.1
    top = {*np.argsort(-truth)[:16]}
    assert np.mean([len({*np.argsort(-row)[:16]} & top) for row in found]) > 8  # by chance 4


def test_rows_without_answers_and_items_that_nobody_was_asked():
    table = np.array([[1.0, np.nan, np.nan], [np.nan, np.nan, np.nan], [0.0, 1.0, np.nan]])
    found = shared_fitness(table, np.full(3, 1 / 3))
    assert found[1] == 0 and np.isfinite(found).all() and found[0] > 0
