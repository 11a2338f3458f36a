"""Posterior covariances of a fitted bank (Laplace): how far abilities and items may be from where they are.

The joint Fisher information of θ, (z_i, b_i) of every item and their prior means μ is inverted, where
z = log a for one dimension and z = a for several. Items are independent given the rest, so their blocks
of D + 1 rows are eliminated first (Schur complement); what remains has M·D + D + 1 rows. Every sum over
models or items is a matrix product, and items are taken in groups, so that memory stays near 8 MB
however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from merge3.irt.bank import sigmoid

_NUMBERS = 1_000_000  # float64 in the largest temporary


def covariances(
    answered: np.ndarray, theta: np.ndarray, a: np.ndarray, b: np.ndarray, prior_a: np.ndarray, prior_b: float
) -> tuple[np.ndarray, np.ndarray]:
    """Covariances [M, D, D] of abilities and [N, D + 1, D + 1] of (a, b).

    answered: bool [M, N]; theta [M, D]; a [N, D]; b [N]. prior_a: covariance [D, D] of z around its mean,
    all but zero for a 1pl model, which has one z; prior_b: standard deviation of b.
    """
    M, D = theta.shape
    precision = np.zeros((D + 1, D + 1))
    precision[:D, :D], precision[D, D] = np.linalg.inv(prior_a), 1 / prior_b**2
    own = M * D
    H = np.zeros((own + D + 1, own + D + 1))
    for m in range(M):
        H[m * D : m * D + D, m * D : m * D + D] = np.eye(D)
    H[own:, own:] = len(b) * precision + np.diag([*np.ones(D), 1 / 9])
    for rows, w, _, cross, gain in _groups(answered, theta, a, b, precision):
        of_theta = w.T @ (a[rows, :, None] * a[rows, None, :]).reshape(-1, D * D)
        for m in range(M):
            H[m * D : m * D + D, m * D : m * D + D] += of_theta[m].reshape(D, D)
        H -= cross.reshape(-1, len(H)).T @ gain.reshape(-1, len(H))
    covariance = np.linalg.inv(H)
    items = np.empty((len(b), D + 1, D + 1))
    for rows, _, inverse, _, gain in _groups(answered, theta, a, b, precision):
        through = (gain.reshape(-1, len(H)) @ covariance).reshape(gain.shape)
        items[rows] = inverse + through @ gain.transpose(0, 2, 1)
    if D == 1:  # from log a to a
        items[:, 0, :] *= a
        items[:, :, 0] *= a
    return np.stack([covariance[m * D : m * D + D, m * D : m * D + D] for m in range(M)]), items


def _groups(answered, theta, a, b, precision) -> Iterator[tuple]:
    """(rows, w [n, M], inverse of the items' blocks [n, D + 1, D + 1], their cross blocks with the rest
    [n, D + 1, G], inverse · cross) for groups of n items."""
    (M, D), G = theta.shape, theta.size + theta.shape[1] + 1
    # d η / d (z, b) = toward[m] * reach[n].
    toward = np.column_stack([theta, -np.ones(M)])
    squares = (toward[:, :, None] * toward[:, None, :]).reshape(M, -1)
    step = max(1, _NUMBERS // ((D + 1) * G))
    for start in range(0, len(b), step):
        rows = slice(start, start + step)
        p = sigmoid(a[rows] @ theta.T - b[rows, None])
        w = answered[:, rows].T * p * (1 - p)
        n = len(w)
        reach = np.ones((n, D + 1))
        if D == 1:
            reach[:, 0] = a[rows, 0]
        blocks = (w @ squares).reshape(n, D + 1, D + 1) * reach[:, :, None] * reach[:, None, :]
        inverse = np.linalg.inv(blocks + precision)
        cross = np.empty((n, D + 1, G))
        weighted = reach[:, :, None] * toward.T * w[:, None, :]  # [n, D + 1, M]
        cross[:, :, : M * D] = (weighted[..., None] * a[rows, None, None, :]).reshape(n, D + 1, M * D)
        cross[:, :, M * D :] = -precision
        yield rows, w, inverse, cross, inverse @ cross
