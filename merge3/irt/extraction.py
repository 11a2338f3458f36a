"""Which items to ask: n of N, with weights that sum to 1.

random: any. irt: one item near the centre of each of n clusters of (a, b), weighted by the cluster's
share (Polo et al. 2024, tinyBenchmarks). correctness: the same on the columns of the response matrix.
Where one subset follows another, the central items would be asked again and again and the others never;
`anywhere` takes a random item of each cluster instead, so that over many subsets every item counts
(stratified sampling).
entropy: items on which the endpoints disagree most (Iacobelli et al. 2026, Evo-L2S). information: a
greedy choice that leaves the least uncertainty over the abilities seen so far (Bayesian D-optimality).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from merge3.irt.bank import ItemBank, sigmoid
from merge3.irt.responses import Responses, ResponsesError


@dataclass(frozen=True, eq=False)
class Subset:
    """index: [n] positions in the bank, ascending; weights: [n], summing to 1; method: how it was chosen."""

    index: np.ndarray
    weights: np.ndarray
    method: str = "random"


def extract(
    bank: ItemBank,
    responses: Responses,
    method: str,
    size: int,
    seed: int = 0,
    endpoints: tuple[str, ...] = (),
    anywhere: bool = False,
) -> Subset:
    """Choose `size` items of the bank. responses: of the calibration, columns as the bank's items.

    endpoints: names of rows for `entropy` (default: all rows). anywhere: in its cluster (`irt`,
    `correctness`), not at its centre. Raises ResponsesError for an unknown
    method, or a size outside 1..N.
    """
    if method not in METHODS:
        raise ResponsesError("extract", f"method {method!r}", ", ".join(METHODS))
    N = len(bank.items)
    if not 1 <= size <= N:
        raise ResponsesError("extract", f"{size} of {N} items", f"1 to {N}")
    if responses.items != bank.items:
        raise ResponsesError("extract", "responses to other items than the bank's", "the same items in the same order")
    if size == N:
        return Subset(np.arange(N), np.full(N, 1 / N), method)
    rng = np.random.default_rng(seed)
    index, weights = METHODS[method](bank, responses, size, rng, endpoints, anywhere)
    order = np.argsort(index)
    return Subset(np.asarray(index)[order], np.asarray(weights)[order], method)


def _random(bank, responses, size, rng, endpoints, anywhere):
    return rng.permutation(len(bank.items))[:size], np.full(size, 1 / size)


def _irt(bank, responses, size, rng, endpoints, anywhere):
    return _clusters(np.column_stack([bank.a, bank.b]), size, rng, anywhere)


def _correctness(bank, responses, size, rng, endpoints, anywhere):
    values = responses.values
    answered = responses.answered
    share = np.where(answered, values, 0).sum(0) / np.maximum(answered.sum(0), 1)
    filled = np.where(answered, values, np.where(answered.any(0), share, 0.5))
    return _clusters(filled.T, size, rng, anywhere)


def _entropy(bank, responses, size, rng, endpoints, anywhere):
    rows = responses.rows([m for m in endpoints if m in responses.models]) if endpoints else responses
    rows = rows if rows.models else responses
    answered = rows.answered
    p = np.where(answered, rows.values, 0).sum(0) / np.maximum(answered.sum(0), 1)
    p = np.where(answered.any(0), p, 0.5)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nan_to_num(p * np.log(p)) - np.nan_to_num((1 - p) * np.log(1 - p))
    # Few endpoints give few distinct shares: ties are drawn.
    return np.lexsort((rng.random(len(p)), -entropy))[:size], np.full(size, 1 / size)


def _information(bank, responses, size, rng, endpoints, anywhere):
    spread = bank.theta.std(0) + 0.1
    points = bank.theta.mean(0) + spread * rng.normal(size=(64, bank.dimensions))
    slopes = bank.a
    p = sigmoid(points @ slopes.T - bank.b)
    w = p * (1 - p)  # [points, N]
    covariance = np.broadcast_to(np.diag(spread**2), (len(points), *np.diag(spread).shape)).copy()
    chosen: list[int] = []
    for _ in range(size):
        # log det(I + w a' C a) is what one more answer takes off the log volume of the posterior.
        through = np.einsum("nd,pde->pne", slopes, covariance)
        gain = np.log1p(w * np.einsum("pne,ne->pn", through, slopes)).mean(0)
        gain[chosen] = -np.inf
        best = int(gain.argmax())
        chosen.append(best)
        v = through[:, best]  # [points, D]
        covariance -= np.einsum("pd,pe->pde", v, v) / (1 / w[:, best] + v @ slopes[best])[:, None, None]
    return np.array(chosen), np.full(size, 1 / size)


def _clusters(points: np.ndarray, size: int, rng: np.random.Generator, anywhere: bool) -> tuple[np.ndarray, np.ndarray]:
    """The point nearest to each of `size` k-means centres, or any of its cluster, weighted by the cluster's share."""
    from scipy.cluster.vq import kmeans2
    from scipy.spatial.distance import cdist

    points = (points - points.mean(0)) / np.where(points.std(0) > 0, points.std(0), 1)
    if len(np.unique(points, axis=0)) <= size:  # fewer distinct points than centres: nothing to cluster
        return rng.permutation(len(points))[:size], np.full(size, 1 / size)
    centres, label = kmeans2(points, size, iter=30, minit="++", seed=rng, missing="warn")
    distance = cdist(centres, points)
    if anywhere:  # a random order within each cluster, before all others
        distance = np.where(label == np.arange(size)[:, None], rng.random(distance.shape) - 1, distance)
    chosen: list[int] = []
    for c in range(size):
        distance[c, chosen] = np.inf  # an empty cluster's centre may share its nearest item
        chosen.append(int(distance[c].argmin()))
    counts = np.bincount(label, minlength=size) + 1e-9
    return np.array(chosen), counts / counts.sum()


METHODS: dict[str, Callable] = {
    "random": _random,
    "irt": _irt,
    "correctness": _correctness,
    "entropy": _entropy,
    "information": _information,
}
