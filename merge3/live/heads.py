"""Heads of a live classifier: tensors outside the backbone. Where all endpoints' heads answer the same question a
recipe merges them like any tensor; else every endpoint has its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from merge3.pool import Pool


def own_heads(pool: Pool) -> bool:
    """Whether endpoints answer with heads of their own, which no recipe merges."""
    return any(name in pool.fixed for name in pool.heads.get(pool.base, ()))


class Labelled(Protocol):
    """What a head is taken from: a checkpoint, or what stands for one."""

    config: Mapping[str, Any]

    def get(self, name: str) -> torch.Tensor:
        """See Checkpoint."""


class Heads:
    """Which head a live model has. shown: the endpoint whose it is, None for the merge's own; the base's at first.
    lent: heads of models that are no endpoints of the pool: name -> (its checkpoint, the head's tensors).
    merged: the merge's own, for a swap to write: base's names -> tensors; empty where no recipe merges heads.

    A head's tensors have one Parameter for each shape they come in, for as long as this lives: an endpoint's head is
    copied into the Parameter of its shape, and only where shapes differ does the model get another one.
    """

    def __init__(self, model: torch.nn.Module, pool: Pool, weights: Mapping[str, torch.Tensor]):
        self.model, self.pool = model, pool
        self.shown: str | None = pool.base
        self.lent: dict[str, tuple[Labelled, Sequence[str]]] = {}
        names = [name for name in pool.heads.get(pool.base, ()) if name in weights and name not in pool.fixed]
        self.merged = {name: weights[name].clone() for name in names}
        self._parameters: dict[tuple[str, torch.Size], torch.nn.Parameter] = {}

    def show(self, endpoint: str | None) -> None:
        """Put an endpoint's head on the model, with its labels; an endpoint without one changes nothing. None: the
        merge's own, which is the base's where no recipe merges heads."""
        if endpoint is None and self.merged:
            self._put(self.pool.base_checkpoint, self.merged)
            self.shown = None
            return
        endpoint = endpoint or self.pool.base
        checkpoint, names = self.lent.get(endpoint, (None, ()))
        if endpoint in self.pool.heads:
            checkpoint, names = self.pool.endpoints[endpoint], self.pool.heads[endpoint]
        if endpoint == self.shown or not names:
            return
        self._put(checkpoint, {name: checkpoint.get(name) for name in names})
        self.shown = endpoint

    def show_merged(self) -> None:
        """Put the merge's own head on the model, where recipes merge heads."""
        if self.merged:
            self.show(None)

    def _put(self, labelled: Labelled, tensors: Mapping[str, torch.Tensor]) -> None:
        """labelled: the checkpoint whose labels these are."""
        for name, tensor in tensors.items():
            owner, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(owner)
            parameter = self._parameter(name, tensor.shape, getattr(module, attribute, None))
            parameter.data.copy_(tensor)
            setattr(module, attribute, parameter)
            if isinstance(module, torch.nn.Linear):
                module.out_features, module.in_features = module.weight.shape
        self.model.config.label2id = dict(labelled.config.get("label2id") or {})
        labels = len(self.model.config.label2id) or self.model.config.num_labels
        if hasattr(self.model, "num_labels"):
            self.model.num_labels = labels

    def _parameter(self, name: str, shape: torch.Size, current: torch.nn.Parameter | None) -> torch.nn.Parameter:
        if current is not None:
            self._parameters.setdefault((name, current.shape), current)
        if (name, shape) not in self._parameters:
            dtype = next(self.model.parameters()).dtype
            empty = torch.empty(shape, dtype=dtype, device=self.pool.device)
            self._parameters[name, shape] = torch.nn.Parameter(empty, requires_grad=False)
        return self._parameters[name, shape]
