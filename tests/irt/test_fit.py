"""Parameter recovery, calibrated posteriors, banks on disk, and what cannot be fitted."""

import json

import numpy as np
import pytest

from merge3.irt import ItemBank, Responses
from merge3.irt.bank import sigmoid
from merge3.irt.diagnostics import fit_statistics, information, plot
from merge3.irt.fitting import fit
from merge3.irt.responses import ResponsesError


def simulate(models, items, dimensions=1, seed=0, missing=0.0):
    g = np.random.default_rng(seed)
    theta = g.normal(size=(models, dimensions))
    a = np.exp(g.normal(0, 0.4, (items, 1))) if dimensions == 1 else g.normal(0.7, 0.8, (items, dimensions))
    b = g.normal(0, 1, items)
    y = (g.random((models, items)) < sigmoid(theta @ a.T - b)).astype(float)
    y[g.random(y.shape) < missing] = np.nan
    return theta, a, b, named(y)


def named(y):
    return Responses(
        tuple(f"m{i}" for i in range(y.shape[0])), tuple(f"t/i{i}" for i in range(y.shape[1])), np.asarray(y, float)
    )


def correlation(x, y):
    return np.corrcoef(np.ravel(x), np.ravel(y))[0, 1]


@pytest.mark.parametrize("models,ability,difficulty,discrimination", [(60, 0.99, 0.94, 0.6), (200, 0.99, 0.98, 0.85)])
def test_parameters_are_recovered(models, ability, difficulty, discrimination):
    theta, a, b, responses = simulate(models, 1000)
    bank = fit(responses)
    assert correlation(bank.theta, theta) > ability
    assert correlation(bank.b, b) > difficulty
    assert correlation(np.log(bank.a), np.log(a)) > discrimination
    assert (bank.a > 0).all()


def test_intervals_cover_what_they_say():
    # All abilities of a fit share its zero and its unit, so one matrix says little: several are pooled.
    inside = {"theta": [], "b": []}
    for seed in range(6):
        theta, _, b, responses = simulate(60, 300, seed=10 + seed)
        bank = fit(responses, seed=seed, steps=1500)
        inside["theta"].append(np.abs(bank.theta - theta) < 1.645 * bank.theta_sd)
        inside["b"].append(np.abs(bank.b - b) < 1.645 * bank.b_sd)
    for name, found in inside.items():
        assert 0.83 <= np.mean(found) <= 0.96, (name, np.mean(found))


def test_two_dimensions_are_recovered_up_to_rotation():
    theta, _, _, responses = simulate(120, 600, dimensions=2, seed=3)
    bank = fit(responses, dimensions=2)
    x, y = (np.linalg.qr(v - v.mean(0))[0] for v in (bank.theta, theta))
    assert np.linalg.svd(x.T @ y)[1].min() > 0.9  # the smaller canonical correlation
    p = bank.probability(bank.theta)
    assert abs(p.mean() - responses.values.mean()) < 0.01


def test_missing_answers_and_scores_between_0_and_1():
    theta, _, b, responses = simulate(80, 400, missing=0.5, seed=5)
    bank = fit(responses, steps=1200)
    assert correlation(bank.theta, theta) > 0.97 and correlation(bank.b, b) > 0.9
    graded = named(np.where(responses.answered, 0.1 + 0.8 * np.nan_to_num(responses.values), np.nan))
    assert correlation(fit(graded, steps=1200).theta, theta) > 0.97


def test_items_that_everybody_or_nobody_solves_stay_finite():
    _, _, _, responses = simulate(30, 60, seed=2)
    y = responses.values.copy()
    y[:, 0], y[:, 1], y[0], y[1] = 1.0, 0.0, 1.0, 0.0
    bank = fit(named(y), steps=800)
    assert all(np.isfinite(v).all() for v in (bank.a, bank.b, bank.theta, bank.b_sd, bank.theta_sd))
    assert bank.b[0] < np.median(bank.b) < bank.b[1]
    assert bank.theta[0] > np.median(bank.theta) > bank.theta[1]


