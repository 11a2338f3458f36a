"""What methods share that derive an expert by linear algebra: tensors as matrices, and their singular directions.

Matrices are tensors of two dimensions, both above 1, as the authors' programs have it; embeddings and heads are among
them. `flatten: true` makes one of a tensor of more dimensions, too: its first dimension by all others, as a convolution
applies it, where dimensions of 1 do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from merge3.kernels import Modes
from merge3.methods.base import Fused, Gene, Job, Parameter, neutral
from merge3.statistics import Statistics
from merge3.threads import few_threads

# Of every method that derives a task vector.
LAMBDA = Parameter(float, "shared", 1.0, help="scale of the derived task vector", gene=Gene(0.0, 2.0, start=1.0))
# Not the default: on the eight image tasks of benchmarks/linear_algebra.py the patches' convolution and positions,
# taken as matrices, cost iso_c six points and gained the others nothing.
FLATTEN = Parameter(bool, "shared", False, help="take tensors of more than two dimensions as matrices, too")
# Directions of less than this share of the largest singular value are rounding errors of float32 weights.
RESOLUTION = 1e-6


def matrix_shape(job: Job) -> tuple[int, int] | None:
    """(rows, columns) of a tensor as a matrix; None for one that is none."""
    shape = job.shape
    if job.shared["flatten"]:
        counting = [size for size in shape if size != 1]
        shape = (*counting[:1], math.prod(counting[1:]))
    return tuple(shape) if len(shape) == 2 and min(shape) > 1 else None


def task_vectors(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """τ of every expert, in the tensor's shape. tensors: base first."""
    base, *experts = tensors
    return [expert - base for expert in experts]


def step(job: Job, statistics: Statistics) -> Fused:
    """base + λ · (derived − base): all that a candidate costs once the expert is derived."""
    return Fused(Modes(), job.base, job.sources, neutral([1.0]), job.shared["lambda"])


def with_merged(
    job: Job,
    base: torch.Tensor,
    vectors: Sequence[torch.Tensor],
    merge: Callable[[list[torch.Tensor]], torch.Tensor],
    least: int = 1,
) -> torch.Tensor:
    """The base and what `merge` makes of task vectors as matrices; of what is no matrix, or has fewer rows or columns
    than `least`, their mean."""
    shape = matrix_shape(job)
    if shape is None or min(shape) < least:
        return base + torch.stack(tuple(vectors)).mean(0)
    with few_threads(job.numel * len(vectors)):
        return base + merge([vector.reshape(shape) for vector in vectors]).float().reshape(base.shape)


def singular(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thin SVD, float64: u [rows, rank], s [rank] from the largest, vᵀ [rank, columns].

    Of a matrix of float32 precision: directions below RESOLUTION are not there, where an SVD would make some up, so a
    matrix of zeros has none. By the eigenvectors of the smaller Gram matrix, which for long matrices (embeddings) and
    on a GPU takes a fraction of an SVD's time; float64 squares what float32 can tell apart without losing it.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    tall = (matrix.T if wide else matrix).double()
    squares, v = torch.linalg.eigh(tall.T @ tall)
    squares, v = squares.flip(0).clamp(min=0), v.flip(1)
    kept = squares > squares[:1] * RESOLUTION**2  # none of zeros
    s, v = squares[kept].sqrt(), v[:, kept]
    u = tall @ v / s
    return (v, s, u.T) if wide else (u, s, v.T)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix whose singular values are all 1, or 0 where the matrix has rank to spare: u · vᵀ, float64."""
    u, _, v = singular(matrix)
    return u @ v
