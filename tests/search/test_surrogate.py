"""The surrogate sees through noise that hides the differences between candidates."""

import numpy as np
import pytest
from scipy.optimize import check_grad

from merge3.search import optimizers
from merge3.search.surrogate import Surrogate

LOW, HIGH = np.full(8, -0.5), np.full(8, 1.5)


def truth(x):
    """Four genes matter, each with a best value of its own; four do not."""
    return 0.7 - 0.15 * ((x[:, :4] - [0.9, 0.6, 0.3, 0.1]) ** 2).sum(1)


def generations(seed, count=15, noise=0.1, offset=0.05):
    """(genomes, noisy values, stderrs) of generations around the middle, all easier or harder by an offset."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        x = np.clip(0.5 + 0.25 * rng.normal(size=(20, 8)), LOW, HIGH)
        yield x, truth(x) + noise * rng.normal(size=20) + offset * rng.normal(), np.full(20, noise)


def fitted(seed, **changes):
    surrogate = Surrogate(LOW, HIGH, 0.125)
    for genomes, values, stderrs in generations(seed, **changes):
        surrogate.add(genomes, values, stderrs)
    return surrogate


def test_its_gradient_is_right():
    surrogate = fitted(0, count=3)
    at = surrogate._prior + 0.3 * np.random.default_rng(1).normal(size=len(surrogate._prior))
    error = check_grad(lambda p: surrogate._loss(p)[0], lambda p: surrogate._loss(p)[1], at)
    assert error < 1e-4 * np.linalg.norm(surrogate._loss(at)[1])


def test_a_candidate_never_asked_is_ranked_better_than_its_own_answers_would():
    predicted, own, covered = [], [], []
    for seed in range(5):
        surrogate = fitted(seed)
        genomes, values, _ = next(iter(generations(100 + seed)))
        value, stderr = surrogate.predict(genomes)
        predicted.append(np.corrcoef(value, truth(genomes))[0, 1])
        own.append(np.corrcoef(values, truth(genomes))[0, 1])
        error = value - truth(genomes)
        covered.append(np.abs(error - error.mean()) < 2 * stderr)  # the level is the items'
    assert np.mean(predicted) > np.mean(own) + 0.1
    assert 0.9 <= np.mean(covered) <= 1


def test_what_a_generation_has_in_common_does_not_count():
    even, uneven = fitted(3, offset=0.0), fitted(3, offset=0.3)
    at = next(iter(generations(4)))[0]
    assert np.corrcoef(even.predict(at)[0], uneven.predict(at)[0])[0, 1] > 0.95


def test_genes_that_do_not_matter_get_long_lengths():
    lengths = fitted(5, count=25)._at[:8]
    assert lengths[4:].min() > lengths[:4].max()


@pytest.mark.parametrize("bounds", [(LOW, HIGH), (np.full(8, -np.inf), np.full(8, np.inf))])
def test_failed_candidates_and_open_bounds_are_no_obstacle(bounds):
    surrogate = Surrogate(*bounds, 0.125)
    for genomes, values, stderrs in generations(6, count=3):
        values[::4] = np.nan
        surrogate.add(genomes, values, stderrs)
    surrogate.add(genomes, np.full(20, 0.5), np.zeros(20))  # estimates without error, all alike
    value, stderr = surrogate.predict(genomes)
    assert np.isfinite(value).all() and (stderr > 0).all()
    assert np.ptp(value) < 0.01  # they were alike, without error


def test_answers_that_are_all_alike_are_not_taken_for_certain():
    """Every one of a lucky candidate's few answers was right: its plug-in standard error is 0."""

    def believed(stderr):
        surrogate = fitted(7)
        genomes, values, stderrs = next(iter(generations(8)))
        values[0], stderrs[0] = values.max() + 0.1, stderr
        surrogate.add(genomes, values, stderrs)
        return surrogate.predict(genomes[:1])[0][0], values[0]

    (sure, value), (unsure, _) = believed(0.0), believed(0.05)
    assert sure == unsure < value - 0.1


@pytest.mark.parametrize("spread", [0.0, 1e-9, 1e6])
def test_estimates_that_say_nothing_or_nonsense_end_no_run(spread):
    surrogate, rng = Surrogate(LOW, HIGH, 0.125), np.random.default_rng(0)
    for _ in range(6):
        genomes = np.tile(rng.normal(size=(5, 8)), (4, 1))  # every candidate four times
        surrogate.add(genomes, spread * rng.normal(size=20), np.zeros(20))
    value, stderr = surrogate.predict(genomes)
    assert np.isfinite(value).all() and (stderr >= 0).all() and np.isfinite(stderr).all()
    np.testing.assert_array_equal(value[:5], value[5:10])  # the same genome, the same belief


@pytest.mark.heavy
def test_assisted_cma_gets_further_than_plain_cma_on_the_same_noisy_answers():
    def reached(assisted, seed):
        rng = np.random.default_rng(seed)
        optimizer = optimizers.make("cma", np.zeros(8), LOW, HIGH, 0.1, 12, seed, assisted)
        for _ in range(30):
            genomes = optimizer.ask()
            assert len(genomes) == 12
            values = truth(np.array(genomes)) + 0.3 * rng.normal(size=12) + 0.05 * rng.normal()
            optimizer.tell(genomes, values.tolist(), [0.3] * 12)
        return truth(optimizer.favorite()[None])[0]

    gain = [reached(True, seed) - reached(False, seed) for seed in range(12)]
    assert np.mean(gain) > 0