def test_one_parameter_model_has_one_discrimination():
    _, _, b, responses = simulate(60, 200)
    bank = fit(responses, kind="1pl", steps=1000)
    assert np.ptp(bank.a) < 1e-9 and correlation(bank.b, b) > 0.85


def test_a_seed_gives_the_same_fit_and_leaves_other_generators_alone():
    import torch

    _, _, _, responses = simulate(20, 50)
    torch.manual_seed(5)
    first = fit(responses, steps=300)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    second = fit(responses, steps=300)
    assert np.array_equal(first.b, second.b)
    two = [fit(responses, dimensions=2, seed=seed).a for seed in (0, 0, 1)]  # one dimension draws nothing
    assert np.array_equal(two[0], two[1]) and not np.array_equal(two[0], two[2])


def test_the_three_steps_are_callables_of_the_package():
    from merge3 import irt

    _, _, _, responses = simulate(20, 60)
    bank = irt.fit(responses)
    subset = irt.extract(bank, responses, "irt", 10)
    found = irt.estimate(irt.prepare(bank, responses, subset), responses.values[:3, subset.index])
    assert found.value.shape == (3,) and ((found.value >= 0) & (found.value <= 1)).all()


BAD = {
    "constant": (np.ones((5, 4)), {}, "every answer is 1"),
    "few models": (np.eye(2), {}, "2 models for 1 dimension"),
    "dimensions": (np.eye(9), {"dimensions": 2}, "9 models for 2 dimension.*expected at least 10"),
    "silent model": (
        np.where(np.eye(4) == 1, np.nan, np.tri(4)) * [[1], [1], [np.nan], [1]],
        {},
        "model 'm2': no answers",
    ),
    "kind": (np.eye(4), {"kind": "3pl"}, "kind: '3pl'; expected 2pl or 1pl"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_fitted_is_refused(case):
    values, options, message = BAD[case]
    with pytest.raises(ResponsesError, match=message):
        fit(named(values), **options)


def test_a_bank_survives_the_disk_and_damage_is_named(tmp_path):
    _, _, _, responses = simulate(12, 30)
    bank = fit(responses, steps=200)
    bank.save(tmp_path)
    again = ItemBank.load(tmp_path)
    assert again.items == bank.items and again.models == bank.models and again.meta == bank.meta
    assert np.array_equal(again.a, bank.a) and np.array_equal(again.item_covariance, bank.item_covariance)
    with pytest.raises(ResponsesError, match="other.json"):
        ItemBank.load(tmp_path, "other")
    described = json.loads((tmp_path / "bank.json").read_text())
    (tmp_path / "bank.json").write_text(json.dumps(described | {"items": described["items"][1:]}))
    with pytest.raises(ResponsesError, match=r"a of shape \(30, 1\); expected \(29, 1\)"):
        ItemBank.load(tmp_path)
    (tmp_path / "bank.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ResponsesError, match=r"bank\.json"):
        ItemBank.load(tmp_path)


def test_diagnostics_find_the_item_that_does_not_fit(tmp_path):
    _, _, _, responses = simulate(150, 80, seed=4)
    y = responses.values.copy()
    y[:, 7] = 1 - (np.nan_to_num(y).mean(1) > np.median(np.nan_to_num(y).mean(1)))  # the able fail it
    bank = fit(named(y), steps=1000)
    statistics = fit_statistics(bank, named(y))
    assert statistics.item_outfit.argmax() == 7 and abs(np.median(statistics.item_infit) - 1) < 0.1
    curve = information(bank, np.array([[-8.0], [0.0], [8.0]]))
    assert curve[1] > curve[0] and curve[1] > curve[2]
    plot(bank, named(y), tmp_path / "d.png", "t")
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
