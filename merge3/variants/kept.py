"""Variants of a pool's recipes, computed when they are first asked for and kept in a folder, for live models."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import torch

from merge3 import __version__
from merge3.checkpoint.write import CheckpointWriter
from merge3.methods import execute
from merge3.packaging import output_specs
from merge3.pool import Pool
from merge3.program import Program
from merge3.recipe import Recipe
from merge3.variants.packed import ABOUT, Variants, write_parts

_BATCH = 24_000_000  # elements merged at once


class Kept:
    """folder: where they are found again by a later process; None: a temporary one, which goes with this."""

    def __init__(self, pool: Pool, folder: str | Path | None = None):
        self.pool = pool
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="merge3-variants-")
        self._folder = Path(folder or self._temporary.name)
        self._open: dict[str, Variants] = {}

    def of(self, recipe: Recipe, program: Program, seed: int = 0, where: str = "recipe") -> Variants:
        """The recipe's; `program` is what it compiles to. seed: of random keeps."""
        key = self._key(recipe, seed)
        if key not in self._open:
            folder = self._folder / key
            if not (folder / ABOUT).exists():
                self._pack(recipe, program, seed, folder, where)
            self._open = {key: Variants.open(folder, self.pool.device)}  # the last one: others are found on disk
        return self._open[key]

    def _key(self, recipe: Recipe, seed: int) -> str:
        """Of all that its parts depend on: contents where it is to be found again, else names."""
        told = [__version__, recipe.hash(), seed]
        if self._temporary is None:
            told.append(self.pool.content_hashes())
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def _pack(self, recipe: Recipe, program: Program, seed: int, folder: Path, where: str) -> None:
        specs = output_specs(recipe, program, self.pool)
        with CheckpointWriter(folder, specs, shard_size=2**63) as writer, torch.no_grad():
            for names in _batches(specs):
                tensors = {}
                for name in names:
                    dtype, shape = specs[name]
                    tensors[name] = torch.empty(shape, dtype=dtype, device=self.pool.device)
                execute(program.outputs(tensors, self.pool.statistics), self.pool.get, seed)
                for name in names:
                    writer.put(name, tensors.pop(name))
            writer.write_text("config.json", json.dumps(self.pool.base_checkpoint.config))
            writer.finish()
            write_parts(writer.temporary, recipe, program, self.pool, where)


def _batches(specs):
    batch, size = [], 0
    for name, (_, shape) in specs.items():
        batch.append(name)
        size += torch.Size(shape).numel()
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
