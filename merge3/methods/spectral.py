"""One expert made of all experts' task vectors by their singular directions, tensor by tensor, without data.

What is no matrix (see matrices.py), and for `tsv_m` a matrix with fewer rows or columns than there are experts, has the
mean task vector, as the authors' programs have it. A direction that no expert changes stays the base's, where those
programs take the SVD's arbitrary completion: that matters for task vectors that are low-rank to the last bit, and for
experts that are copies of each other.

iso_c: Marczak et al. 2025, "No Task Left Behind", Iso-C. tsv_m: Gargiulo et al. 2024, "Task Singular Vectors", TSV-M.
wudi: Cheng et al. 2025, "Whoever Started the Interference Should End It", WUDI-Merging.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from merge3.methods.base import Job, Method, Parameter
from merge3.methods.matrices import FLATTEN, LAMBDA, orthogonal, singular, step, task_vectors, with_merged

_WEIGHT = Parameter(float, "expert", 1.0, help="scale of an expert's task vector before anything is derived of it")


def methods() -> list[Method]:
    """iso_c, tsv_m and wudi."""
    return [
        Method(
            "iso_c",
            "the sum of task vectors with all its singular values made equal",
            "https://arxiv.org/abs/2502.04959",
            {"lambda": LAMBDA, "flatten": FLATTEN},
            step,
            searched=("lambda",),
            derive=_iso_c,
            deriving=("flatten",),
        ),
        Method(
            "tsv_m",
            "each task vector's first singular directions, made orthogonal to the others'",
            "https://arxiv.org/abs/2412.00081",
            {"weight": _WEIGHT, "lambda": LAMBDA, "flatten": FLATTEN},
            step,
            searched=("lambda",),
            derive=_tsv_m,
            deriving=("weight", "flatten"),
        ),
        Method(
            "wudi",
            "the task vector that interferes least with what each expert's own directions carry",
            "https://arxiv.org/abs/2503.08099",
            {
                "lambda": LAMBDA,
                "closed": Parameter(bool, "shared", False, help="solve the damped problem instead of taking steps"),
                "mu": Parameter(float, "shared", 0.1, 1e-6, help="damping of the closed form"),  # float64's, at least
                "steps": Parameter(int, "shared", 300, 0, 100_000, help="of Adam on a tensor"),
                "learning_rate": Parameter(float, "shared", 1e-5, 0.0, 1.0, help="of Adam, in units of weights"),
                "flatten": FLATTEN,
            },
            step,
            searched=("lambda",),
            derive=_wudi,
            deriving=("closed", "mu", "steps", "learning_rate", "flatten"),
        ),
    ]


def isotropic(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Iso-C of task vectors, each [rows, columns]: the sum's directions, all with the mean of their singular values.
    Float64."""
    u, s, v = singular(torch.stack(tuple(vectors)).sum(0))
    return u @ v * (s.mean() if len(s) else 0.0)


