"""Worlds that are made once and kept, whoever asks for them and however many ask at once."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from merge3.threads import few_threads


def made(root: Path, make: Callable[..., None], **arguments: Any) -> Path:
    """The folder that make(folder, **arguments) fills, kept as root/NAME-HASH. Whoever changes it copies it first.

    The hash is of what makes it: sources, arguments, libraries, the processor's instructions. Made on one thread and
    with a random state of its own: the bits do not depend on who asked, nor does who asked on whether it was there.
    One process makes it, others wait. It gets its name when it is whole, so a maker that is killed leaves nothing.
    """
    folder = root / f"{make.__name__}-{_hash(make, arguments)}"
    if folder.exists():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root / f".{folder.name}.lock"):
        if not folder.exists():
            partial = root / f".{folder.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # of a maker that was killed
            partial.mkdir()
            with torch.random.fork_rng(devices=[]), few_threads(0):
                make(partial, **arguments)
            partial.rename(folder)
    return folder


def _hash(make: Callable[..., None], arguments: dict[str, Any]) -> str:
    sources = {Path(inspect.getfile(make)).resolve(), *Path(__file__).resolve().parent.glob("*.py")}
    told = [make.__qualname__, json.dumps(arguments, sort_keys=True, default=str)]
    told += [torch.backends.cpu.get_cpu_capability()]
    told += [metadata.version(name) for name in ("torch", "transformers", "tokenizers")]
    digest = hashlib.sha256("\n".join(told).encode())
    for source in sorted(sources):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Until no other process is here. The system ends the wait when a process that was here dies."""
    with open(file, "w", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
