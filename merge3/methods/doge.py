"""DOGE: task vectors changed together, by a step towards what they have in common, before they are summed.

Wei et al. 2025, "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent". Of a matrix with task
vectors τ_i, each weighing λ_i = η / ‖τ_i‖, a change Δ of all of them is found by Adam on
Σ_i Σ_rows ⟨τ_i, τ_i − Σ_k λ_k (τ_k + Δ)⟩², whose gradients leave the task vectors' shared subspace alone. Then each
keeps the elements that are large among all of its model, and the expert is base + Σ_i λ_i (τ_i + Δ) ⊙ mask_i.

Which tensors. The authors take matrices of an encoder's layers and leave all else as the base has it. Here it is every
matrix inside a stack of layers, whatever the model (see matrices.py); other tensors, embeddings and heads among them,
have the mean task vector, or with `others: false` the base's values. η / ‖τ_i‖ would make little ones huge.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from merge3.largest import kept_from
from merge3.methods.base import Job, Method, Parameter
from merge3.methods.matrices import FLATTEN, LAMBDA, matrix_shape, singular, step, task_vectors
from merge3.threads import few_threads

Read = Callable[[Iterable[Job]], Iterator[tuple[Job, list[torch.Tensor]]]]
Thresholds = dict[tuple[str, float], float]  # (expert, share that is kept) -> the smallest magnitude of those
_LAYER = re.compile(r"\.\d+\.")


def methods() -> list[Method]:
    """doge."""
    parameters = {
        "lambda": LAMBDA,
        "eta": Parameter(float, "shared", 0.07, 0.0, open_low=True, help="length that each task vector is given"),
        "keep": Parameter(float, "shared", 0.3, 0.0, 1.0, help="share of a whole task vector that is kept"),
        "subspace": Parameter(int, "shared", 6, 1, help="one direction in so many is shared and left alone"),
        "steps": Parameter(int, "shared", 400, 0, 100_000, help="of Adam on a tensor"),
        "learning_rate": Parameter(float, "shared", 1e-4, 0.0, 1.0, help="of Adam, in units of weights"),
        "flatten": FLATTEN,
        "others": Parameter(bool, "shared", True, help="average what is no matrix of a layer, not keep the base's"),
    }
    return [
        Method(
            "doge",
            "task vectors moved off their conflicts, outside the subspace they share, and trimmed",
            "https://arxiv.org/abs/2501.01230",
            parameters,
            step,
            searched=("lambda",),
            derive=_derive,
            survey=_survey,
            deriving=tuple(name for name in parameters if name != "lambda"),
        )
    ]


def common_change(vectors: torch.Tensor, eta: float, subspace: int, steps: int, learning_rate: float) -> torch.Tensor:
    """Δ [rows, columns] of task vectors [T, rows, columns], float32.

    Of expert i and a row the loss is r_i² with r_i = a_i − Λ ⟨τ_i, Δ⟩, a_i = ⟨τ_i, τ_i − Σ_k λ_k τ_k⟩, Λ = Σ_k λ_k; so
    the gradient is −2Λ Σ_i r_i τ_i, and a_i are computed once.
    """
    scales = lengths(vectors, eta)
    total = float(scales.sum())
    fixed = (vectors * (vectors - torch.einsum("t,trc->rc", scales, vectors))).sum(-1, keepdim=True)  # [T, rows, 1]
    basis = shared_subspace(vectors, subspace)
    change = torch.zeros_like(vectors[0])
    if basis.shape[1] == len(change):  # all is shared: what is left of a gradient is rounding, which Adam would follow
        return change
    change.grad, product = torch.empty_like(change), torch.empty_like(change)
    optimizer = torch.optim.Adam([change], lr=learning_rate, fused=True)
    for _ in range(steps):
        change.grad.zero_()
        for vector, own in zip(vectors, fixed):
            torch.mul(vector, change, out=product)
            left = own - total * product.sum(-1, keepdim=True)
            change.grad.addcmul_(vector, left, value=-2 * total)
        change.grad.addmm_(basis, basis.T @ change.grad, alpha=-1)
        optimizer.step()
    return change


def lengths(vectors: torch.Tensor, eta: float) -> torch.Tensor:
    """λ of each task vector [T, ..]: η / its Frobenius norm; 0 of one that changes nothing. [T]"""
    norms = torch.linalg.vector_norm(vectors.flatten(1), dim=1, dtype=torch.float64)
    return torch.where(norms > 0, eta / norms, 0.0).to(vectors.dtype)


def shared_subspace(vectors: torch.Tensor, subspace: int) -> torch.Tensor:
    """Orthonormal columns [rows, r // subspace or fewer], r = min(rows, columns): the first left singular vectors of
    the first r // T left singular vectors of each of T task vectors."""
    rank = min(vectors.shape[1:])
    left = [singular(vector)[0][:, : rank // len(vectors)] for vector in vectors]
    return singular(torch.cat(left, 1))[0][:, : rank // subspace].to(vectors.dtype)


def _survey(jobs: Sequence[Job], read: Read) -> Thresholds:
    """What each expert keeps, of all tensors that are changed. Reads them twice."""
    changed: dict[float, list[Job]] = {}
    for job in jobs:
        if _shape(job) is not None:
            changed.setdefault(job.shared["keep"], []).append(job)
    whole = [job for alike in changed.values() for job in alike]

    def magnitudes() -> Iterator[tuple[str, torch.Tensor]]:
        for job, tensors in read(whole):
            for source, vector in zip(job.sources, task_vectors(tensors)):
                yield source.model, vector.abs()

    found: Thresholds = {}
    for keep in changed:
        found |= {(model, keep): value for model, value in kept_from(magnitudes, keep).items()}
    return found


def _derive(job: Job, tensors: list[torch.Tensor], thresholds: Thresholds) -> torch.Tensor:
    base, asked, shape = tensors[0], job.shared, _shape(job)
    vectors = torch.stack(task_vectors(tensors))
    if shape is None:
        return base + vectors.mean(0) if asked["others"] else base
    vectors = vectors.reshape(len(vectors), *shape)
    with few_threads(vectors.numel()):
        change = common_change(vectors, asked["eta"], asked["subspace"], asked["steps"], asked["learning_rate"])
        merged = torch.zeros_like(change)
        for source, vector, scale in zip(job.sources, vectors, lengths(vectors, asked["eta"])):
            kept = vector.abs() >= thresholds[source.model, asked["keep"]]
            merged += scale * (vector + change) * kept
    return base + merged.reshape(base.shape)


def _shape(job: Job) -> tuple[int, int] | None:
    """Of a tensor that is changed, as a matrix."""
    return matrix_shape(job) if _LAYER.search(job.name) else None
