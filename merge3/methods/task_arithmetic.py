"""Generalised task arithmetic: sparsify task vectors, elect signs, sum with weights, scale.

One family of eight methods in mergekit's names and defaults. What differs is a row of FAMILY; formulas
are in csrc/merge_math.h. Ilharco et al. 2022 (task arithmetic), Yadav et al. 2023 (TIES), Yu et al. 2024
(DARE), Deep et al. 2024 (DELLA), Davari & Belilovsky 2023 (Model Breadcrumbs).
"""

from __future__ import annotations

from functools import partial

import numpy as np

from merge3.errors import RecipeError
from merge3.kernels import (
    DENSITY,
    EPSILON,
    HI,
    HI_SHARE,
    LO,
    LO_SHARE,
    RANK_BINS,
    RESCALE,
    Modes,
)
from merge3.methods.base import WEIGHT_OF_MODEL, ByHand, Fused, Gene, Job, Method, Parameter, equal_share, neutral
from merge3.statistics import Statistics

PLAIN_SUM = "task_arithmetic"  # the member of the family that sparsifies, elects and normalizes nothing
ELECTED = "ties"  # the one that keeps the largest and elects signs
_TINY = 1e-7  # L1 norms below this are not rescaled
_DENSITY = Gene(0.05, 1.0, start=0.5, steps=256, folded=True)
_LAMBDA = Gene(0.0, 2.0, start=1.0)
_GAMMA = Gene(0.0, 0.2, start=0.01)
_EPSILON = Gene(0.01, 0.2, start=0.1)

#          name                sparsify     elect   normalize rescale  reference
FAMILY = {
    PLAIN_SUM: ("all", "none", False, False, "https://arxiv.org/abs/2212.04089"),
    ELECTED: ("magnitude", "sum", True, False, "https://arxiv.org/abs/2306.01708"),
    "dare_linear": ("random", "none", False, True, "https://arxiv.org/abs/2311.03099"),
    "dare_ties": ("random", "sum", False, True, "https://arxiv.org/abs/2311.03099"),
    "della": ("ranked", "sum", True, True, "https://arxiv.org/abs/2406.11617"),
    "della_linear": ("ranked", "none", False, True, "https://arxiv.org/abs/2406.11617"),
    "breadcrumbs": ("band", "none", False, False, "https://arxiv.org/abs/2312.06795"),
    "breadcrumbs_ties": ("band", "sum", False, False, "https://arxiv.org/abs/2312.06795"),
}
_SUMMARY = {
    "all": "sum of weighted task vectors",
    "magnitude": "keep each task vector's largest elements",
    "random": "keep a random share of each task vector",
    "ranked": "keep at random, larger elements more often",
    "band": "drop each task vector's largest and smallest elements",
}
# What one would pick by hand: the examples of mergekit's documentation, and Ilharco et al. 2022 for the scale of task
# arithmetic.
_BY_HAND = {
    "task_arithmetic": {
        "task_arithmetic": ByHand({"weight": 0.3}),
        "task_arithmetic_full": ByHand({"weight": 1.0}),
    },
    "ties": {"ties": ByHand({"weight": 1.0}, {"density": 0.5, "normalize": True})},
    "dare_ties": {"dare_ties": ByHand({"weight": equal_share}, {"density": 0.5})},
}
_EVOLVE_NORMALIZES = ("ties", "dare_ties")
# What the others make of the method that drops nothing: the same sum, of what they keep.
_LIKE = {"task_arithmetic": ("weight", "lambda", "normalize")}


def methods() -> list[Method]:
    """The eight rows of FAMILY."""
    return [_method(name, *row) for name, row in FAMILY.items()]


def _method(name: str, sparsify: str, elect: str, normalize: bool, rescale: bool, reference: str) -> Method:
    whole = sparsify == "all"  # nothing is dropped: there is nothing to make up for either
    kept = "share of a task vector that is kept"
    parameters = {
        "weight": Parameter(float, "expert", help="scale of an expert's task vector", gene=WEIGHT_OF_MODEL),
        "density": Parameter(float, "expert", 1.0, 0.0, 1.0, help=kept, gene=_DENSITY, idle=whole),
        "lambda": Parameter(float, "shared", 1.0, help="scale of the merged task vector", gene=_LAMBDA),
        "normalize": Parameter(bool, "shared", normalize, help="divide by the sum of weights"),
        "rescale": Parameter(bool, "shared", rescale, help="make up for what was dropped (L1 norm)", idle=whole),
        "int8_mask": Parameter(bool, "shared", False, help="accepted; changes nothing", idle=True),
    }
    if sparsify == "band":
        dropped = "share of the largest that is dropped"
        parameters["gamma"] = Parameter(float, "expert", 0.01, 0.0, 1.0, help=dropped, gene=_GAMMA)
    if sparsify == "ranked":
        spread = "spread of keep probabilities"
        parameters["epsilon"] = Parameter(float, "expert", 0.15, 0.0, 1.0, help=spread, gene=_EPSILON)
    summary = _SUMMARY[sparsify] + ("" if elect == "none" else ", elect signs")
    return Method(
        name,
        summary,
        reference,
        parameters,
        partial(_step, sparsify=sparsify, elect=elect),
        prefetch=partial(_prefetch, sparsify=sparsify),
        stochastic=sparsify in ("random", "ranked"),
        searched=("weight",) if whole else ("weight", "density"),
        prefetch_search={"density": _prefetch_densities} if sparsify == "magnitude" else {},
        by_hand=_BY_HAND.get(name, {}),
        evolve_normalizes=name in _EVOLVE_NORMALIZES,
        like={} if whole else _LIKE,
    )


