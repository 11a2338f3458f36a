"""Fit item response models with Pyro: variational inference for the means, Laplace for the spread.

P(y = 1) = σ(a_i · θ_m − b_i). Priors: θ ~ N(0, I); log a ~ N(μ_a, s_a) for one dimension (positive, so
that the sign of θ is identified) and a ~ N(μ_a, s_a) for several; b ~ N(μ_b, s_b). The μ and s are
fitted too. The one-parameter model has one discrimination for all items.

A mean-field guide finds the means but not the spread: all abilities of a fit share the uncertainty of
where zero is and how long one unit is, and 90 % intervals cover 70 to 82 % of them. So the covariances
come from the joint Fisher information of abilities, items and μ, in which the items are eliminated block
by block (`_covariances`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from merge3.irt.bank import ItemBank, sigmoid
from merge3.irt.responses import Responses, ResponsesError

KINDS = ("2pl", "1pl")
_CELLS = 120_000  # answers per step: larger matrices are sampled by items


def fit(
    responses: Responses,
    dimensions: int = 1,
    kind: str = "2pl",
    steps: int = 2000,
    seed: int = 0,
    device: str = "cpu",
    tolerance: float = 2e-4,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> ItemBank:
    """Fit a bank to a response matrix; scores between 0 and 1 count as that share of a success.

    steps: at most; stops when the loss per answer improves by less than `tolerance` in 200 steps.
    progress(step, steps, loss per answer) is called every 50. Raises ResponsesError where the matrix
    cannot identify the model: too few models for the dimensions, or every answer the same.
    """
    _check(responses, dimensions, kind)
    means = _variational(responses, dimensions, kind, steps, seed, device, tolerance, progress)
    theta, a, b = _standardised(means["theta"], means["theta_scale"], means["a"], means["b"])
    if dimensions > 1:
        theta, a = _aligned(theta, a)
    theta_covariance, item_covariance = _covariances(responses, theta, a, b, means, kind)
    meta = {
        "kind": kind, "dimensions": dimensions, "steps": means["steps"], "seed": seed, "loss": means["loss"],
        "answers": int(responses.answered.sum()), "s_a": means["s_a"].tolist(), "s_b": float(means["s_b"]),
    }  # fmt: skip
    return ItemBank(responses.items, responses.models, a, b, theta, item_covariance, theta_covariance, meta)


def _check(responses: Responses, dimensions: int, kind: str) -> None:
    if kind not in KINDS:
        raise ResponsesError("kind", f"{kind!r}", " or ".join(KINDS))
    if dimensions < 1 or (kind == "1pl" and dimensions > 1):
        raise ResponsesError("dimensions", f"{dimensions}", "1 for a 1pl model, at least 1 for a 2pl")
    models, answered = len(responses.models), responses.answered
    needed = 3 if dimensions == 1 else 5 * dimensions
    if models < needed:
        raise ResponsesError(
            "calibration", f"{models} models for {dimensions} dimension(s)", f"at least {needed}",
            "calibrate with more random merges" if dimensions == 1 else "use fewer dimensions, or more calibration merges",
        )  # fmt: skip
    for m, name in enumerate(responses.models):
        if not answered[m].any():
            raise ResponsesError(f"model {name!r}", "no answers", "at least one")
    known = responses.values[answered]
    if known.min() == known.max():
        raise ResponsesError("calibration", f"every answer is {known[0]:g}", "items that some models solve and others do not")


def _start(responses: Responses) -> tuple[np.ndarray, np.ndarray]:
    """Ability and difficulty from shares of solved items, standardised as the prior is."""
    y, answered = np.nan_to_num(responses.values), responses.answered
    logit = lambda solved, asked: np.log((solved + 1.0) / (asked - solved + 1.0))
    ability = logit(y.sum(1), answered.sum(1))
    spread = ability.std() or 1.0
    easy = logit(y.sum(0), answered.sum(0))
    return (ability - ability.mean()) / spread, -easy


def _variational(responses, dimensions, kind, steps, seed, device, tolerance, progress) -> dict[str, Any]:
    import pyro
    import torch
    from pyro import distributions as dist
    from pyro.infer import SVI, TraceMeanField_ELBO
    from pyro.optim import ClippedAdam

    answered = torch.as_tensor(responses.answered, device=device)
    y = torch.as_tensor(np.nan_to_num(responses.values), dtype=torch.float32, device=device)
    M, N, D = *y.shape, dimensions
    one = kind == "1pl"
    batch = min(N, max(64, _CELLS // M))
    ability, difficulty = _start(responses)
    positive = dist.constraints.positive

    def apart(count):
        """Where all dimensions start alike, none would become another than the first."""
        return 0.3 * torch.randn(count, D, device=device, generator=generator) if D > 1 else torch.zeros(count, D, device=device)

    def model(index):
        s_a, s_b = (pyro.sample(n, dist.LogNormal(-0.7, 0.5).expand([d]).to_event(1)) for n, d in (("s_a", D), ("s_b", 1)))
        mu_a = pyro.sample("mu_a", dist.Normal(torch.zeros(D, device=device), 1.0).to_event(1))
        mu_b = pyro.sample("mu_b", dist.Normal(torch.zeros(1, device=device), 3.0).to_event(1))
        with pyro.plate("models", M):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(D, device=device), 1.0).to_event(1))
        with pyro.plate("items", N, subsample=index):
            z = mu_a.expand(len(index), D) if one else pyro.sample("z", dist.Normal(mu_a, s_a).to_event(1))
            b = pyro.sample("b", dist.Normal(mu_b.squeeze(-1), 3.0 * s_b.squeeze(-1)))
            a = z.exp() if D == 1 else z
            logits = a @ theta.T - b[:, None]
            # Soft targets: a score is that share of a success.
            score = dist.Bernoulli(logits=logits, validate_args=False).mask(answered[:, index].T)
            pyro.sample("y", score.to_event(1), obs=y[:, index].T)

    def guide(index):
        for name, size, value in (("s_a", D, 0.4), ("s_b", 1, 0.4), ("mu_a", D, 0.0 if D == 1 else 0.7), ("mu_b", 1, 0.0)):
            constraint = positive if name.startswith("s_") else dist.constraints.real
            point = pyro.param(name + "_at", torch.full((size,), value, device=device), constraint=constraint)
            pyro.sample(name, dist.Delta(point).to_event(1))
        loc = pyro.param("theta_loc", lambda: torch.as_tensor(ability, dtype=torch.float32, device=device)[:, None] + apart(M))
        scale = pyro.param("theta_scale", lambda: torch.full((M, D), 0.2, device=device), constraint=positive)
        with pyro.plate("models", M):
            pyro.sample("theta", dist.Normal(loc, scale).to_event(1))
        z_loc = pyro.param("z_loc", lambda: apart(N) + (0.0 if D == 1 else 0.7))
        z_scale = pyro.param("z_scale", lambda: torch.full((N, D), 0.2, device=device), constraint=positive)
        b_loc = pyro.param("b_loc", lambda: torch.as_tensor(difficulty, dtype=torch.float32, device=device))
        b_scale = pyro.param("b_scale", lambda: torch.full((N,), 0.3, device=device), constraint=positive)
        with pyro.plate("items", N, subsample=index):
            if not one:
                pyro.sample("z", dist.Normal(z_loc[index], z_scale[index]).to_event(1))
            pyro.sample("b", dist.Normal(b_loc[index], b_scale[index]))

    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.manual_seed(seed)  # all that Pyro draws from here
        optimizer = ClippedAdam({"lr": 0.1, "lrd": 0.03 ** (1 / steps)})
        svi = SVI(model, guide, optimizer, TraceMeanField_ELBO())
        total, losses, taken = float(answered.sum()), [], 0
        everything = torch.arange(N, device=device)
        for taken in range(1, steps + 1):
            if batch < N:
                index = torch.randperm(N, device=device, generator=generator)[:batch]
            else:
                index = everything
            losses.append(svi.step(index) / total)
            if taken % 50 == 0:
                progress(taken, steps, losses[-1])
            if taken % 50 or taken < max(400, steps // 4):
                continue
            if np.mean(losses[-400:-200]) - np.mean(losses[-200:]) < tolerance:
                break
        found = {k: pyro.param(k).detach().cpu().double().numpy() for k in
                 ("theta_loc", "theta_scale", "z_loc", "b_loc", "s_a_at", "s_b_at", "mu_a_at", "mu_b_at")}  # fmt: skip
    z = np.broadcast_to(found["mu_a_at"], (N, D)) if one else found["z_loc"]
    return {
        "theta": found["theta_loc"], "theta_scale": found["theta_scale"], "a": np.exp(z) if D == 1 else np.array(z), "b": found["b_loc"],
        "s_a": found["s_a_at"], "s_b": 3.0 * found["s_b_at"][0], "steps": taken, "loss": float(np.mean(losses[-50:])),
    }  # fmt: skip


def _standardised(theta, scale, a, b) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Abilities with mean 0 and second moment 1, as their prior has. Moving them and the items together
    changes no prediction, so descent along that direction is slow; this is where it ends."""
    mean = theta.mean(0)
    centred = theta - mean
    root = np.linalg.cholesky(centred.T @ centred / len(theta) + np.diag((scale**2).mean(0)))
    return np.linalg.solve(root, centred.T).T, a @ root, b - a @ mean


