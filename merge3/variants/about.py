"""variants.json: what lies beside it, and whether that is still what was written with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from merge3.checkpoint import Checkpoint
from merge3.errors import CheckpointError
from merge3.files import write_atomically

FILE, ABOUT = "variants.safetensors", "variants.json"
FORMAT = 1
_SEEN = 64  # bytes at each of three places of a tensor, by which files are known again


def fingerprint(checkpoint: Checkpoint) -> str:
    """Of every tensor its name, dtype and shape, and its first, middle and last bytes: enough to tell one merge from
    another, and quick to read however large they are."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        digest.update(f"{name} {info.dtype} {list(info.shape)} ".encode())
        data = checkpoint.get(name).reshape(-1).view(torch.uint8).numpy()
        middle = len(data) // 2
        for part in (data[:_SEEN], data[middle : middle + _SEEN], data[-_SEEN:]):
            digest.update(part.tobytes())
    return digest.hexdigest()[:32]


def _checksum(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Whole or not at all. Raises ResourceError."""
    about = {"format": FORMAT, **about}
    write_atomically(folder / ABOUT, json.dumps(about | {"checksum": _checksum(about)}, indent=1))


def read_about(folder: Path) -> dict[str, Any]:
    """What was written. Raises CheckpointError where it is not there, or not whole."""
    file = folder / ABOUT
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        told = {key: value for key, value in about.items() if key != "checksum"}
    except FileNotFoundError:
        raise CheckpointError(file.parent, f"no {ABOUT}", "a folder that `merge3-client merge` packed") from None
    except (OSError, ValueError, AttributeError):
        raise CheckpointError(file, "not what merge3 writes", f"the file as it was beside {FILE}") from None
    if told.get("format") != FORMAT:
        raise CheckpointError(file, f"format {told.get('format')!r}"[:80], f"{FORMAT}, which this merge3 reads")
    if about.get("checksum") != _checksum(told):
        raise CheckpointError(file, "changed since it was written", f"the file as it was beside {FILE}")
    return told
