"""A search space over a pool: that its models fit, and what its candidates will need of their weights."""

from __future__ import annotations

from merge3.errors import ConfigError
from merge3.joined import joined
from merge3.live.slot import Slot
from merge3.methods import METHODS
from merge3.pool import Pool
from merge3.program import compile
from merge3.space import PathSpace, Space, SpaceDefinition


def space_over(definition: SpaceDefinition, slot: Slot) -> Space:
    """The space over this pool's layout, its statistics computed. Raises ConfigError where models do not fit it."""
    pool = slot.pool
    space = Space(definition, pool.searched)
    joined(pool, space.uniform_recipe())
    _check_depths(space, pool)
    if isinstance(space, PathSpace):
        slot.path.check(space.models)
    else:
        _prefetch(space, pool)
    return space


def _check_depths(space: Space, pool: Pool) -> None:
    """A space's layer ranges are the base's: of a deeper model the rest would be lost without a word."""
    depth = space.layout.layers
    for model in space.definition.models:
        found = pool.layouts[model].layers if model in pool.layouts else depth
        if found != depth:
            raise ConfigError(
                "genome: models", f"{model} has {found} layers, the base {depth}", "models of equal depth"
            )


def _prefetch(space: Space, pool: Pool) -> None:
    """What every value that a search can name needs, for all tensors in one pass over the weights."""
    method = METHODS[space.definition.method]
    wanted = [method.prefetch_search[gene] for gene in space.genes if gene in method.prefetch_search]
    if wanted:
        jobs = compile(space.uniform_recipe(), pool).jobs
        for prefetch in wanted:
            prefetch(jobs, pool.statistics)
