"""The draws of random keeps: exact against the oracle, and their statistics.

A statistic is a z-score, normal with mean 0 and variance 1 if draws are uniform and independent. |z| < 4.5 fails by
chance once in 150,000 times; there are some 120 of them here, so that a sound stream would fail one choice of seeds in
1,200. Seeds are fixed: what passes, passes always.
"""

import itertools

import pytest
import torch

from merge3 import kernels
from merge3.kernels import DENSITY, WEIGHT, Modes
from merge3.reference import random_bits

N = 1 << 20
LIMIT = 4.5


def kept(density, experts=1, tensor=5, seed=11, numel=N, dtype=torch.float32):
    """Which elements each expert keeps, bool [experts, numel]: weights are powers of two, as in a number."""
    c = kernels.coefficients(1, experts)
    c[..., DENSITY] = density
    c[0, :, WEIGHT] = 2.0 ** torch.arange(experts)
    out = torch.empty(numel, dtype=dtype)
    ones = torch.ones(numel, dtype=dtype)
    kernels.merge_([out], [], [ones] * experts, c, torch.ones(1), Modes("random", seed=seed), torch.tensor([tensor]))
    return torch.stack([out.to(torch.int64) >> k & 1 == 1 for k in range(experts)])


def share_z(hits: torch.Tensor, probability: float) -> float:
    n = hits.numel()
    return (float(hits.sum()) - n * probability) / (n * probability * (1 - probability)) ** 0.5


def chi_z(counts: torch.Tensor) -> float:
    """Of a chi-square of equally likely cells."""
    expected, freedom = counts.double().mean(), counts.numel() - 1
    return float(((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.0, 1 / 65536, 0.1, 0.25, 0.3, 127 / 256, 255.5 / 256, 65535 / 65536, 1.0])
def test_a_keep_is_a_draw_below_the_density(density, dtype):
    numel = 3 * kernels.CHUNK + 77 if dtype == torch.bfloat16 else 5003
    found = kept(density, 3, tensor=2**32 - 1, seed=2**63 + 12345, numel=numel, dtype=dtype)
    for k in range(3):
        draws = random_bits(numel, 2**32 - 1, k, 2**63 + 12345)
        assert torch.equal(found[k], draws < int(density * 65536 + 0.5)), k


def test_every_byte_is_as_frequent_and_the_two_of_a_draw_are_independent():
    draws = random_bits(N, 5, 0, 11)
    for byte in (draws >> 8, draws & 0xFF):
        assert abs(chi_z(byte.bincount(minlength=256))) < LIMIT
        for bit in range(8):
            assert abs(share_z(byte >> bit & 1, 0.5)) < LIMIT
    assert abs(chi_z(draws.bincount(minlength=65536))) < LIMIT
    # By the place in a block of sixteen: no place has bytes of its own.
    places = (draws >> 8).reshape(-1, 16)
    for place in range(16):
        assert abs(chi_z(places[:, place].bincount(minlength=256))) < LIMIT


@pytest.mark.parametrize("density", [1 / 256, 0.1, 0.3, 0.5, 0.9, 12345 / 65536, 40001 / 65536])
def test_the_kept_share_is_the_density_to_one_draw_in_65536(density):
    shares = kept(density, experts=4)
    for share in shares:
        assert abs(share_z(share, int(density * 65536 + 0.5) / 65536)) < LIMIT


def test_the_share_is_exact_over_all_draws():
    """Neighbouring densities differ by exactly the elements whose draw lies between."""
    draws = random_bits(N, 5, 0, 11)
    for threshold in (3 * 256, 3 * 256 + 1, 3 * 256 + 255, 77 * 256 + 128):
        more = kept((threshold + 1) / 65536)[0] & ~kept(threshold / 65536)[0]
        assert torch.equal(more, draws == threshold)


def test_neighbours_are_independent():
    """Within a block of draws, from block to block, and from vector to vector."""
    hits = kept(0.3)[0]
    for lag in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 64, 127, 128, 256, 512, 65536):
        assert abs(share_z((hits[lag:] & hits[:-lag])[:: lag + 1], 0.09)) < LIMIT, lag  # pairs that share no element
    pairs = (random_bits(N, 5, 0, 11) >> 12).reshape(-1, 2)
    assert abs(chi_z((pairs[:, 0] * 16 + pairs[:, 1]).bincount(minlength=256))) < LIMIT
    runs = torch.diff(hits.nonzero().flatten())  # geometric
    for length in range(1, 12):
        assert abs(share_z(runs == length, 0.3 * 0.7 ** (length - 1))) < LIMIT, length


def test_experts_tensors_and_seeds_are_independent():
    streams = [*kept(0.3, experts=8)[[0, 1, 2, 7]], kept(0.3, tensor=6)[0], kept(0.3, seed=12)[0]]
    streams += [kept(0.3, tensor=5 + 2**31)[0], kept(0.3, seed=11 + 2**32)[0]]
    for a, b in itertools.combinations(streams, 2):
        assert abs(share_z(a & b, (int(0.3 * 65536 + 0.5) / 65536) ** 2)) < LIMIT


def test_these_statistics_notice_a_poor_stream():
    draws = random_bits(N, 5, 0, 11)
    repeated = draws.reshape(-1, 16)[:, :8].repeat(1, 2).flatten()  # half a block for a whole one
    hits = repeated < 19661
    assert abs(share_z((hits[8:] & hits[:-8])[::9], 0.09)) > LIMIT
    assert abs(chi_z((draws >> 8 & 0xFE).bincount(minlength=256))) > LIMIT
    assert abs(share_z(draws < int(0.3 * 65536), (int(0.3 * 65536) + 400) / 65536)) > LIMIT