def _aligned(theta: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotate to principal axes of the discriminations, each pointing to more successes: several
    dimensions are identified up to rotation only, and this one is the same from fit to fit."""
    _, _, axes = np.linalg.svd(a, full_matrices=False)
    signs = np.where((a @ axes.T).sum(0) < 0, -1.0, 1.0)
    axes = axes * signs[:, None]
    return theta @ axes.T, a @ axes.T


def _covariances(responses, theta, a, b, means, kind) -> tuple[np.ndarray, np.ndarray]:
    """Posterior covariances [M, D, D] of abilities and [N, D + 1, D + 1] of (a, b): the inverse of the
    joint Fisher information of θ, (a, b) of every item, and their prior means (Laplace).

    Items are independent given the rest, so their blocks are eliminated first (Schur complement); what
    remains has M D + D + 1 rows.
    """
    (M, D), N = theta.shape, len(b)
    w = responses.answered * (p := sigmoid(theta @ a.T - b)) * (1 - p)  # [M, N]
    # d η / d (z, b): one dimension is fitted as log a, and a 1pl model has one z, which is its prior's mean.
    slope = theta[:, None, :] * (a[None] if D == 1 else 1.0)  # [M, N, D]
    jacobian = np.concatenate([np.broadcast_to(slope, (M, N, D)), -np.ones((M, N, 1))], 2)
    s_a = np.full(D, 1e-4) if kind == "1pl" else means["s_a"]
    precision = np.diag(np.append(1 / s_a**2, 1 / means["s_b"] ** 2))
    H_items = precision + np.einsum("mn,mnj,mnk->njk", w, jacobian, jacobian)
    G = M * D + D + 1
    H_cross = np.zeros((N, G, D + 1))
    H_cross[:, : M * D] = np.einsum("mn,nd,mnj->nmdj", w, a, jacobian).reshape(N, M * D, D + 1)
    H_cross[:, M * D :] = -precision
    H = np.zeros((G, G))
    H_theta = np.eye(D) + np.einsum("mn,nd,ne->mde", w, a, a)
    for m in range(M):
        H[m * D : m * D + D, m * D : m * D + D] = H_theta[m]
    H[M * D :, M * D :] = N * precision + np.diag([*np.ones(D), 1 / 9])
    gain = np.linalg.solve(H_items, H_cross.transpose(0, 2, 1))  # [N, D + 1, G]
    H -= np.tensordot(H_cross, gain, axes=([0, 2], [0, 1]))
    covariance = np.linalg.inv(H)
    items = np.linalg.inv(H_items) + np.einsum("njg,gh,nkh->njk", gain, covariance, gain, optimize=True)
    if D == 1:  # from log a to a
        items[:, 0, :] *= a
        items[:, :, 0] *= a
    return np.stack([covariance[m * D : m * D + D, m * D : m * D + D] for m in range(M)]), items
