"""Methods with a per-element rule of their own: nearswap, arcee_fusion, ram, ramplus_tl, emr_unified."""

from __future__ import annotations

import numpy as np
import torch

from merge3.methods.base import Elementwise, Gene, Job, Method, Parameter
from merge3.statistics import Statistics, rows_of

UNIFIED = "emr_unified"
_SAMPLE = 1_000_000  # importances from which quartiles are taken, as mergekit does
_RAM = "https://arxiv.org/abs/2601.13572"


def methods() -> list[Method]:
    """The rows of this family."""
    epsilon = Parameter(
        float, "shared", 1e-5, 0.0, help="changes up to this count as none", gene=Gene(0.01, 0.2, start=0.1)
    )
    return [
        Method(
            "nearswap",
            "take the other model's value where it is near",
            "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
            {
                "t": Parameter(
                    float,
                    "shared",
                    help="distance within which a value is swapped whole",
                    gene=Gene(0.0, 1.0, start=1e-3, weighs=True),
                )
            },
            _nearswap,
            experts=(1, 1),
            searched=("t",),
        ),
        Method(
            "arcee_fusion",
            "take the expert's value where its importance is an outlier",
            "https://arcee.ai",
            {},
            _arcee_fusion,
            experts=(1, 1),
        ),
        Method("ram", "average shared changes, keep unique ones whole", _RAM, {"epsilon": epsilon}, _ram),
        Method(
            "ramplus_tl",
            "ram, with unique changes of entangled experts amplified",
            _RAM,
            {
                "epsilon": epsilon,
                "r": Parameter(float, "shared", 0.1, help="strength of the amplification"),
                "alpha": Parameter(float, "shared", 0.2, 0.0, help="cap of the shared to unique ratio"),
            },
            _ramplus,
        ),
        Method(
            UNIFIED,
            "the largest change towards the sign of the sum: EMR-Merging's unified model without its masks",
            "https://arxiv.org/abs/2405.17461",
            {},
            lambda job, statistics: Elementwise("unify", job.base, job.sources, 0.0, np.ones(len(job.sources))),
        ),
    ]


def _nearswap(job: Job, statistics: Statistics) -> Elementwise:
    return Elementwise("nearswap", job.base, job.sources, job.shared["t"])


def _arcee_fusion(job: Job, statistics: Statistics) -> Elementwise:
    rows, threshold = statistics.memo(("arcee_fusion", job.base, job.sources), lambda: _importance(job, statistics))
    return Elementwise("arcee_fusion", job.base, job.sources, threshold, rows=rows)


def _importance(job: Job, statistics: Statistics) -> tuple[torch.Tensor, float]:
    """Each row's KL divergence from the base, and median + 1.5 IQR of |τ| times it."""
    theta, expert = (rows_of(statistics.get(ref)).float() for ref in (job.base, job.sources[0]))
    p, q = torch.softmax(expert, -1) + 1e-8, torch.softmax(theta, -1) + 1e-8
    divergence = (p * torch.log(p / q)).sum(-1)
    importance = ((expert - theta).abs() * divergence[:, None]).reshape(-1)
    if importance.numel() > _SAMPLE:
        chosen = torch.randint(importance.numel(), (_SAMPLE,), generator=torch.Generator().manual_seed(0))
        importance = importance[chosen.to(importance.device)]  # the same on every device
    ordered = importance.sort().values
    quartiles = [ordered[int(q * (ordered.numel() - 1))] for q in (0.25, 0.5, 0.75)] if ordered.numel() else [0.0] * 3
    return divergence.contiguous(), float(quartiles[1] + 1.5 * (quartiles[2] - quartiles[0]))


def _ram(job: Job, statistics: Statistics) -> Elementwise:
    return Elementwise("ram", job.base, job.sources, job.shared["epsilon"], np.ones(len(job.sources)))


def _ramplus(job: Job, statistics: Statistics) -> Elementwise:
    epsilon = job.shared["epsilon"]

    def counts() -> tuple[np.ndarray, np.ndarray]:
        theta = statistics.get(job.base).float()
        active = torch.stack([(statistics.get(s).float() - theta).abs() > epsilon for s in job.sources]).flatten(1)
        owners = active.sum(0)
        return tuple((active & mask).sum(1).double().cpu().numpy() for mask in (owners > 1, owners == 1))

    shared, unique = statistics.memo(("ramplus_tl", job.base, job.sources, epsilon), counts)
    rho = np.clip(shared / np.maximum(unique, epsilon), 0, job.shared["alpha"])
    return Elementwise("ram", job.base, job.sources, epsilon, 1 + job.shared["r"] * rho)
