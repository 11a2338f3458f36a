"""Attention heads as units: which heads are one, and how their insides fit.

A head is compared by what it writes. Two heads are first turned to fit: the places of their values by linear
assignment, and where keys and values serve several heads of queries, those in the order that fits best. What is left is
a correlation of heads, matched as any units are. Places of queries and keys are turned likewise, but under RoPE, where
each place has a frequency of its own, they stay.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import linear_sum_assignment

from merge3.learn.zip_maps import Attention
from merge3.learn.zip_matching import Match, match_as_they_are


def match_heads(attention: Attention, correlations: Mapping[str, np.ndarray], match: Match) -> dict[str, np.ndarray]:
    """Space -> places, int64 [2, n], of one layer's four spaces."""
    if match is match_as_they_are:
        return {space: match_as_they_are(correlations[space]) for space in attention.spaces}
    heads, share, width = attention.heads, attention.share, attention.width
    values = correlations[attention.value].reshape(2 * heads, width, 2 * heads, width)
    mixed = correlations[attention.mixed].reshape(2 * heads, share, width, 2 * heads, share, width)
    fits, alike = {}, np.eye(2 * heads)
    for a in range(2 * heads):
        for b in range(a + 1, 2 * heads):
            fits[a, b] = turn, order = _fit(values[a, :, b], mixed[a, :, :, b])
            written = mixed[a][:, :, b][:, np.arange(width), :, turn].mean(0)  # [share, share], the mean over places
            alike[a, b] = alike[b, a] = written[np.arange(share), order].mean()
    chosen = match(alike).reshape(-1)
    first = {place: int(np.flatnonzero(chosen == place)[0]) for place in range(heads)}
    inside = correlations[attention.query] if not attention.rotary else None
    keys = correlations[attention.key]
    found = {space: np.zeros(len(correlations[space]), dtype=np.int64) for space in attention.spaces}
    for head in range(2 * heads):
        place = int(chosen[head])
        leader = first[place]
        turn, order = fits.get((leader, head), (np.arange(width), np.arange(share)))
        turned = np.arange(width)
        if inside is not None and head != leader:
            turned = _turn(_block(inside, leader, head, width) + _block(keys, leader, head, width))
        own = slice(head * width, (head + 1) * width)
        found[attention.value][own][turn] = place * width + np.arange(width)
        found[attention.key][own][turned] = place * width + np.arange(width)
        for at, query in enumerate(order):
            start, goes = (head * share + query) * width, (place * share + at) * width
            found[attention.mixed][start : start + width][turn] = goes + np.arange(width)
            found[attention.query][start : start + width][turned] = goes + np.arange(width)
    return {space: own.reshape(2, -1) for space, own in found.items()}


def _fit(values: np.ndarray, mixed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place of the second head's values for each of the first's, its query head for each of the first's).

    values: [width, width]; mixed: [share, width, share, width]."""
    turn = _turn(values)
    written = mixed[:, np.arange(len(turn)), :, turn].mean(0)
    return turn, _turn(written)


def _turn(correlation: np.ndarray) -> np.ndarray:
    return linear_sum_assignment(correlation, maximize=True)[1]


def _block(correlation: np.ndarray, a: int, b: int, width: int) -> np.ndarray:
    return correlation[a * width : (a + 1) * width, b * width : (b + 1) * width]
