"""Prints a digest of every kind of merge, one a line: for the CPU kernels and the emulated ones, which must agree.

python -m tests.kernels.emulation.bits [K ..], in the surroundings of library.environment; K: numbers of experts, all
by default
"""

import hashlib
import itertools
import sys

import torch

import tests.kernels.emulation.library  # noqa: F401 - puts its build in the place of merge3._C
from merge3 import kernels
from merge3.kernels import CHUNK, DENSITY, Modes
from tests.kernels.test_merge import make_case, random_coefficients

# Several chunks; the last one with an end inside a group of eight; rows that are no multiple of eight; rows that half a
# warp takes, one, or several and a part of one; nearly nothing.
SIZES = [2 * CHUNK + 48, CHUNK + 3, (40, 24), (37, 13), (11, 256), (3, 512), (5, 776), (3, 1544), 8, 1]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MODES = [*itertools.product(kernels.SPARSIFY, kernels.ELECT, (False, True))]
ELECTED = (("none", False), ("none", True), ("sum", True), ("count", False))
PACKED = [(sparsify, *how) for sparsify in kernels.PACKED for how in ELECTED]


def digest(tensors) -> str:
    every = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    return hashlib.sha256(every).hexdigest()[:16]


def off_by_one(tensor):
    """The same values, at an address that is no multiple of 16 bytes."""
    return torch.cat([torch.zeros(1, dtype=tensor.dtype), tensor.flatten()])[1:].view(tensor.shape)


def main():
    counts = map(int, sys.argv[1:]) if sys.argv[1:] else range(1, kernels.MAX_EXPERTS + 1)
    for count, dtype in itertools.product(counts, DTYPES):
        base, experts = make_case(SIZES, count, dtype, seed=count)
        c, lam = random_coefficients(len(base), count, seed=count)
        # Random keeps that upper bytes decide, that need lower ones too, and that keep all.
        c[::2, :, DENSITY] = (c[::2, :, DENSITY] * 256).round() / 256
        c[2::4, -1, DENSITY] = 1
        tables, masks = kernels.rank_tables(base, experts, len(base))[0], kernels.pack(base, experts, len(base))[0]
        print(count, dtype, "made", digest(tables), digest(masks))
        for sparsify, elect, normalize in MODES + PACKED:
            packed = sparsify in kernels.PACKED
            given = [] if sparsify == "signs" else experts
            extra = masks if packed else tables if sparsify == "ranked" else ()
            modes = Modes(sparsify, elect, normalize, 7)
            found = []
            for form in ("as they are", "no base", "misaligned", "to float32"):
                if form == "no base" and sparsify == "signs":
                    continue
                if form != "as they are" and count not in (1, 3):
                    continue
                bases = [] if form == "no base" else base
                sources = [off_by_one(e) for e in given] if form == "misaligned" else given
                out = [torch.empty_like(b, dtype=torch.float32 if form == "to float32" else dtype) for b in base]
                kernels.merge_(out, bases, sources, c, lam, modes, torch.arange(len(base)) + 3, extra)
                found.append(digest(out))
            print(count, dtype, sparsify, elect, normalize, *found)


if __name__ == "__main__":
    main()