def _ranks(job: Job, own: dict, sparsify: str) -> tuple[int, ...]:
    """Ranks (1-based from the largest) at which an expert is cut; empty where nothing is."""
    n = job.numel
    if sparsify not in ("magnitude", "band") or not 0 < own["density"] < 1 or n == 0:
        return ()
    if sparsify == "magnitude":
        return (max(1, int(own["density"] * n)),)
    kept = int(own["density"] * n)
    top = n - kept - max(0, n - kept - int(own["gamma"] * n))
    return (top + 1, top + kept) if kept else ()


def _prefetch(jobs: list[Job], statistics: Statistics, sparsify: str) -> None:
    ranked, cut = [], []
    for job in jobs:
        for source, own in zip(job.sources, job.per_source):
            if sparsify == "ranked" and own["density"] < 1:
                ranked.append((job.base, source))
            elif ranks := _ranks(job, own, sparsify):
                cut.append((job.base, source, ranks))
    if sparsify == "ranked":
        statistics.prefetch_ranks(ranked)
    else:
        statistics.prefetch_order(cut)


def _prefetch_densities(jobs: list[Job], statistics: Statistics) -> None:
    """Thresholds at every density that a search can name, for all tensors in one pass over the weights."""
    densities = [step / _DENSITY.steps for step in range(1, _DENSITY.steps)]
    requests = []
    for job in jobs:
        ranks: set[int] = set()
        for density in densities:
            ranks.update(_ranks(job, {"density": density}, "magnitude"))
        requests += [(job.base, source, ranks) for source in job.sources]
    statistics.prefetch_order(requests)


def _step(job: Job, statistics: Statistics, sparsify: str, elect: str) -> Fused:
    c = neutral([own["weight"] for own in job.per_source])
    rescale, tables = job.shared["rescale"], []
    for row, source, own in zip(c, job.sources, job.per_source):
        density = own["density"]
        if sparsify == "magnitude" and density <= 0:  # a gradient over layers that starts at 0: nothing is kept there
            row[LO] = np.inf
        elif sparsify == "magnitude":
            for rank in _ranks(job, own, sparsify):
                order = statistics.order(job.base, source, rank)
                row[LO], row[LO_SHARE] = order.value, (rank - order.greater) / order.equal
                if rescale:
                    row[RESCALE] = _l1_ratio(order.total, order.l1_greater + (rank - order.greater) * order.value)
        elif sparsify == "band":
            _band(job, own, row, source, statistics, rescale)
        elif sparsify == "random":
            row[DENSITY] = density
            row[RESCALE] = 1 / density if rescale and density > 0 else 1.0
        elif sparsify == "ranked":
            table, bin_l1 = statistics.ranks(job.base, source)
            tables.append(table)
            if density < 1:
                low, high = density - own["epsilon"], density + own["epsilon"]
                if low <= 0 or high >= 1:
                    found = f"density ± epsilon is {low:g} to {high:g}"
                    raise RecipeError(f"{job.name}: epsilon", found, "inside (0, 1)")
                row[DENSITY], row[EPSILON] = density, own["epsilon"]
                if rescale:
                    share = low + (high - low) * (np.arange(RANK_BINS) + 0.5) / RANK_BINS
                    row[RESCALE] = _l1_ratio(float(bin_l1.sum()), float(share @ bin_l1))
    modes = Modes(sparsify, elect, job.shared["normalize"])
    return Fused(modes, job.base, job.sources, c, job.shared["lambda"], tuple(tables))


def _band(job: Job, own: dict, row: np.ndarray, source, statistics: Statistics, rescale: bool) -> None:
    if own["density"] >= 1 or job.numel == 0:
        return
    ranks = _ranks(job, own, "band")
    if not ranks:  # fewer than one element is asked for
        row[LO] = np.inf
        return
    first, last = ranks
    high, low = (statistics.order(job.base, source, r) for r in ranks)
    row[LO], row[HI] = low.value, high.value
    if low.value == high.value:  # all kept elements are equal: one share does it
        row[LO_SHARE] = (last - first + 1) / low.equal
        kept_l1 = (last - first + 1) * low.value
    else:
        row[LO_SHARE] = (last - low.greater) / low.equal
        row[HI_SHARE] = (high.greater + high.equal - (first - 1)) / high.equal
        above = high.l1_greater + (first - 1 - high.greater) * high.value
        kept_l1 = low.l1_greater + (last - low.greater) * low.value - above
    if rescale:
        row[RESCALE] = _l1_ratio(low.total, kept_l1)


def _l1_ratio(before: float, after: float) -> float:
    return before / after if before >= _TINY and after >= _TINY else 1.0
