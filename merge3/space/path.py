"""The space of paths (Akiba et al. 2024, data flow space): which layers of which models, in what order, and how much
the state is scaled on the way.

Slots are all models' layers in order, laid out `repetitions` times; a genome has a bit for each, and its path is the
slots that are on, from first to last. The first model's layers that are pinned stand before all slots, or after them.
Every slot and every pinned layer has a scale, of the state that enters it; those of slots that are off mean nothing.
Embedding, final norm and head are the first model's. A genome is [a bit for every slot, a scale for every hop there can
be]; a bit is on above one half, and the search begins two first steps away from that.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

import numpy as np

from merge3.checkpoint.layout import Layout
from merge3.errors import ConfigError, Merge3Warning
from merge3.hops import SCALE, Hop, hops_of, outside_of, path_recipe, read_hops, writers_of
from merge3.methods.averages import AS_IT_IS
from merge3.recipe import ModelRef, Recipe
from merge3.space.definition import SpaceDefinition

SLOT = "slot"
LOW, HIGH = 0.5, 2.0  # of scales
SLOTS = 100_000
ON, OFF = 5 / 6, 1 / 6  # where a search begins: two steps of 1/6 away from where a bit changes
# What says nothing of a path, and so is not said: key -> values that say nothing.
_OF_PARAMETERS = {
    "layer_granularity": (0, 1),
    "filters": ((),),
    "smooth": (False,),
    "normalize": (None,),
    "preset": ("layerwise",),
    "tower": ({},),
}


class PathSpace:
    """See merge3.space.Space. places: the hop that each slot is when it is on; before, after: pinned hops; writers:
    parts of the names of tensors that write to the state; bits: which numbers are bits, bool [size]."""

    def __init__(self, definition: SpaceDefinition, layout: Layout):
        self.definition, self.layout = definition, layout
        self.genes = definition.genes or (SLOT, SCALE)
        self.models = tuple(dict.fromkeys(str(ModelRef.parse(m)) for m in _models(definition)))
        _check(definition, self.genes)
        self.writers, self.merged = writers_of(layout.layer_names), definition.merges()
        self.low, self.high = _scales(definition)
        first, layers = self.models[0], layout.layers
        head, tail = _pinned(definition, layers)
        self.before = tuple(Hop(first, layer) for layer in range(head))
        self.after = tuple(Hop(first, layer) for layer in range(layers - tail, layers))
        once = [Hop(model, layer) for model in self.models for layer in range(layers)]
        if len(once) * definition.repetitions > SLOTS:
            found = f"{definition.repetitions} times {len(once)} layers"
            raise ConfigError("genome: repetitions", found, f"at most {SLOTS:,} slots")
        self.places = tuple(once * definition.repetitions)
        self.slots = len(self.places)
        self.scaled = SCALE in self.genes
        self.hops = len(self.before) + self.slots + len(self.after)
        self.size = self.slots + (self.hops if self.scaled else 0)
        self.bits = np.arange(self.size) < self.slots
        _check_most(definition.max_hops, layers)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """See Space."""
        return np.where(self.bits, 0.0, self.low), np.where(self.bits, 1.0, self.high)

    def initial(self) -> np.ndarray:
        """The first model's layers once, in order, scales 1."""
        own = range(len(self.before), self.layout.layers - len(self.after))
        genome = np.where(self.bits, OFF, 1.0)
        genome[list(own)] = ON
        return genome

    def path(self, genome: Sequence[float]) -> tuple[Hop, ...]:
        """The hops of a genome. Of more than `max_hops` those slots stay whose numbers are highest, the first of
        equals. Raises ConfigError on a wrong length, a number that is not finite, or no hop at all."""
        genome = np.asarray(genome, dtype=np.float64)
        if genome.shape != (self.size,):
            raise ConfigError("genome", f"{genome.shape[0] if genome.ndim else 0} values", f"{self.size}")
        if not np.isfinite(genome).all():
            position = int(np.flatnonzero(~np.isfinite(genome))[0])
            raise ConfigError("genome", f"value {position} is not finite", "numbers")
        bits, scales = genome[: self.slots], np.ones(self.hops)
        if self.scaled:
            scales = np.clip(genome[self.slots :], self.low, self.high)
        on = np.flatnonzero(bits > 0.5)
        most = self.definition.max_hops
        if most is not None:
            room = max(0, most - len(self.before) - len(self.after))
            on = np.sort(on[np.argsort(-bits[on], kind="stable")[:room]])
        first, last = len(self.before), len(self.before) + self.slots
        hops = [hop._replace(scale=float(s)) for hop, s in zip(self.before, scales)]
        hops += [self.places[slot]._replace(scale=float(scales[first + slot])) for slot in on]
        hops += [hop._replace(scale=float(s)) for hop, s in zip(self.after, scales[last:])]
        if not hops:
            raise ConfigError("genome", "an empty path", "at least one slot that is on")
        return tuple(hops)

    def cost(self, recipe: Recipe) -> float:
        """Of a forward, in forwards of the first model."""
        hops = read_hops(recipe)
        return len(hops) / self.layout.layers if hops is not None else 1.0

    def recipe(self, genome: Sequence[float]) -> Recipe:
        """See Space."""
        d = self.definition
        words = {"dtype": d.dtype, "tokenizer": d.tokenizer, "chat_template": d.chat_template}
        return path_recipe(self.path(genome), self.models[0], self.writers, merged=self.merged, **words)

    def genome(self, recipe: Recipe) -> np.ndarray:
        """See Space: bits are 0 or 1, and scales of slots that are off 1. Raises ConfigError for what is no path of
        this space."""
        return self._placed(recipe, "recipe")

    def project(self, recipe: Recipe, where: str = "recipe", unmerged: Collection[str] = ()) -> np.ndarray:
        """See Space. Bits are as far from one half as in `initial`; scales outside the bounds are moved to them."""
        genome = self._placed(recipe, where)
        if not self.scaled and any(hop.scale != 1.0 for hop in hops_of(recipe, self.writers) or ()):
            raise ConfigError(f"{where}: scale", "found scales", "none: the genome's `genes` fix them at 1")
        low, high = self.bounds()
        genome = np.where(self.bits, np.where(genome > 0.5, ON, OFF), genome)
        if ((genome < low) | (genome > high)).any():
            line = f"{where}: scales outside what the search may vary are moved to {self.low:g} .. {self.high:g}"
            warnings.warn(line, Merge3Warning, stacklevel=2)
        return np.clip(genome, low, high)

    def uniform_recipe(self) -> Recipe:
        """See Space: the first model as it is."""
        return self.recipe(self.initial())

    def _placed(self, recipe: Recipe, where: str) -> np.ndarray:
        """A recipe's hops in the first slots that have them, in order."""
        hops = hops_of(recipe, self.writers)
        if hops is None:
            found = f"found {recipe.method}" + (" with `models`" if recipe.whole else "")
            expected = f"{AS_IT_IS} slices of one model each, with scales above 0 on {' and '.join(self.writers)}"
            raise ConfigError(f"{where}: merge_method", found, expected, "as best.yaml of a search for a path")
        if set(outside_of(recipe)) != {self.models[0]}:
            found = f"embedding and head of {' and '.join(dict.fromkeys(outside_of(recipe)))}"
            raise ConfigError(f"{where}: slices", found, f"those of {self.models[0]}, the genome's first model")
        bare = [hop._replace(scale=1.0) for hop in hops]
        head, tail = len(self.before), len(self.after)
        first, middle, last = bare[:head], bare[head : len(bare) - tail], bare[max(head, len(bare) - tail) :]
        if (tuple(first), tuple(last)) != (self.before, self.after):
            expected = f"the first {head} layers of {self.models[0]} first, its last {tail} last: they are pinned"
            raise ConfigError(f"{where}: slices", "found other layers", expected)
        slots, reached = [], 0
        for number, hop in enumerate(middle, head):
            place = next((i for i in range(reached, self.slots) if self.places[i] == hop), None)
            if place is None:
                found = f"layer {hop.layer} of {hop.model} as hop {number}"
                expected = f"layers of {', '.join(self.models)} in this order, {self.definition.repetitions} times"
                raise ConfigError(f"{where}: slices", found, expected, "more `repetitions` in the genome")
            slots.append(place)
            reached = place + 1
        genome = np.where(self.bits, 0.0, 1.0)
        genome[slots] = 1.0
        if self.scaled:
            places = [*range(head), *(head + slot for slot in slots), *range(self.hops - tail, self.hops)]
            genome[[self.slots + place for place in places]] = [hop.scale for hop in hops]
        return genome


