"""The search space: genome <-> recipe, pure and exact both ways.

A genome is a flat float64 vector in the parameters' own units, laid out [group, expert, filter set,
parameter] and then [group, shared parameter]. Groups are runs of layers; the tensors before the stack
and after it (embedding; final norm and head) are groups of their own. Only densities are snapped, to
1/256: thresholds of all tensors can then be known before the search begins.

The preset `evolve` decodes as mergekit-evolve does (absolute values, densities clipped to 1), with
neither bounds nor separate groups, so its users' genomes mean the same here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from merge3.checkpoint.layout import Layout
from merge3.errors import ConfigError
from merge3.methods import METHODS, method_named
from merge3.recipe import ModelRef, Recipe, Slice, Source

DENSITY_STEPS = 256
PRESETS = ("layerwise", "sakana6", "evolve")
# Bounds of each gene; the scale of a first step follows from them (sigma is a share of the range).
BOUNDS = {
    "weight": (-0.5, 2.0), "density": (0.05, 1.0), "gamma": (0.0, 0.2), "epsilon": (0.01, 0.2),
    "lambda": (0.0, 2.0), "t": (0.0, 1.0), "select_topk": (0.05, 1.0), "scale": (0.0, 2.0),
}  # fmt: skip
# What a search starts from where the method has no default of its own.
_DEFAULT_GENES = {
    "linear": ("weight",), "task_arithmetic": ("weight",), "slerp": ("t",), "nuslerp": ("weight",),
    "multislerp": ("weight",), "sce": ("select_topk",), "nearswap": ("t",),
}  # fmt: skip


@dataclass(frozen=True)
class SpaceDefinition:
    """What to search; see `genome:` in the evolve configuration. genes: empty for the method's usual ones."""

    models: tuple[str, ...]
    method: str
    base: str | None = None
    layer_granularity: int = 1
    filters: tuple[str, ...] = ()
    smooth: bool = False
    normalize: bool | None = None
    allow_negative_weights: bool = True
    preset: str = "layerwise"
    genes: tuple[str, ...] = ()
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    tokenizer_source: str | None = None
    dtype: str | None = None

    def hash(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class Space:
    """A definition met with a model's layout. `size` is the length of a genome."""

    def __init__(self, definition: SpaceDefinition, layout: Layout):
        self.definition, self.layout = definition, layout
        method = method_named(definition.method, "genome: merge_method")
        if method.base == "required" and definition.base is None:
            raise ConfigError("genome: base_model", f"missing; {method.name} merges changes from a base", "a model")
        low, high = method.experts
        if not low <= len(definition.models) <= high:
            raise ConfigError("genome: models", f"{len(definition.models)} models", f"{low} to {high} for {method.name}")
        genes = definition.genes or _usual_genes(method.name)
        for gene in genes:
            if gene not in method.parameters or gene not in BOUNDS:
                valid = ", ".join(g for g in BOUNDS if g in method.parameters)
                raise ConfigError("genome: genes", f"{gene!r} for {method.name}", valid or "a method with parameters")
        self.own = tuple(g for g in genes if method.parameters[g].scope != "shared")
        self.shared = tuple(g for g in genes if method.parameters[g].scope == "shared")
        self.evolve = definition.preset == "evolve"
        self.ranges = self._layer_ranges()
        self.groups = len(self.ranges) + (0 if self._plain else 2)  # + embedding, + norm and head
        self.sets = len(definition.filters) + 1
        self.shape = (self.groups, len(definition.models), self.sets, len(self.own))
        self._split = int(np.prod(self.shape))
        self.size = self._split + self.groups * len(self.shared)

    @property
    def _plain(self) -> bool:
        """Groups are layer runs alone: embedding and head go with their neighbours."""
        return self.evolve or self.definition.preset == "sakana6" or len(self.ranges) == 1 or self.definition.smooth

    def _layer_ranges(self) -> list[tuple[int, int]]:
        layers, step = self.layout.layers, self.definition.layer_granularity
        if step <= 0 or self.definition.preset == "sakana6" or layers == 0:
            return [(0, layers)]
        if self.evolve and layers % step:
            raise ConfigError("genome: layer_granularity", f"{step} for {layers} layers", "a divisor of the layers")
        return [(first, min(first + step, layers)) for first in range(0, layers, step)]

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest value of every gene, float64 [size] each."""
        if self.evolve:
            return np.full(self.size, -np.inf), np.full(self.size, np.inf)
        limits = BOUNDS | {g: tuple(b) for g, b in self.definition.bounds.items()}
        if not self.definition.allow_negative_weights and "weight" not in self.definition.bounds:
            limits["weight"] = (0.0, limits["weight"][1])
        own = np.broadcast_to(np.array([limits[g] for g in self.own]).reshape(-1, 2), (*self.shape, 2))
        shared = np.broadcast_to(np.array([limits[g] for g in self.shared]).reshape(-1, 2), (self.groups, len(self.shared), 2))
        both = np.concatenate([own.reshape(-1, 2), shared.reshape(-1, 2)])
        return both[:, 0].copy(), both[:, 1].copy()

    def initial(self) -> np.ndarray:
        """The uniform merge: float64 [size]."""
        count = len(self.definition.models)
        start = {"weight": 1 / count, "density": 1.0 if self.evolve else 0.5, "gamma": 0.01, "epsilon": 0.1,
                 "lambda": 1.0, "t": 0.5, "select_topk": 1.0, "scale": 1.0}  # fmt: skip
        if self.definition.method == "nearswap":
            start["t"] = 1e-3
        own = np.broadcast_to([start[g] for g in self.own], self.shape) if self.own else np.zeros(0)
        shared = np.broadcast_to([start[g] for g in self.shared], (self.groups, len(self.shared)))
        genome = np.concatenate([np.ravel(own), np.ravel(shared)]).astype(np.float64)
        low, high = self.bounds()
        return np.clip(genome, low, high)

    def recipe(self, genome: Sequence[float]) -> Recipe:
        """The recipe of a genome. Raises ConfigError on a wrong length or a value that is not finite."""
        genome = np.asarray(genome, dtype=np.float64)
        if genome.shape != (self.size,):
            raise ConfigError("genome", f"{genome.shape[0] if genome.ndim else 0} values", f"{self.size}")
        if not np.isfinite(genome).all():
            raise ConfigError("genome", f"value {int(np.flatnonzero(~np.isfinite(genome))[0])} is not finite", "numbers")
        own = genome[: self._split].reshape(self.shape)
        shared = genome[self._split :].reshape(self.groups, len(self.shared))
        own = np.stack([self._decode(g, own[..., i]) for i, g in enumerate(self.own)], -1) if self.own else own
        shared = np.stack([self._decode(g, shared[..., i]) for i, g in enumerate(self.shared)], -1) if self.shared else shared
        d = self.definition
        parameters = {}
        if d.smooth or len(self.ranges) == 1:
            whole, parameters = self._whole(own, shared)
            slices = (whole,)
        else:
            slices = tuple(self._slice(i, own, shared) for i in range(len(self.ranges)))
        normalize = d.normalize
        if normalize is None and self.evolve:
            normalize = d.method in ("ties", "dare_ties", "linear")
        if normalize is not None and "normalize" in METHODS[d.method].parameters:
            parameters["normalize"] = normalize
        return Recipe(
            d.method, slices, ModelRef.parse(d.base) if d.base else None, parameters, d.dtype,
            tokenizer_source=d.tokenizer_source,
        )  # fmt: skip

    def genome(self, recipe: Recipe) -> np.ndarray:
        """The genome of a recipe this space made: the inverse of `recipe`, exact to the last bit."""
        own = np.zeros(self.shape)
        shared = np.zeros((self.groups, len(self.shared)))
        plan = [(i, recipe.slices[i if len(recipe.slices) > 1 else 0]) for i in range(len(self.ranges))]
        if not self._plain:
            plan = [(0, recipe.slices[0]), *((i + 1, part) for i, part in plan), (self.groups - 1, recipe.slices[-1])]
        for group, part in plan:
            by_model = {str(s.model): s.parameters for s in part.sources}
            side = self._side(group)
            for i, gene in enumerate(self.own):
                for m, model in enumerate(self.definition.models):
                    values = self._read(by_model[model][gene], side, group)
                    own[group, m, :, i] = values
            for i, gene in enumerate(self.shared):
                setting = part.parameters.get(gene, recipe.parameters.get(gene))
                shared[group, i] = self._read(setting, side, group)[-1]
        return np.concatenate([own.ravel(), shared.ravel()])

    def uniform_recipe(self) -> Recipe:
        return self.recipe(self.initial())

    # -- decoding

    def _decode(self, gene: str, values: np.ndarray) -> np.ndarray:
        if self.evolve:
            if gene == "density":
                return np.clip(np.abs(values), 1 / DENSITY_STEPS, 1.0)  # mergekit has density 0 mean nothing at all
            if gene in ("weight", "t") and not self.definition.allow_negative_weights:
                return np.abs(values)
            return values
        if gene in ("density", "select_topk"):
            return np.clip(np.round(values * DENSITY_STEPS), 1, DENSITY_STEPS) / DENSITY_STEPS
        return values

    def _side(self, group: int) -> str:
        """Whether a group is `pre` (embedding), `post` (norm, head) or a run of layers."""
        if self._plain:
            return "layers"
        return {0: "pre", self.groups - 1: "post"}.get(group, "layers")

    def _setting(self, rows: dict[str, np.ndarray]):
        """A parameter: conditions for the tensors outside the stack, then the filter sets of the layers.

        rows: side -> values [filter sets], for the sides this slice holds."""
        conditions = []
        for side, names in (("pre", self.layout.pre), ("post", self.layout.post)):
            if side in rows:
                conditions += self._filtered(rows[side], names)
        conditions += self._filtered(rows["layers"], None)
        if len(conditions) == 1 and "filter" not in conditions[0]:
            return conditions[0]["value"]
        return conditions

    def _filtered(self, values: np.ndarray, names) -> list[dict]:
        """Filter sets matter inside layers; a tensor outside takes the last set's value."""
        if names is not None:
            return [{"filter": name, "value": float(values[-1])} for name in names]
        filters = [*self.definition.filters, None]
        return [({"filter": f} if f else {}) | {"value": float(v)} for f, v in zip(filters, values)]

    def _read(self, setting, side: str, group: int) -> np.ndarray:
        if not isinstance(setting, (list, tuple)):
            return np.full(self.sets, setting)
        if not isinstance(setting[0], dict):  # smooth: one value per group
            return np.full(self.sets, setting[group])
        if side != "layers":
            name = (self.layout.pre if side == "pre" else self.layout.post)[0]
            return np.full(self.sets, next(c["value"] for c in setting if c.get("filter") == name))
        inner = setting[-self.sets :]
        return np.array([c["value"][group] if isinstance(c["value"], list) else c["value"] for c in inner])

    def _slice(self, index: int, own: np.ndarray, shared: np.ndarray) -> Slice:
        offset = 0 if self._plain else 1
        groups = {"layers": index + offset}
        if not self._plain and index == 0:
            groups["pre"] = 0
        if not self._plain and index == len(self.ranges) - 1:
            groups["post"] = self.groups - 1
        sources = []
        for m, model in enumerate(self.definition.models):
            parameters = {
                gene: self._setting({side: own[g, m, :, i] for side, g in groups.items()}) for i, gene in enumerate(self.own)
            }
            sources.append(Source(ModelRef.parse(model), self.ranges[index], parameters))
        base = self.definition.base
        if base is not None and base not in self.definition.models:
            sources.append(Source(ModelRef.parse(base), self.ranges[index]))
        parameters = {
            gene: self._setting({side: shared[g, i : i + 1].repeat(self.sets) for side, g in groups.items()})
            for i, gene in enumerate(self.shared)
        }
        return Slice(tuple(sources), None, parameters)

    def _whole(self, own: np.ndarray, shared: np.ndarray) -> tuple[Slice, dict]:
        """All layers in one slice, and global parameters: scalars, or lists that mergekit interpolates."""

        def smooth(values: np.ndarray):
            """values: [groups, sets]"""
            columns = [float(c[0]) if len(c) == 1 else [float(v) for v in c] for c in values.T]
            if len(columns) == 1:
                return columns[0]
            filters = [*self.definition.filters, None]
            return [({"filter": f} if f else {}) | {"value": c} for f, c in zip(filters, columns)]

        sources = tuple(
            Source(ModelRef.parse(model), None, {g: smooth(own[:, m, :, i]) for i, g in enumerate(self.own)})
            for m, model in enumerate(self.definition.models)
        )
        parameters = {}
        for i, gene in enumerate(self.shared):
            values = [float(v) for v in shared[:, i]]
            parameters[gene] = values[0] if len(values) == 1 else values
        return Slice(sources), parameters


def _usual_genes(method: str) -> tuple[str, ...]:
    if method in _DEFAULT_GENES:
        return _DEFAULT_GENES[method]
    return tuple(g for g in ("weight", "density") if g in METHODS[method].parameters)
