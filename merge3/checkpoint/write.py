"""Write checkpoints tensor by tensor, and so that a final name only ever holds a whole model.

Everything goes into a temporary sibling directory, is synced to disk and renamed at the end. Only the
tensor being written is in memory: the safetensors header needs dtypes and shapes alone.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from merge3.checkpoint.read import DTYPE_NAMES, INDEX, SINGLE
from merge3.errors import BadInput, ResourceError
from merge3.files import put_in_place, resource_error, sync

SHARD_SIZE = 5_000_000_000  # bytes, the hub's customary limit
Spec = tuple[torch.dtype, tuple[int, ...]]


class CheckpointWriter:
    """Context manager: `put` every tensor of `specs` in their order; leaving renames or cleans up.

    directory: as `check_free` wants it. specs: name -> (dtype, shape). shard_size: bytes. beside: bytes of what
    others write into the folder.
    Raises BadInput if the directory is taken, ResourceError when the disk is full or not writable.

        with CheckpointWriter("zeros", {"weight": (torch.float32, (2, 3))}) as writer:
            writer.put("weight", torch.zeros(2, 3))
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        specs: Mapping[str, Spec],
        shard_size: int = SHARD_SIZE,
        beside: int = 0,
    ):
        self.directory = Path(directory)
        self.specs, self.beside = dict(specs), beside
        self.shards = _plan_shards(self.specs, shard_size)
        self._order = iter([(shard, name) for shard, names in self.shards.items() for name in names])
        self._file = None
        self._shard = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(_nbytes(spec) for spec in self.specs.values())

    def __enter__(self) -> CheckpointWriter:
        self.place = check_free(self.directory)
        try:
            self.place.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.place.parent).free
            if free < (wanted := self.nbytes + self.beside):
                raise ResourceError(self.directory, f"{free:,} bytes free", f"{wanted:,} for the model")
            prefix = f".{self.place.name}.partial-"
            self.temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=self.place.parent))
        except OSError as error:
            raise resource_error(self.directory, error) from None
        return self

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor. Its bytes are on their way to the file when this returns."""
        shard, expected = next(self._order)
        assert name == expected, f"{name} written out of order, expected {expected}"
        dtype, shape = self.specs[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), f"{name}: {tensor.dtype} {tuple(tensor.shape)}"
        try:
            if shard != self._shard:
                self._start(shard)
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            self._file.write(memoryview(data))
        except OSError as error:
            raise resource_error(self.directory, error) from None

    def write_text(self, name: str, text: str) -> None:
        """Add a small file beside the weights."""
        try:
            (self.temporary / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise resource_error(self.directory, error) from None

    def copy_as(self, files: Mapping[str, Path]) -> None:
        """Copy files (a tokenizer's and the like) under the names given, which may lie in folders of the checkpoint
        (1_Pooling/config.json)."""
        try:
            for name, file in files.items():
                target = self.temporary / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        except OSError as error:
            raise resource_error(self.directory, error) from None

    def finish(self) -> None:
        """Complete the files under their temporary name. Leaving does it too; before, they can be looked at."""
        try:
            self._finish_file()
            if len(self.shards) > 1 and not (self.temporary / INDEX).exists():
                index = {
                    "metadata": {"total_size": self.nbytes},
                    "weight_map": {name: shard for shard, names in self.shards.items() for name in names},
                }
                (self.temporary / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        except OSError as error:
            raise resource_error(self.directory, error) from None

    def __exit__(self, kind, value, traceback) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            self.finish()
            mode = os.umask(0)
            os.umask(mode)
            os.chmod(self.temporary, 0o777 & ~mode)  # mkdtemp made it private
            for file in self.temporary.rglob("*"):
                sync(file)
            put_in_place(self.temporary, self.place)
        except (OSError, ResourceError) as error:
            self._abandon()
            raise error if isinstance(error, ResourceError) else resource_error(self.directory, error) from None

    def _start(self, shard: str) -> None:
        self._finish_file()
        header, position = {"__metadata__": {"format": "pt"}}, 0
        for name in self.shards[shard]:
            dtype, shape = self.specs[name]
            end = position + _nbytes(self.specs[name])
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file, self._shard = open(self.temporary / shard, "wb"), shard
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _finish_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _abandon(self) -> None:
        try:
            self._finish_file()
        except OSError:
            self._file = None  # a full disk refuses the last flush too
        shutil.rmtree(self.temporary, ignore_errors=True)


def check_free(directory: Path) -> Path:
    """Refuse a directory that is there and not empty, or that nothing can be renamed to. Returns where it lies, links
    followed: what becomes it is made beside."""
    place = Path(os.path.realpath(directory))
    if os.path.ismount(place):
        found = "a mount point, to which no folder can be renamed when it is whole"
        raise BadInput(directory, found, "a new or empty directory", f"such as {directory / 'model'}")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise BadInput(directory, "exists and is not empty", "a new or empty directory")
    return place


def _plan_shards(specs: dict[str, Spec], limit: int) -> dict[str, list[str]]:
    groups, size = [[]], 0
    for name, spec in specs.items():
        if groups[-1] and size + _nbytes(spec) > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _nbytes(spec)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups)}


def _nbytes(spec: Spec) -> int:
    dtype, shape = spec
    count = 1
    for n in shape:
        count *= n
    return count * dtype.itemsize