def hop_count(space: PathSpace, genome: Sequence[float]) -> int:
    """How many layers a genome's path goes through: what it costs to run, in layers."""
    return len(space.path(genome))


def _models(definition: SpaceDefinition) -> tuple[str, ...]:
    """The endpoints in order, the base first where one is named."""
    return definition.models if definition.base is None else (definition.base, *definition.models)


def _check(definition: SpaceDefinition, genes: Sequence[str]) -> None:
    if definition.method != AS_IT_IS:
        expected = f"{AS_IT_IS}, or none: layers of a path are as they are"
        raise ConfigError("genome: merge_method", f"found {definition.method}", expected)
    for key, nothing in _OF_PARAMETERS.items():
        if getattr(definition, key) not in nothing:
            raise ConfigError(f"genome: {key}", f"found {getattr(definition, key)}", "none in a search for a path")
    for gene in genes:
        if gene not in (SLOT, SCALE):
            raise ConfigError("genome: genes", f"found {gene!r}", f"{SLOT}, or {SLOT} and {SCALE}")
    if SLOT not in genes:
        raise ConfigError("genome: genes", f"found {', '.join(genes)}", f"{SLOT} among them")
    if definition.repetitions < 1:
        raise ConfigError("genome: repetitions", f"found {definition.repetitions}", "1 or more")


def _scales(definition: SpaceDefinition) -> tuple[float, float]:
    for gene in definition.bounds:
        if gene != SCALE:
            raise ConfigError("genome: bounds", f"found {gene!r}", f"{SCALE}")
    low, high = definition.bounds.get(SCALE, (LOW, HIGH))
    if low <= 0:
        found = f"scales from {low:g}"
        hint = "a norm turns the sign of what it reads, so other scales do not fold into weights"
        raise ConfigError(f"genome: bounds: {SCALE}", found, "scales above 0", hint)
    if not low <= 1 <= high:
        found = f"from {low:g} to {high:g}"
        raise ConfigError(f"genome: bounds: {SCALE}", found, "1 among them, where a search begins")
    return low, high


def _pinned(definition: SpaceDefinition, layers: int) -> tuple[int, int]:
    pinned = tuple(definition.pinned) or (0, 0)
    if layers == 0:
        raise ConfigError("genome: models", "no stack of layers, an empty path", "models with layers")
    if len(pinned) != 2 or min(pinned) < 0 or sum(pinned) > layers:
        found = f"found {list(pinned)}"
        expected = f"[first, last]: how many of the first model's {layers} layers begin every path, how many end it"
        raise ConfigError("genome: pinned", found, expected)
    return pinned


def _check_most(most: int | None, layers: int) -> None:
    if most is not None and most < layers:
        raise ConfigError("genome: max_hops", f"found {most}", f"{layers} or more: a search begins at the first model")
