"""Layers of a live model in any order: a light module per hop over the pool's own tensors, nothing copied.

A layer of an endpoint is built once, as the live model's own layer is, with the endpoint's tensors for parameters, and
called wherever a path comes by. Before each call its attention is told which hop this is, so that every hop has keys
and values of its own, of a layer that comes twice too.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from merge3.checkpoint.architecture import configuration
from merge3.checkpoint.layout import Ref
from merge3.errors import BadInput, CheckpointError, ConfigError
from merge3.hops import TYPES, Hop
from merge3.pool import Pool

# What layers compute with beside their weights: a path computes all of them with the base's.
_SETTINGS = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act",
    "activation_function", "rms_norm_eps", "layer_norm_epsilon", "rope_parameters", "sliding_window", "layer_types",
    "attention_bias", "mlp_bias", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "n_inner",
)  # fmt: skip
_RESIDENT = "a budget that keeps all layers where they are used: a path takes them as they lie"


class Path:
    """What a live model's stack is now: its own layers, or hops. hops: of the path it follows, None without one."""

    def __init__(self, model: torch.nn.Module, pool: Pool):
        self.model, self.pool = model, pool
        self.hops: tuple[Hop, ...] | None = None
        self._own: torch.nn.ModuleList | None = None
        self._layers: dict[tuple[str, int], torch.nn.Module] = {}
        self._memory = pool.memory  # the plan under which these were built
        self._settings: dict[str, Any] = {}  # of endpoints
        self._checked: set[str] = set()
        self._held = pool.memory, set[str]()  # a plan of memory, and whose layers are all resident under it

    def check(self, models: Iterable[str]) -> None:
        """Raises ConfigError where no path can go through layers of these endpoints."""
        models = list(models)
        self._check_alike([model for model in models if model not in self._checked])
        if self._held[0] is not self.pool.memory:
            self._held = self.pool.memory, set()
        for model in models:
            if model not in self._held[1]:
                self._check_resident(model)
                self._held[1].add(model)

    def _check_resident(self, model: str) -> None:
        layout = self.pool.layouts[model]
        for name in self.pool.endpoints[model].tensors:
            if layout.layer_of(name) is not None and not self.pool.resident((Ref(model, name),)):
                raise ConfigError("memory_budget", f"{name!r} of {model} is streamed", _RESIDENT)

    def _check_alike(self, left: Sequence[str]) -> None:
        if not left:
            return
        if self.pool.compacted.experts:
            found = f"a path, with experts held as {self.pool.compacted.experts}"
            raise ConfigError("genome: space", found, "full: it takes layers as they lie in the pool")
        own, kind = self._said(self.pool.base), self.pool.base_checkpoint.config.get("model_type")
        if kind not in TYPES or not self.model.can_generate():
            found = f"{self.pool.base} is a {type(self.model).__name__}"
            raise ConfigError("genome: space", found, f"a language model of type {', '.join(TYPES)}")
        if getattr(own, "scale_attn_by_inverse_layer_idx", False):
            found = f"{self.pool.base}: attention is scaled by the layer's number"
            raise ConfigError("genome: space", found, "layers that compute alike wherever they stand")
        for model in left:
            if model not in self.pool.endpoints:
                raise BadInput("genome: models", f"found {model!r}", ", ".join(self.pool.endpoints))
            other = self._said(model)
            for key in ("model_type", *_SETTINGS):
                mine, theirs = (getattr(settings, key, None) for settings in (own, other))
                if mine != theirs:
                    found = f"{model}: {key} is {theirs!r}, {mine!r} in {self.pool.base}"
                    raise ConfigError("genome: models", found, "models whose layers compute alike")
            self._checked.add(model)

    def _said(self, model: str) -> Any:
        """An endpoint's configuration, defaults filled in."""
        if model not in self._settings:
            self._settings[model] = configuration(self.pool.endpoints[model].config)
        return self._settings[model]

    def follow(self, hops: Sequence[Hop]) -> None:
        """Make these the model's stack. Its own layers wait beside it. Raises CheckpointError where a layer lacks a
        tensor, BadInput where one is streamed."""
        if self.pool.memory is not self._memory:  # tensors may lie elsewhere now
            self._layers.clear()
            self._memory = self.pool.memory
        own = self._stack() if self._own is None else self._own
        modules = []
        for index, hop in enumerate(hops):
            modules.append(_Hop(self._layer(own, hop.model, hop.layer), index, hop.scale))
        self._own = own
        self._put(torch.nn.ModuleList(modules), [hop.layer for hop in hops])
        self.hops = tuple(hops)

    def leave(self) -> None:
        """Give the model its own layers back."""
        if self._own is not None:
            self._put(self._own, range(len(self._own)))
        self._own = self.hops = None

    def _stack(self) -> torch.nn.ModuleList:
        return self.model.get_submodule(self._place())

    def _place(self) -> str:
        """Where the stack is: a checkpoint of the backbone alone has it under a shorter name."""
        prefix = self.pool.layouts[self.pool.base].prefix
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.ModuleList) and (name == prefix or name.endswith(f".{prefix}")):
                return name
        raise CheckpointError(self.pool.base, f"no stack {prefix!r} in {type(self.model).__name__}", "its layers there")

    def _put(self, stack: torch.nn.ModuleList, layers: Sequence[int]) -> None:
        """layers: the number in its model of each, whose kind of attention it has."""
        owner, _, attribute = self._place().rpartition(".")
        setattr(self.model.get_submodule(owner), attribute, stack)
        settings = self.model.config.get_text_config()
        settings.num_hidden_layers = len(stack)
        own = self._said(self.pool.base).get_text_config()
        if getattr(own, "layer_types", None) is not None:
            settings.layer_types = [own.layer_types[layer] for layer in layers]

    def _layer(self, own: torch.nn.ModuleList, model: str, layer: int) -> torch.nn.Module:
        """An endpoint's layer over its tensors in the pool; in the live model's dtype, where that is another, once."""
        if (model, layer) not in self._layers:
            template, layout = own[layer], self.pool.layouts[model]
            known: dict[int, Any] = {id(buffer): buffer for buffer in template.buffers()}
            known |= {id(module.config): module.config for module in template.modules() if hasattr(module, "config")}
            known |= {id(module._forward_pre_hooks): OrderedDict() for module in template.modules()}
            for name, parameter in template.named_parameters():
                ref = Ref(model, layout.layer_tensor(layer, name))
                if not self.pool.has(ref):
                    raise CheckpointError(model, f"no tensor {ref.tensor!r}", "every tensor of the base's layers")
                if not self.pool.resident((ref,)):
                    raise BadInput("memory_budget", f"{ref.tensor!r} of {model} is streamed", _RESIDENT)
                tensor = self.pool.get(ref).to(parameter.dtype)
                known[id(parameter)] = torch.nn.Parameter(tensor, requires_grad=False)
            self._layers[model, layer] = copy.deepcopy(template, known)
        return self._layers[model, layer]


class _Hop(torch.nn.Module):
    """A layer as the hop of this number. The layer may be another hop's too."""

    def __init__(self, layer: torch.nn.Module, index: int, scale: float):
        super().__init__()
        self.layer, self.index, self.scale = layer, index, scale
        self._attending = [module for module in layer.modules() if hasattr(module, "layer_idx")]
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's, of scaled states."""
        for module in self._attending:
            module.layer_idx = self.index
        if self.scale != 1.0:
            states = states * self.scale
        return self.layer(states, *args, **kwargs)