def separated(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """TSV-M of T task vectors, each [rows, columns] with at least T of both: the first min(rows, columns) // T
    directions of each, as they are when left, and right, ones are made orthogonal to each other. Float64."""
    share = min(vectors[0].shape) // len(vectors)
    left, values, right = [], [], []
    for vector in vectors:
        u, s, v = singular(vector)
        left.append(u[:, :share])
        values.append(s[:share])
        right.append(v[:share])
    return orthogonal(torch.cat(left, 1)) * torch.cat(values) @ orthogonal(torch.cat(right))


def least_interference(vectors: Sequence[torch.Tensor], steps: int, learning_rate: float) -> torch.Tensor:
    """WUDI of task vectors, each [rows, columns], float32: Adam from their sum on Σ_i ‖(τ − τ_i) τ_iᵀ‖² / ‖τ_i‖².

    With G_i = τ_iᵀ τ_i / ‖τ_i‖² the gradient is 2 (δ Σ_i G_i + Σ_i (Σ_k τ_k − τ_i) G_i) for τ = Σ_k τ_k + δ: both sums
    stay, so a step is one product, however many experts there are. For experts × rows < columns / 2 the first goes by
    its factor. δ is what moves, since Adam would take a gradient that is 0 but for rounding for a direction.
    """
    changing = _scaled(vectors)
    total = torch.stack(tuple(vectors)).sum(0)
    if not changing:
        return total
    stacked = torch.cat([unit for _, unit, _ in changing])  # Σ_i G_i = stackedᵀ stacked
    constant = sum(_through(total - vector, unit) for vector, unit, _ in changing)
    factored = 2 * len(stacked) < total.shape[1]
    gram = None if factored else stacked.T @ stacked
    change = torch.zeros_like(total)
    change.grad = torch.empty_like(change)
    optimizer = torch.optim.Adam([change], lr=learning_rate, fused=True)
    for _ in range(steps):
        left, right = (change @ stacked.T, stacked) if factored else (change, gram)
        torch.addmm(constant, left, right, beta=2.0, alpha=2.0, out=change.grad)
        optimizer.step()
    return total + change


def least_interference_closed(vectors: Sequence[torch.Tensor], mu: float) -> torch.Tensor:
    """The minimum of WUDI's loss + μ ‖τ − Σ_i τ_i‖² in one solve, (Σ_i τ_i G_i + μ Σ_i τ_i)(Σ_i G_i + μ I)⁻¹ with G_i
    as in least_interference and μ = mu · Σ_i tr(G_i) / columns; float64. The damping does what few steps from the sum
    do: directions that hardly any expert carries stay the sum's."""
    changing = _scaled([vector.double() for vector in vectors])
    if not changing:
        return torch.zeros_like(vectors[0], dtype=torch.float64)
    stacked = torch.cat([unit for _, unit, _ in changing])
    rows, columns = vectors[0].shape
    damping = mu * len(changing) / columns  # the trace of each G_i is 1
    if len(stacked) >= columns:
        right = sum(_through(vector, unit) + damping * vector for vector, unit, _ in changing)
        return _solved(stacked.T @ stacked, damping, right)
    # C B (Bᵀ B + μ I)⁻¹ = C (B Bᵀ + μ I)⁻¹ B: for so few rows the smaller solve
    identity = torch.eye(rows).to(stacked)
    right = torch.cat([(unit @ unit.T + damping * identity) * norm for _, unit, norm in changing], 1)
    return _solved(stacked @ stacked.T, damping, right) @ stacked


def _through(left: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """left · unitᵀ · unit, by the smaller square: of an embedding's rows it would not fit into memory."""
    return left @ (unit.T @ unit) if len(unit) >= unit.shape[1] else (left @ unit.T) @ unit


def _solved(gram: torch.Tensor, damping: float, right: torch.Tensor) -> torch.Tensor:
    """right · (gram + damping · I)⁻¹"""
    gram.diagonal().add_(damping)
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(gram)).T


def _scaled(vectors: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """(τ_i, τ_i / ‖τ_i‖, ‖τ_i‖) of every expert that changes anything."""
    norms = [float(torch.linalg.vector_norm(vector, dtype=torch.float64)) for vector in vectors]
    return [(vector, vector / norm, norm) for vector, norm in zip(vectors, norms) if norm > 0]


def _iso_c(job: Job, tensors: list[torch.Tensor]) -> torch.Tensor:
    return with_merged(job, tensors[0], task_vectors(tensors), isotropic)


def _tsv_m(job: Job, tensors: list[torch.Tensor]) -> torch.Tensor:
    vectors = [vector * own["weight"] for vector, own in zip(task_vectors(tensors), job.per_source)]
    return with_merged(job, tensors[0], vectors, separated, least=len(vectors))


def _wudi(job: Job, tensors: list[torch.Tensor]) -> torch.Tensor:
    asked = job.shared
    if asked["closed"]:
        merge = lambda vectors: least_interference_closed(vectors, asked["mu"])
    else:
        merge = lambda vectors: least_interference(vectors, asked["steps"], asked["learning_rate"])
    return with_merged(job, tensors[0], task_vectors(tensors), merge)
