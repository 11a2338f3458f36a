"""What a merge needs to know of task vectors, computed once and kept: they never change between
candidates, only coefficients do.

Requests are made in batches (`prefetch_*`), so that one kernel call serves all tensors of a model;
the singular accessors then read the cache. Keys are the tensors' references, whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from merge3 import kernels

Key = Hashable
_LOW, _BINS = 16, 2**16  # a magnitude's bits are found in two halves
InGroups = Callable[[Iterable, Callable[[Any], Iterable[Key]]], Iterable[list]]


class Order(NamedTuple):
    """One order statistic of |τ| (or of the variance across experts); see kernels.OrderStatistics."""

    value: float
    greater: int
    equal: int
    l1_greater: float
    total: float
    nonzero: int


class Statistics:
    """Caches over a function that gives the tensor of a key. in_groups(requests, keys_of): the requests in groups
    whose tensors may be in memory together."""

    def __init__(
        self, get: Callable[[Key], torch.Tensor], in_groups: InGroups = lambda requests, keys_of: [list(requests)]
    ):
        self.get, self.in_groups = get, in_groups
        self._gram: dict[tuple, np.ndarray] = {}
        self._order: dict[tuple, dict[int, Order]] = {}
        self._ranks: dict[tuple, tuple[torch.Tensor, np.ndarray]] = {}
        self._memo: dict[tuple, object] = {}

    def forget(self, key: Key) -> None:
        """Drop everything that involves a tensor."""
        for cache in (self._gram, self._order, self._ranks, self._memo):
            for stale in [k for k in cache if key in k or any(key in part for part in k if isinstance(part, tuple))]:
                del cache[stale]

    # -- Gram matrices of [θ, τ_1, .., τ_K]: float64 [K+1, K+1]

    def prefetch_gram(self, requests: Iterable[tuple[Key | None, tuple[Key, ...]]]) -> None:
        """(base or None, experts): Gram matrices of all that are not known yet, in as few calls as fit."""
        by_shape: dict[tuple, list] = {}
        for base, experts in dict.fromkeys(requests):
            if (base, experts) not in self._gram:
                by_shape.setdefault((base is None, len(experts)), []).append((base, experts))
        for (no_base, _), alike in by_shape.items():
            for group in self.in_groups(alike, lambda request: (request[0], *request[1])):
                bases = [] if no_base else [self.get(base) for base, _ in group]
                grams = kernels.gram(bases, [self.get(e) for _, experts in group for e in experts], len(group))
                self._gram.update(zip(group, grams.numpy()))

    def gram(self, base: Key | None, experts: tuple[Key, ...]) -> np.ndarray:
        """Float64 [K+1, K+1] of [θ, τ_1, .., τ_K]; θ = 0 where base is None."""
        self.prefetch_gram([(base, experts)])
        return self._gram[base, experts]

    def gram_of_rows(self, base: Key | None, experts: tuple[Key, ...], columns: bool = False) -> np.ndarray:
        """The Gram matrix of each row (last dimension), or column (first): float64 [rows, K+1, K+1]."""
        key = ("columns" if columns else "rows", base, experts)
        if key not in self._memo:
            views = [rows_of(self.get(e), columns) for e in experts]
            flat = [row for rows in zip(*views) for row in rows]
            bases = list(rows_of(self.get(base), columns)) if base is not None else []
            self._memo[key] = kernels.gram(bases, flat, len(views[0])).numpy()
        return self._memo[key]

    # -- order statistics

    def prefetch_order(self, requests: Iterable[tuple[Key | None, Key, Iterable[int]]]) -> None:
        """(base or None, expert, ranks): order statistics that are not known yet, in as few calls as fit."""
        wanted: dict[tuple, set[int]] = {}
        for base, expert, ranks in requests:
            cached = self._order.get((base, expert), ())
            missing = [rank for rank in ranks if rank not in cached]
            if missing:
                wanted.setdefault((base, expert), set()).update(missing)
        by_base: dict[bool, list] = {}
        for pair, ranks in wanted.items():
            by_base.setdefault(pair[0] is None, []).append((pair, sorted(ranks)))
        for no_base, alike in by_base.items():
            for group in self.in_groups(alike, lambda request: request[0]):
                self._find_order(no_base, group)

    def _find_order(self, no_base: bool, group: list[tuple[tuple, list[int]]]) -> None:
        width = max(len(ranks) for _, ranks in group)
        table = torch.tensor([ranks + [ranks[-1]] * (width - len(ranks)) for _, ranks in group])
        bases = [] if no_base else [self.get(base) for (base, _), _ in group]
        found = kernels.order_statistics(bases, [self.get(expert) for (_, expert), _ in group], table)
        columns = [x.squeeze(1).tolist() for x in (found.value, found.greater, found.equal, found.l1_greater)]
        totals, nonzeros = found.total[:, 0].tolist(), found.nonzero[:, 0].tolist()
        for i, (pair, ranks) in enumerate(group):
            cache = self._order.setdefault(pair, {})
            for j, rank in enumerate(ranks):
                cache[rank] = Order(*(c[i][j] for c in columns), totals[i], nonzeros[i])

    def order(self, base: Key | None, expert: Key, rank: int) -> Order:
        """The rank-th largest |τ| of one expert, 1-based."""
        found = self._order.get((base, expert), {}).get(rank)
        if found is None:
            self.prefetch_order([(base, expert, (rank,))])
            found = self._order[base, expert][rank]
        return found

    def prefetch_variance(self, requests: Iterable[tuple[Key, tuple[Key, ...], int]]) -> None:
        """(base, experts, rank): order statistics of the variance across experts, one call for all."""
        by_count: dict[int, list] = {}
        for request in dict.fromkeys(requests):
            if ("variance", *request) not in self._memo:
                by_count.setdefault(len(request[1]), []).append(request)
        for alike in by_count.values():
            for group in self.in_groups(alike, lambda request: (request[0], *request[1])):
                self._order_variances(group)

    def _order_variances(self, group: list[tuple[Key, tuple[Key, ...], int]]) -> None:
        found = kernels.order_statistics(
            [self.get(base) for base, _, _ in group],
            [self.get(e) for _, experts, _ in group for e in experts],
            torch.tensor([[rank] for *_, rank in group]),
            "variance",
        )
        columns = (found.value, found.greater, found.equal, found.l1_greater, found.total, found.nonzero)
        for request, *row in zip(group, *(c.flatten().tolist() for c in columns)):
            self._memo[("variance", *request)] = Order(*row)

    def variance_order(self, base: Key, experts: tuple[Key, ...], rank: int) -> Order:
        """The rank-th largest variance across experts."""
        self.prefetch_variance([(base, experts, rank)])
        return self._memo["variance", base, experts, rank]

    # -- ranks within rows

    def prefetch_ranks(self, requests: Iterable[tuple[Key, Key]]) -> None:
        """(base, expert): rank tables of all that are not known yet, in as few calls as fit."""
        missing = [pair for pair in dict.fromkeys(requests) if pair not in self._ranks]
        for group in self.in_groups(missing, lambda pair: pair):
            if group:
                tables, bin_l1 = kernels.rank_tables(
                    [self.get(base) for base, _ in group], [self.get(expert) for _, expert in group], len(group)
                )
                self._ranks.update(zip(group, zip(tables, bin_l1[:, 0].numpy())))

    def ranks(self, base: Key, expert: Key) -> tuple[torch.Tensor, np.ndarray]:
        """The rank table of one task vector, and Σ|τ| per bin of rank [RANK_BINS]."""
        self.prefetch_ranks([(base, expert)])
        return self._ranks[base, expert]

    def memo(self, key: tuple, compute: Callable[[], object]) -> object:
        """Anything else a method derives from tensors; `key` must hold the references involved."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]


