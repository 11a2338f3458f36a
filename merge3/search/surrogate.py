"""What a candidate's neighbours say about it: a Gaussian process over genomes, fitted to noisy estimates.

    value = m + f(x) + g(generation) + noise
    f ~ GP(0, s_f² exp(−½ Σ_d (x_d − x_d')² / l_d²)),  g ~ N(0, s_g²),  noise ~ N(0, κ stderr²)

A few answers leave each estimate's noise larger than the differences between candidates, but accuracy
changes smoothly with the genes, and a search stays in one region for many generations. g is what the
items of a generation have in common: they are easier or harder than others. One length per gene, so that
genes that matter little do not keep neighbours apart. l, s_f, s_g and κ are maximum a posteriori, m by
least squares (Rasmussen and Williams 2006, sections 2.2, 2.7, 5.1 and 5.4.1).
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

WINDOW = 500  # latest candidates that count: the cost grows with their cube
_TOO_FAR = 1e30


class Surrogate:
    """Fit, then predict. low, high: [d] bounds; sigma: the search's first step as a share of them; steps: how much
    longer that is for each gene, float64 [d]; None: alike."""

    def __init__(self, low: np.ndarray, high: np.ndarray, sigma: float, steps: np.ndarray | None = None):
        span = high - low
        self._span = np.where(np.isfinite(span), span, 1.0)
        # Before anything is known, candidates of the first generation are about one length apart.
        lengths = np.full(len(low), np.log(sigma * np.sqrt(2 * len(low))))
        if steps is not None:
            lengths += np.log(steps)
        self._prior = np.concatenate([lengths, [np.log(1e-3), np.log(1e-3), 0.0]])
        self._prior_sd = np.concatenate([np.ones(len(low)), [2.0, 2.0, 0.7]])
        self._at = self._prior.copy()  # log of l, s_f², s_g², κ; where the next fit starts
        self._seen = (np.empty((0, len(low))), *(np.empty(0) for _ in range(3)))

    def add(
        self,
        genomes: np.ndarray,
        values: np.ndarray,
        stderrs: np.ndarray,
        steps: int = 4,
        generations: np.ndarray | None = None,
    ) -> None:
        """Another generation's estimates (NaN: failed, left out), and a few steps of the fit. generations: numbers of
        those whose items each was asked, [C]; None: a new one."""
        known = ~np.isnan(values)
        if generations is None:
            generations = np.full(len(values), self._seen[3].max(initial=-1.0) + 1)
        # A few answers that happen to be all alike have no spread; they are no surer than others for it.
        errors = np.maximum(stderrs[known], 0.5 * np.median(stderrs[known])) if known.any() else stderrs[known]
        new = (genomes[known] / self._span, values[known], errors, generations[known])
        self._seen = tuple(np.concatenate([a, b])[-WINDOW:] for a, b in zip(self._seen, new))
        if len(self._seen[1]):
            for start in (self._at, self._prior):
                self._at = minimize(self._loss, start, jac=True, method="L-BFGS-B", options={"maxiter": steps}).x
                if self._loss(self._at)[0] < _TOO_FAR:
                    break

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(value, its standard error), each [C], on items of no generation in particular."""
        lengths, variance = np.exp(self._at[:-3]), np.exp(self._at[-3])
        near = variance * _closeness(genomes / self._span / lengths, self._seen[0] / lengths)
        left = variance - np.einsum("ci,ij,cj->c", near, self._inverse, near, optimize=True)
        return self._mean + near @ self._weights, np.sqrt(np.maximum(left, 0.0))

    def _loss(self, at: np.ndarray) -> tuple[float, np.ndarray]:
        """Negative log posterior of the logarithms, and its gradient."""
        x, y, stderr, generation = self._seen
        lengths, (of_f, of_g, kappa) = np.exp(at[:-3]), np.exp(at[-3:])
        noise = np.maximum(stderr, 1e-3) ** 2
        same = (generation[:, None] == generation).astype(float)
        near = of_f * _closeness(x / lengths, x / lengths)
        covariance = near + of_g * same + np.diag(kappa * noise + 1e-9)
        try:
            factor = cho_factor(covariance, lower=True)
        except (np.linalg.LinAlgError, ValueError):  # not positive in floating point, or not finite: a step back
            return _TOO_FAR, np.zeros(len(at))
        self._inverse = cho_solve(factor, np.eye(len(y)))
        rows = self._inverse.sum(1)
        self._mean = rows @ y / rows.sum()
        self._weights = self._inverse @ (y - self._mean)
        # d log p / d q = ½ Σ_ij W_ij dK_ij/dq; for a length the sum over (x_i − x_j)² is spread out.
        W = np.outer(self._weights, self._weights) - self._inverse
        A = W * near
        by_length = (A.sum(1) @ x**2 - ((A @ x) * x).sum(0)) / lengths**2
        gradient = np.append(
            by_length, 0.5 * np.array([A.sum(), of_g * (W * same).sum(), kappa * (np.diag(W) * noise).sum()])
        )
        z = (at - self._prior) / self._prior_sd
        loss = 0.5 * (y - self._mean) @ self._weights + np.log(np.diag(factor[0])).sum() + 0.5 * z @ z
        return loss, z / self._prior_sd - gradient


def _closeness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """exp(−½ |a_i − b_j|²)"""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.exp(-0.5 * np.maximum(squares, 0.0))
