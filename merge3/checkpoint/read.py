"""Open safetensors checkpoints: single or sharded, checked before use, read through memory maps.

Only safetensors and JSON are parsed, never pickle. The reader is ours rather than `safe_open`, because
a pool needs the byte range of each tensor: to hash it, to give its pages back after streaming it
through a merge, and to name file and tensor when the two disagree.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from merge3.checkpoint.beside import HUB_FILES, NO_HUB_FILES
from merge3.checkpoint.quantized import quantized, refuse_quantized
from merge3.errors import CheckpointError, ResourceError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor's bytes are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int  # of its first byte in the file
    nbytes: int


@dataclass
class Checkpoint:
    """A checkpoint directory: `config` and `tensors` are read at once, weights only when asked for.

    checkpoint = open_checkpoint("base")
    checkpoint.get("lm_head.weight")
    """

    path: Path
    config: dict
    tensors: dict[str, TensorInfo]
    temporary: object = field(default=None, repr=False)  # a directory to remove when this goes
    adapter: Path | None = None  # the folder of the LoRA adapter that is merged in
    warnings: tuple[str, ...] = ()  # what is read all the same, but seldom meant: one line each
    made: Mapping[Path, Callable[[], None]] = field(default_factory=dict, repr=False)  # files that are made when read
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False)

    def get(self, name: str) -> torch.Tensor:
        """The tensor as a view of the memory-mapped file (a copy only if the file misaligns it)."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(self.path, f"no tensor {name!r}", "one of the names in its index")
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        count = info.nbytes // info.dtype.itemsize
        if info.offset % info.dtype.itemsize:
            start = info.offset
            raw = bytearray(self._map(info.file)[start : start + info.nbytes])
            return torch.frombuffer(raw, dtype=info.dtype, count=count).reshape(info.shape)
        flat = torch.frombuffer(self._map(info.file), dtype=info.dtype, count=count, offset=info.offset)
        return flat.reshape(info.shape)

    def release(self, name: str) -> None:
        """Give a tensor's resident pages back to the system; reading it again maps them again."""
        info = self.tensors[name]
        page = mmap.PAGESIZE
        start = -(-info.offset // page) * page
        length = (info.offset + info.nbytes) // page * page - start
        if length > 0 and info.file in self._maps:
            self._maps[info.file].madvise(mmap.MADV_DONTNEED, start, length)

    def tensor_hash(self, name: str) -> str:
        """SHA-256 of a tensor's bytes, dtype and shape."""
        info = self.tensors[name]
        digest = hashlib.sha256(f"{name} {DTYPE_NAMES[info.dtype]} {info.shape} ".encode())
        if info.nbytes:
            digest.update(memoryview(self._map(info.file))[info.offset : info.offset + info.nbytes])
        return digest.hexdigest()

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same checkpoint with other names for its tensors: old -> new, one to one."""
        return replace(
            self, tensors={names[name]: replace(info, name=names[name]) for name, info in self.tensors.items()}
        )

    def content_hash(self) -> str:
        """One hash of all tensors, whatever their files and order. Reads every byte once."""
        return combine_hashes({name: self.tensor_hash(name) for name in self.tensors})

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            if file in self.made and not file.exists():
                self.made[file]()
            with open(file, "rb") as handle:
                # A private map: torch wants writable memory, and what is written stays out of the file.
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]


def combine_hashes(hashes: dict[str, str]) -> str:
    """The hash of a checkpoint from those of its tensors."""
    return hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()


def open_checkpoint(path: str | os.PathLike, revision: str | None = None) -> Checkpoint:
    """Open and check a checkpoint: a directory, or a hub id that is cached or can be downloaded.

    Raises CheckpointError naming the file (and tensor) that is missing, truncated, corrupt or a pickle.
    """
    directory, warnings = resolve(path, revision), ()
    config = _read_json(directory / "config.json") if (directory / "config.json").exists() else {}
    index = directory / INDEX
    try:
        if index.exists():
            tensors = _read_sharded(directory, index)
            if (directory / SINGLE).exists() and SINGLE not in {info.file.name for info in tensors.values()}:
                said = f"{directory}: {INDEX} and {SINGLE}, which it does not name: the files that it names are read"
                warnings = (f"{said}, and transformers would read the other; remove the one that is old",)
        elif (directory / SINGLE).exists():
            tensors = read_header(directory / SINGLE)
        else:
            raise _nothing_to_read(directory)
    except PermissionError as error:
        raise ResourceError(error.filename, "permission denied", "a readable checkpoint") from None
    if not tensors:
        raise CheckpointError(directory, "no tensors", "at least one")
    refuse_quantized(directory, config, tensors)
    return Checkpoint(directory, config, tensors, warnings=warnings)


def resolve(path: str | os.PathLike, revision: str | None = None) -> Path:
    """The local directory of a path or hub id."""
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise CheckpointError(directory, "a file", "a checkpoint directory")
    text = str(path)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise CheckpointError(text, "no such directory", "a checkpoint directory or a hub id `owner/name`")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = {"allow_patterns": list(HUB_FILES), "ignore_patterns": list(NO_HUB_FILES)}
    try:
        return Path(snapshot_download(text, revision=revision, **wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(text, f"no such directory, and no hub download ({reason})", "a checkpoint") from None


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Parse and check one safetensors header against the file's size."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        prefix = handle.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > MAX_HEADER or 8 + length > size:
            raise CheckpointError(file, f"not a safetensors file ({size} bytes)", "a whole safetensors file")
        try:
            header = json.loads(handle.read(length))
            entries = {n: e for n, e in header.items() if n != "__metadata__"}
        except (ValueError, AttributeError):
            raise CheckpointError(file, "a corrupt header", "a safetensors header in JSON") from None
    start, tensors, ends = 8 + length, {}, []
    for name, entry in entries.items():
        if isinstance(entry, dict) and str(entry.get("dtype")).startswith(("F4", "F6", "F8_E8", "I4", "U4")):
            raise quantized(file, f"tensor {name!r} of {entry['dtype']}")
        try:
            dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            begin, end = (int(o) for o in entry["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(file, f"tensor {name!r} has a bad header entry {entry!r}"[:300]) from None
        count = 1
        for n in shape:
            count *= n
        if min(shape, default=0) < 0 or begin < 0 or end - begin != count * dtype.itemsize:
            raise CheckpointError(
                file,
                f"tensor {name!r} of shape {list(shape)} in {end - begin} bytes",
                f"{count * dtype.itemsize} bytes",
            )
        if start + end > size:
            raise CheckpointError(
                file, f"truncated: tensor {name!r} ends at byte {start + end} of {size}", "a whole file"
            )
        tensors[name] = TensorInfo(name, dtype, shape, file, start + begin, end - begin)
        ends.append((begin, end))
    position = 0
    for begin, end in sorted(ends):
        if begin != position:
            raise CheckpointError(file, f"a hole or overlap at data byte {min(begin, position)}", "contiguous tensors")
        position = end
    if start + position != size:
        raise CheckpointError(file, f"{size - start - position} bytes after the last tensor", "none")
    return tensors


def _read_sharded(directory: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(index, "no `weight_map`", "a map from tensor to file")
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(index, f"shard {shard!r} outside its directory", "a plain file name")
        if not (directory / shard).exists():
            raise CheckpointError(directory / shard, "missing", f"a shard named by {INDEX}")
        shards[shard] = read_header(directory / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(directory / shard, f"no tensor {name!r}", f"as {INDEX} says")
    tensors = {name: info for shard in shards.values() for name, info in shard.items()}
    # The index decides where a tensor stands twice; one that it forgot is loaded all the same.
    return tensors | {name: shards[shard][name] for name, shard in weight_map.items()}


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(file, f"unreadable JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(file, "not a JSON object")
    return content


def _nothing_to_read(directory: Path) -> CheckpointError:
    pickles = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt*"))
    if pickles:
        return CheckpointError(
            directory / pickles[0],
            "a pickle checkpoint, which can run code when read",
            SINGLE,
            "load it once with transformers and save_pretrained it again",
        )
    if (directory / "adapter_config.json").exists():
        return CheckpointError(directory, "a LoRA adapter", "a full checkpoint", "write it as model+adapter")
    others = sorted(p.name for p in directory.glob("*.safetensors"))
    if others:
        return CheckpointError(directory, f"{', '.join(others[:3])} but no {INDEX}", f"{SINGLE} or {INDEX}")
    return CheckpointError(directory, f"neither {SINGLE} nor {INDEX}", "a transformers checkpoint")
