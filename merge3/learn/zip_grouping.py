"""A matching applied to weights: M, the mean over a place's units, and U, from a place to its units, as group sums.

    M [n, 2n] = P / colsum    U [2n, n] = P       P: 1 where a unit has a place. M U = I
    W* = M_A W_A U_A + M_B W_B U_B                M along what a tensor makes, U along what it reads

Neither matrix is ever made. M has the exact counts, where the authors' code adds 1e-5 to them. ZipIt! (2305.03053),
equations 2 to 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Grouping:
    """places: int64 [2, n], see zip_matching."""

    places: torch.Tensor

    @staticmethod
    def of(places: np.ndarray) -> Grouping:
        """From a matching."""
        return Grouping(torch.from_numpy(np.ascontiguousarray(places)))

    @property
    def counts(self) -> torch.Tensor:
        """Units in each place, both models', float64 [n]."""
        return torch.bincount(self.places.flatten(), minlength=self.places.shape[1]).double()

    @property
    def one_to_one(self) -> bool:
        """Whether every place has one unit of each model."""
        order = torch.arange(self.places.shape[1])
        return all(torch.equal(own.sort().values, order) for own in self.places)

    def merged(self, tensor: torch.Tensor, model: int, dim: int) -> torch.Tensor:
        """M_m along a dimension: this model's part of every place's mean."""
        shape = [1] * tensor.dim()
        shape[dim] = -1
        return self.unmerged(tensor, model, dim) / self.counts.view(shape)

    def unmerged(self, tensor: torch.Tensor, model: int, dim: int) -> torch.Tensor:
        """U_m from the right along a dimension that reads: the sum over this model's units of every place."""
        return torch.zeros_like(tensor).index_add_(dim, self.places[model], tensor)
