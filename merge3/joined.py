"""A merge as an endpoint of its own pool: computed once, in memory, and from then on a model like any other.

Merges that join may be made of one another, as the elites of a search's later rounds are: each is made when it is
needed, of those that it names. Those that nobody needs at the moment go, all but a few; when they are needed again they
are made again, to the same bits.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from merge3.checkpoint import Checkpoint, TensorInfo
from merge3.errors import BadInput, ResourceError
from merge3.export import check_values, prepare
from merge3.memory import available, shown_size
from merge3.packaging import lead
from merge3.pool import Pool
from merge3.program import merged as merged_tensors
from merge3.recipe import Recipe

_KEPT = 2  # so many models stay in memory where nobody needs them
_ALIGNED = 64


def joined(pool: Pool, recipe: Recipe) -> Recipe:
    """A recipe whose models are all endpoints: those merges among them that it names have joined the pool; see join."""
    if recipe.merged:
        _Joining(pool, recipe.merged).bring(_named(recipe, recipe.merged))
    return replace(recipe, merged={})


def join(pool: Pool, name: str, merged: Mapping[str, Any]) -> None:
    """Let a merge join the pool as the endpoint `name`; one that is there already stays, another one of the same name
    goes, and of more than a few the one that was first. merged: a recipe (Recipe.to_dict), and `seed` of random keeps.

    The merge lies in a file of memory (memfd_create): no disk is written, and its pages are mapped like a checkpoint's.
    Raises RecipeError or CheckpointError for what an export would refuse, BadInput where the pool's budget has no room,
    ResourceError where memory is too short.
    """
    _Joining(pool, {name: merged}).bring([name])


@contextmanager
def rehearsed(pool: Pool, recipe: Recipe) -> Iterator[Recipe]:
    """`joined` without computing anything: merges that are not there yet have joined without weights, for as long as
    this lasts. Raises what `joined` would, but for what weights alone can show, and ResourceError where the merges take
    more memory than is free."""
    joining = _Joining(pool, recipe.merged, computed=False)
    try:
        joining.bring(_named(recipe, recipe.merged))
        yield replace(recipe, merged={})
    finally:
        pool.drop([name for name in pool.joined if name in joining.sizes])


class _Joining:
    """Merges on their way into a pool. told: what each is known by; computed: whether they get their weights; sizes: of
    those that were made, in bytes."""

    def __init__(self, pool: Pool, merged: Mapping[str, Mapping[str, Any]], computed: bool = True):
        for name in merged:
            if name in pool.endpoints and name not in pool.joined:
                raise BadInput("merged", f"{name} is an endpoint", "a name of its own")
        self.pool, self.merged, self.computed = pool, merged, computed
        self.told: dict[str, str] = {}
        self.sizes: dict[str, int] = {}

    def bring(self, needed: Sequence[str], kept: frozenset[str] = frozenset(), making: frozenset[str] = frozenset()):
        """Have these in the pool, and of others no more than a few. kept: who else is needed; making: who waits for
        them, and is made of none that waits for it."""
        kept = kept | set(needed)
        for name in needed:
            if name not in making and self.pool.joined.get(name) != self._known_by(name):
                self._make(name, kept, making | {name})
        self._leave(kept)

    def _make(self, name: str, kept: frozenset[str], making: frozenset[str]) -> None:
        data = dict(self.merged[name])
        seed = data.pop("seed", 0)
        recipe = Recipe.parse(data, f"{name}: merged")
        parts = _named(recipe, self.merged)
        self.bring(parts, kept, making)
        if name in self.pool.joined:
            self.pool.drop([name])
        checkpoint = _merged(self.pool, recipe, seed, self.computed)
        self.sizes[name] = sum(info.nbytes for info in checkpoint.tensors.values())
        if not self.computed:
            _check_free(self.sizes)
        kept = kept | set(parts)
        self._leave(kept, 1)
        try:
            self.pool.add(name, self._known_by(name), checkpoint)
        except BadInput:  # a budget may have no room for those that nobody needs
            self.pool.drop([other for other in self.pool.joined if other not in kept])
            self.pool.add(name, self._known_by(name), checkpoint)

    def _leave(self, kept: Collection[str], more: int = 0) -> None:
        """Let those go that nobody needs, the first ones first, until with `more` to come there are only a few."""
        idle = [name for name in self.pool.joined if name not in kept]
        count = len(self.pool.joined) + more
        if going := idle[: max(0, count - max(_KEPT, count - len(idle)))]:
            self.pool.drop(going)

    def _known_by(self, name: str) -> str:
        """What a merge is told by from another of its name: what is said of it, and of all that it may be made of."""
        if name not in self.told:
            self.told[name] = ""  # of one that is made of itself
            said = json.dumps(self.merged[name], sort_keys=True)
            parts = [self._known_by(other) for other in self.merged if json.dumps(other) in said]
            self.told[name] = hashlib.sha256("\n".join([said, *parts]).encode()).hexdigest()
        return self.told[name]


def _named(recipe: Recipe, merged: Mapping[str, Any]) -> list[str]:
    return [str(model) for model in recipe.models() if str(model) in merged]


def _check_free(made: Mapping[str, int]) -> None:
    size, free = sum(made.values()), available(torch.device("cpu"))
    if size > free:
        found = f"{shown_size(size)} for {len(made)} merges that join the models"
        raise ResourceError("memory", found, f"at most {shown_size(free)}, which are free", "fewer elites")


def _merged(pool: Pool, recipe: Recipe, seed: int, computed: bool = True) -> Checkpoint:
    """What `merge_to_disk` would write, as a checkpoint in memory; without its weights where it is not computed."""
    ready = prepare(recipe, pool)
    place, tensors = 0, {}
    memory = _Memory()
    for name, (dtype, shape) in ready.specs.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        tensors[name] = TensorInfo(name, dtype, tuple(shape), memory.path, place, size)
        place += -(-size // _ALIGNED) * _ALIGNED
    memory.grow(place)
    checkpoint = Checkpoint(pool.endpoints[lead(recipe)].path, ready.config, tensors, memory)
    if computed:
        written = mmap.mmap(memory.handle, max(1, place))
        for name, tensor in merged_tensors(ready.program, ready.specs, pool, seed):
            _check_and_put(name, tensor, tensors[name], written, name not in pool.fixed)
        written.close()
    return checkpoint


def _check_and_put(name: str, tensor: torch.Tensor, info: TensorInfo, written: mmap.mmap, check: bool) -> None:
    if check:
        check_values(name, tensor)
    if info.nbytes:
        flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        written[info.offset : info.offset + info.nbytes] = flat.numpy().tobytes()


class _Memory:
    """A file that lies in memory, for as long as this does."""

    def __init__(self):
        self.handle = os.memfd_create("merge3-joined")
        self.path = Path(f"/proc/{os.getpid()}/fd/{self.handle}")

    def grow(self, size: int) -> None:
        """Make room."""
        try:
            os.ftruncate(self.handle, max(1, size))
        except OSError as error:
            raise ResourceError("memory", f"no room for {size:,} bytes ({error.strerror})") from None

    def __del__(self, close: Callable[[int], None] = os.close):
        close(self.handle)
