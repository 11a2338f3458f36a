"""A merge as an endpoint of its own pool: computed once, in memory, and from then on a model like any other."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from merge3.checkpoint import Checkpoint, TensorInfo
from merge3.checkpoint.layout import Ref
from merge3.errors import BadInput, ResourceError
from merge3.export import check_values, prepare
from merge3.packaging import lead
from merge3.pool import Pool
from merge3.program import merged as merged_tensors
from merge3.recipe import Recipe

_KEPT = 2  # as many models of memory at most, whoever asks
_ALIGNED = 64


def joined(pool: Pool, recipe: Recipe) -> Recipe:
    """A recipe whose models are all endpoints: merges among them have joined the pool; see join."""
    for name, merged in recipe.merged.items():
        join(pool, name, merged)
    return replace(recipe, merged={})


def join(pool: Pool, name: str, merged: Mapping[str, Any]) -> None:
    """Let a merge join the pool as the endpoint `name`; one that is there already stays, another one of the same name
    goes, and of more than a few the one that was first. merged: a recipe (Recipe.to_dict), and `seed` of random keeps.

    The merge lies in a file of memory (memfd_create): no disk is written, and its pages are mapped like a checkpoint's.
    Raises RecipeError or CheckpointError for what an export would refuse, ResourceError where memory is too short.
    """
    text = json.dumps(merged, sort_keys=True)
    if pool.joined.get(name) == text:
        return
    if name in pool.endpoints and name not in pool.joined:
        raise BadInput("merged", f"{name} is an endpoint", "a name of its own")
    data = dict(merged)
    seed = data.pop("seed", 0)
    checkpoint = _merged(pool, Recipe.parse(data, f"{name}: merged"), seed)
    left = [name] if name in pool.joined else list(pool.joined)[: len(pool.joined) + 1 - _KEPT]
    for other in left:
        pool.release(Ref(other, tensor) for tensor in pool.endpoints[other].tensors)
        del pool.endpoints[other], pool.joined[other]
    pool.add(name, text, checkpoint)


def _merged(pool: Pool, recipe: Recipe, seed: int) -> Checkpoint:
    """What `merge_to_disk` would write, as a checkpoint in memory."""
    ready = prepare(recipe, pool)
    place, tensors = 0, {}
    memory = _Memory()
    for name, (dtype, shape) in ready.specs.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        tensors[name] = TensorInfo(name, dtype, tuple(shape), memory.path, place, size)
        place += -(-size // _ALIGNED) * _ALIGNED
    memory.grow(place)
    checkpoint = Checkpoint(pool.endpoints[lead(recipe)].path, ready.config, tensors, memory)
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
