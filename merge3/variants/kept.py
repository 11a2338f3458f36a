"""Variants of a pool's recipes, computed when they are first asked for and kept in a folder, for live models."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch

from merge3 import __version__
from merge3.checkpoint.write import CheckpointWriter
from merge3.errors import BadInput, ResourceError
from merge3.packaging import output_specs
from merge3.pool import Pool
from merge3.program import Program, merged
from merge3.recipe import Recipe
from merge3.variants.about import ABOUT
from merge3.variants.packed import Variants, check_parts, write_parts

_FOLDERS = 4  # in a temporary folder: each is as large as a model


class Kept:
    """folder: where they are found again by a later process; None: a temporary one, which goes with this and holds but
    the last ones. dtypes: of tensors in the live model, whatever a recipe is written to disk in."""

    def __init__(self, pool: Pool, folder: str | Path | None = None, dtypes: Mapping[str, torch.dtype] | None = None):
        self.pool, self._dtypes = pool, dict(dtypes or {})
        self._as_held = sorted((name, str(dtype)) for name, dtype in self._dtypes.items())
        self._kept_in = None if folder is None else Path(folder)
        self._open: dict[str, Variants] = {}

    @cached_property
    def _temporary(self) -> tempfile.TemporaryDirectory:
        return tempfile.TemporaryDirectory(prefix="merge3-variants-")

    @property
    def _folder(self) -> Path:
        return Path(self._temporary.name) if self._kept_in is None else self._kept_in

    def of(self, recipe: Recipe, program: Program, seed: int = 0, where: str = "recipe") -> Variants:
        """The recipe's; `program` is what it compiles to. seed: of random keeps."""
        key = self._key(recipe, seed)
        if key not in self._open:
            folder = self._folder / key
            if not (folder / ABOUT).exists():
                if self._kept_in is None:
                    self._make_room()
                try:
                    self._pack(recipe, program, seed, folder, where)
                except (BadInput, ResourceError):
                    if not (folder / ABOUT).exists():  # else another process was quicker
                        raise
            self._open = {key: Variants.open(folder, self.pool.device)}  # the last one: others are found on disk
        return self._open[key]

    def _key(self, recipe: Recipe, seed: int) -> str:
        """Of all that its parts depend on: contents where it is to be found again, else names."""
        told = [__version__, recipe.hash(), seed, self._as_held]
        if self._kept_in is not None:
            told.append(self.pool.content_hashes())
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def _make_room(self) -> None:
        """Remove the oldest; what is open of it stays readable, and is read by nobody but who holds it."""
        folders = sorted(self._folder.iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
        for folder in folders[: max(0, len(folders) - _FOLDERS + 1)]:
            shutil.rmtree(folder, ignore_errors=True)

    def _pack(self, recipe: Recipe, program: Program, seed: int, folder: Path, where: str) -> None:
        specs = output_specs(recipe, program, self.pool)
        for name, (dtype, shape) in specs.items():
            if dtype.is_floating_point:
                specs[name] = self._dtypes.get(name, dtype), shape
        parts = check_parts(recipe, program, self.pool, specs, where)
        with CheckpointWriter(folder, specs, 2**63, parts) as writer, torch.no_grad():
            for name, tensor in merged(program, specs, self.pool, seed):
                writer.put(name, tensor)
            writer.write_text("config.json", json.dumps(self.pool.base_checkpoint.config))
            writer.finish()
            write_parts(writer.temporary, recipe, program, self.pool, where)
