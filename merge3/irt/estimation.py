"""Accuracy on all N items from the answers to n of them (MERGE³, Mencattini et al. 2025, section 3).

    mean      Σ w_i y_i
    p-irt     (Σ_S y + Σ_{not S} E σ(a_i · θ − b_i)) / N, θ from the answers on S
    mp-irt    the same with θ = Σ_j λ_j θ_j, a mixture of the endpoints' abilities
    gp-irt    c · mean + (1 − c) · p-irt
    gmp-irt   c · mean + (1 − c) · mp-irt

Abilities are maximum a posteriori. Their priors are learned from the calibration models: with one
dimension a mixture λ can reach any ability, so it is the prior that helps. The chance of an unseen item
is averaged over the Laplace posterior of θ (σ(η / sqrt(1 + π s² / 8)), MacKay 1992). c and the size of
the standard errors come from the calibration models, each left out in turn: its ability is estimated
without it in the prior, with items corrected for its absence by one Newton step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from merge3.irt.bank import ItemBank, sigmoid
from merge3.irt.extraction import Subset
from merge3.irt.responses import Responses, ResponsesError

METHODS = ("mean", "p-irt", "gp-irt", "mp-irt", "gmp-irt")
_CELLS = 4_000_000  # candidates x items at once


@dataclass(frozen=True, eq=False)
class Estimator:
    """What `estimate` needs beside the answers; made by `prepare`.

    basis [D, Q], centre [Q], precision [Q, Q]: θ = basis · x with the prior x ~ N(centre, precision⁻¹).
    share: c, the mean's part. scale: how much larger errors are than their formula says. note: what was
    assumed.
    """

    method: str
    bank: ItemBank
    subset: Subset
    basis: np.ndarray
    centre: np.ndarray
    precision: np.ndarray
    share: float = 0.0
    scale: float = 1.0
    note: str = ""


@dataclass(frozen=True, eq=False)
class Estimates:
    """value, stderr: [C]; theta: [C, D] abilities (NaN for `mean`)."""

    value: np.ndarray
    stderr: np.ndarray
    theta: np.ndarray


def prepare(
    bank: ItemBank,
    responses: Responses,
    subset: Subset,
    method: str = "gmp-irt",
    endpoints: tuple[str, ...] = (),
    share: float | None = None,
) -> Estimator:
    """Learn priors, the mean's share and the size of errors from the calibration.

    responses: the matrix the bank was fitted to. endpoints: names among its models (for mp-irt; without
    them every calibration model counts as one). share: fix c (the paper's library: 0.5) instead.
    """
    if method not in METHODS:
        raise ResponsesError("estimate", f"method {method!r}", ", ".join(METHODS))
    if responses.items != bank.items or responses.models != bank.models:
        raise ResponsesError("estimate", "another response matrix", "the one that the bank was fitted to")
    rows = [responses.models.index(m) for m in endpoints if m in responses.models]
    mixture, note = method in ("mp-irt", "gmp-irt"), ""
    if mixture and len(rows) < 2:
        mixture, note = False, "with fewer than two endpoints in the calibration, mp-irt is p-irt"
    basis, centre, precision = _prior(bank.theta, rows if mixture else [])
    estimator = Estimator(method, bank, subset, basis, centre, precision, note=note)
    return _calibrated(estimator, responses, rows if mixture else [], share)


def estimate(estimator: Estimator, answers: np.ndarray) -> Estimates:
    """Estimate many candidates at once. answers: [C, n] responses on the subset, NaN where missing.

    Raises ResponsesError for a candidate without any answer, or scores outside [0, 1].
    """
    y = np.atleast_2d(np.asarray(answers, float))
    n = len(estimator.subset.index)
    if y.shape[1] != n:
        raise ResponsesError("answers", f"{y.shape[1]} per candidate", f"{n}, one per item of the subset")
    answered = ~np.isnan(y)
    if (bad := (y < 0) | (y > 1)).any():
        c, i = np.argwhere(bad)[0]
        raise ResponsesError(
            f"answers: candidate {c}, item {estimator.bank.items[estimator.subset.index[i]]!r}",
            f"score {y[c, i]}",
            "a score in [0, 1]",
        )
    if not answered.any(1).all():
        raise ResponsesError(f"answers: candidate {int((~answered.any(1)).argmax())}", "none", "at least one")
    parts = _parts(estimator, y, answered)
    return _mixed(estimator, parts)


@dataclass
class _Parts:
    mean: np.ndarray
    mean_variance: np.ndarray
    model: np.ndarray | None = None
    model_variance: np.ndarray | None = None
    theta: np.ndarray | None = None


def _mixed(e: Estimator, p: _Parts) -> Estimates:
    if e.method == "mean":
        return Estimates(p.mean, e.scale * np.sqrt(p.mean_variance), np.full((len(p.mean), e.bank.dimensions), np.nan))
    c = e.share
    # Both parts rest on the same answers: their errors are taken as fully dependent.
    deviation = c * np.sqrt(p.mean_variance) + (1 - c) * np.sqrt(p.model_variance)
    return Estimates(c * p.mean + (1 - c) * p.model, e.scale * deviation, p.theta)


def _parts(e: Estimator, y: np.ndarray, answered: np.ndarray) -> _Parts:
    N, filled = len(e.bank.items), np.where(answered, y, 0.0)
    w = np.where(answered, e.subset.weights, 0.0)
    # Where only items of no weight were answered, they count alike.
    w = np.where(w.sum(1, keepdims=True) > 0, w, answered)
    w = w / w.sum(1, keepdims=True)
    mean, unseen = (w * filled).sum(1), 1 - answered.sum(1) / N
    # A share of 0 or 1 of few answers is no certainty: one success and one failure are added.
    k = answered.sum(1)
    p = (filled.sum(1) + 1) / (k + 2)
    parts = _Parts(mean, (w**2).sum(1) * p * (1 - p) * unseen)
    if e.method == "mean":
        return parts
    at = e.subset.index
    theta, covariance = ability(e, e.bank.a[at], e.bank.b[at], filled, answered)
    rest, rest_variance = _unseen(e.bank, theta, covariance, at, answered)
    parts.theta, parts.model = theta, (filled.sum(1) + rest) / N
    parts.model_variance = rest_variance / N**2
    return parts


def ability(e: Estimator, a, b, y, answered, steps: int = 25) -> tuple[np.ndarray, np.ndarray]:
    """Maximum a posteriori abilities [C, D] and their Laplace covariances [C, D, D], by Newton's method.

    a [n, D], b [n]: the items; y, answered: [C, n].
    """
    slope, Q = a @ e.basis, e.basis.shape[1]  # [n, Q]
    x = np.broadcast_to(e.centre, (len(y), Q)).copy()
    for _ in range(steps):
        p = sigmoid(x @ slope.T - b)
        weight = answered * p * (1 - p)
        gradient = (answered * (y - p)) @ slope - (x - e.centre) @ e.precision
        hessian = np.einsum("cn,nq,nr->cqr", weight, slope, slope, optimize=True) + e.precision
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        # A logistic posterior is concave but far from quadratic in its tails: long steps are cut.
        step *= np.minimum(1.0, 3.0 / np.maximum(np.linalg.norm(step @ e.basis.T, axis=1), 1e-12))[:, None]
        x += step
        if np.abs(step).max() < 1e-8:
            break
    return x @ e.basis.T, np.einsum("dq,cqr,er->cde", e.basis, np.linalg.inv(hessian), e.basis, optimize=True)


def _unseen(bank: ItemBank, theta, covariance, at, answered) -> tuple[np.ndarray, np.ndarray]:
    """Expected number of successes on the items not answered, and its variance: [C], [C]."""
    total, variance = np.empty(len(theta)), np.empty(len(theta))
    step = max(1, _CELLS // len(bank.items))
    for i in range(0, len(theta), step):
        own = slice(i, i + step)
        eta = theta[own] @ bank.a.T - bank.b
        spread = np.einsum("nd,cde,ne->cn", bank.a, covariance[own], bank.a, optimize=True)
        open_ = np.ones_like(eta)
        open_[:, at] -= answered[own]
        p = sigmoid(eta / np.sqrt(1 + np.pi / 8 * spread))
        v = open_ * p * (1 - p)
        total[own] = (open_ * p).sum(1)
        gradient = v @ bank.a
        variance[own] = np.einsum("cd,cde,ce->c", gradient, covariance[own], gradient) + v.sum(1)
    return total, variance


def _prior(theta: np.ndarray, rows: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(basis, centre, precision) from the calibration models' abilities; rows: the endpoints, for mp-irt."""
    D = theta.shape[1]
    if not rows:
        covariance = np.atleast_2d(np.cov(theta.T)) + 0.05 * np.eye(D)
        return np.eye(D), theta.mean(0), np.linalg.inv(covariance)
    basis, K = theta[rows].T, len(rows)  # [D, K]
    # Mixtures nearest to the even one that reach each calibration ability (ridge: endpoints may be alike).
    even = np.full(K, 1 / K)
    gap = theta - basis @ even
    mixtures = even + gap @ np.linalg.solve(basis @ basis.T + 1e-3 * np.eye(D), basis)
    covariance = np.atleast_2d(np.cov(mixtures.T)) + 0.05 * np.eye(K)
    return basis, mixtures.mean(0), np.linalg.inv(covariance)


def _calibrated(e: Estimator, responses: Responses, rows: list[int], share: float | None) -> Estimator:
    """share and scale from leaving out each calibration model in turn."""
    found = leave_one_out(e, responses, rows)
    truth, parts = found.truth, found.parts
    if e.method in ("mean", "p-irt", "mp-irt"):
        c = float(e.method == "mean")
    elif share is not None:
        c = float(share)
    else:
        # Least squares of c · mean + (1 − c) · model against the truth, held by two models at 1/2.
        difference = parts.mean - parts.model
        hold = 2 * (difference**2).mean() if len(difference) else 1.0
        c = (difference * (truth - parts.model)).sum() + 0.5 * hold
        c = float(np.clip(c / ((difference**2).sum() + hold), 0, 1)) if hold > 0 else 0.5
    mixed = replace(e, share=c)
    result = _mixed(mixed, parts)
    if not len(truth):
        return mixed
    ratio = ((result.value - truth) ** 2 - found.truth_variance) / np.maximum(result.stderr**2, 1e-12)
    # Held by eight models at 1, and not far below: a subset chosen by these very models suits them best.
    scale = np.sqrt(max(0.64, (ratio.sum() + 8) / (len(ratio) + 8)))
    return replace(mixed, scale=float(scale))


@dataclass
class _LeftOut:
    parts: _Parts
    truth: np.ndarray
    truth_variance: np.ndarray  # of the truth itself, where a model did not answer everything


def leave_one_out(e: Estimator, responses: Responses, rows: list[int]) -> _LeftOut:
    """The estimator's parts for each calibration model (not for an endpoint without which one is left).

    A model that did not answer the subset is asked as many of the items that it did answer.
    """
    bank, at, n = e.bank, e.subset.index, len(e.subset.index)
    parts, truths, variances = [], [], []
    rng = np.random.default_rng(0)
    for m in range(len(bank.models)):
        answered = responses.answered[m]
        asked, weights = at, e.subset.weights
        if not answered[at].all():
            own = np.flatnonzero(answered)
            if len(own) < 2 * n:
                continue
            asked, weights = np.sort(rng.permutation(own)[:n]), np.full(n, 1 / n)
        if m in rows and len(rows) <= 2:
            continue
        left = [r for r in range(len(bank.models)) if r != m]
        basis, centre, precision = _prior(bank.theta[left], [left.index(r) for r in rows if r != m])
        without = _without(bank, responses, m)
        one = replace(e, bank=without, subset=Subset(asked, weights), basis=basis, centre=centre, precision=precision)
        parts.append(_parts(one, responses.values[m : m + 1, asked], np.ones((1, n), bool)))
        known, N = int(answered.sum()), len(bank.items)
        p = responses.values[m][answered].mean()
        truths.append(p)
        variances.append(p * (1 - p) * (1 / known - 1 / N))
    names = ("mean", "mean_variance", "model", "model_variance", "theta")
    names = names[:2] if e.method == "mean" else names
    joined = {k: np.empty(0) for k in names}
    if parts:
        joined = {k: np.concatenate([getattr(p, k) for p in parts]) for k in names}
    return _LeftOut(_Parts(**joined), np.array(truths), np.array(variances))


def _without(bank: ItemBank, responses: Responses, m: int) -> ItemBank:
    """The bank as if model m had not answered: one Newton step of each item's posterior mode."""
    answered = responses.answered[m]
    y = np.nan_to_num(responses.values[m])
    p = sigmoid(bank.a @ bank.theta[m] - bank.b)
    direction = np.column_stack([np.broadcast_to(bank.theta[m], bank.a.shape), -np.ones(len(bank.b))])
    push = (answered * (y - p))[:, None] * direction  # m's part of the gradient, which the others' cancels
    step = -np.einsum("njk,nk->nj", bank.item_covariance, push)
    # Removing the model also widens the posterior (Sherman and Morrison).
    w = answered * p * (1 - p)
    reach = np.einsum("nj,njk,nk->n", direction, bank.item_covariance, direction)
    step /= np.maximum(1 - w * reach, 0.2)[:, None]
    a = bank.a + step[:, :-1]
    if bank.dimensions == 1:
        a = np.maximum(a, 0.05)
    return replace(bank, a=a, b=bank.b + step[:, -1])
