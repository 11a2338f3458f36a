"""karcher against the mean it approximates, for inputs from nearly parallel to far apart."""

import numpy as np
import pytest

from merge3.methods.spherical import _karcher_mean


def gram(count, scale, seed):
    g = np.random.default_rng(seed)
    base = g.normal(size=4096)
    inputs = np.stack([base + scale * (i + 1) * g.normal(size=4096) for i in range(count)])
    inputs = inputs.astype(np.float32).astype(np.float64)
    units = inputs / np.linalg.norm(inputs, axis=1)[:, None]
    return units, units @ units.T


@pytest.mark.parametrize("scale", [1e-4, 3e-4, 1e-3, 1e-2, 0.1, 0.5])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_within_its_tolerance_of_the_mean(count, scale):
    for seed in range(4):
        units, inner = gram(count, scale, seed)
        found = _karcher_mean(inner, 1e-5, 10) @ units
        # At the mean the tangents towards all inputs cancel (Karcher 1977); that is what is asserted, in full vectors.
        mean = _karcher_mean(inner, 1e-13, 2000) @ units
        cosines = np.clip(units @ mean, -1, 1)
        rest = units - cosines[:, None] * mean
        lengths = np.linalg.norm(rest, axis=1)
        tangents = np.arcsin(np.clip(lengths, 0, 1))[:, None] * rest / np.maximum(lengths, 1e-300)[:, None]
        assert np.linalg.norm(tangents.mean(0)) < 1e-10
        assert np.linalg.norm(found - mean) < 1e-5
