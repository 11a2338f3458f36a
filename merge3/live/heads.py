"""Heads of a live classifier: tensors outside the backbone, which no recipe merges: every endpoint has its own."""

from __future__ import annotations

import torch

from merge3.pool import Pool


class Heads:
    """Which endpoint's head a live model has. shown: that endpoint; the base's at first.

    A head's tensors have one Parameter for each shape they come in, for as long as this lives: an endpoint's head is
    copied into the Parameter of its shape, and only where shapes differ does the model get another one.
    """

    def __init__(self, model: torch.nn.Module, pool: Pool):
        self.model, self.pool = model, pool
        self.shown = pool.base
        self._parameters: dict[tuple[str, torch.Size], torch.nn.Parameter] = {}

    def show(self, endpoint: str) -> None:
        """Put an endpoint's head on the model, with its labels; an endpoint without one changes nothing."""
        if endpoint == self.shown or endpoint not in self.pool.heads:
            return
        checkpoint = self.pool.endpoints[endpoint]
        for name in self.pool.heads[endpoint]:
            owner, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(owner)
            tensor = checkpoint.get(name)
            parameter = self._parameter(name, tensor.shape, getattr(module, attribute, None))
            parameter.data.copy_(tensor)
            setattr(module, attribute, parameter)
            if isinstance(module, torch.nn.Linear):
                module.out_features, module.in_features = module.weight.shape
        self.model.config.label2id = dict(checkpoint.config.get("label2id") or {})
        labels = len(self.model.config.label2id) or self.model.config.num_labels
        if hasattr(self.model, "num_labels"):
            self.model.num_labels = labels
        self.shown = endpoint

    def _parameter(self, name: str, shape: torch.Size, current: torch.nn.Parameter | None) -> torch.nn.Parameter:
        if current is not None:
            self._parameters.setdefault((name, current.shape), current)
        if (name, shape) not in self._parameters:
            dtype = next(self.model.parameters()).dtype
            empty = torch.empty(shape, dtype=dtype, device=self.pool.device)
            self._parameters[name, shape] = torch.nn.Parameter(empty, requires_grad=False)
        return self._parameters[name, shape]