def rows_of(tensor: torch.Tensor, columns: bool = False) -> torch.Tensor:
    """A tensor as [rows, last dimension]; a vector is one row. columns: a copy, with the first and last
    dimensions exchanged."""
    if columns and tensor.dim() >= 2:
        tensor = tensor.transpose(0, -1).contiguous()
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() >= 2 else tensor.reshape(1, -1)


def kept_from(read: Callable[[], Iterable[tuple[Key, torch.Tensor]]], share: float) -> dict[Key, float]:
    """Of each key, the magnitude from which on `share` of all its elements are kept, and one more, as
    kthvalue(n − int(n · share)) has it; 0.0 where all are. read: (key, magnitudes, float32), of a key as many tensors
    as it has, each time it is called; it is twice."""
    upper: dict[Key, torch.Tensor] = {}
    for key, tensor in read():
        counts = upper.setdefault(key, torch.zeros(_BINS, dtype=torch.int64))
        counts += torch.bincount(_bits(tensor) >> _LOW, minlength=_BINS).cpu()
    found, high, places = dict.fromkeys(upper, 0.0), {}, {}
    for key, counts in upper.items():
        count = int(counts.sum())
        place = int(count * share) + 1  # from the largest
        if place <= count:
            high[key], places[key] = _find(counts, place)
    lower = {key: torch.zeros(_BINS, dtype=torch.int64) for key in high}
    for key, tensor in read() if high else ():
        if key in high:
            bits = _bits(tensor)
            bits = bits[bits >> _LOW == high[key]] & (_BINS - 1)
            lower[key] += torch.bincount(bits, minlength=_BINS).cpu()
    for key, counts in lower.items():
        low, _ = _find(counts, places[key])
        found[key] = float(torch.tensor((high[key] << _LOW) | low, dtype=torch.int32).view(torch.float32))
    return found


def _find(counts: torch.Tensor, place: int) -> tuple[int, int]:
    """(the bin of the place-th element from the top, its place within the bin)"""
    above = counts.flip(0).cumsum(0)
    at = int((above >= place).nonzero()[0])
    return len(counts) - 1 - at, place - (int(above[at - 1]) if at else 0)


def _bits(magnitudes: torch.Tensor) -> torch.Tensor:
    """Of floats that are not negative: integers in the same order, int64."""
    return magnitudes.flatten().contiguous().view(torch.int32).long()
