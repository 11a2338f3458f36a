"""surgery.safetensors: the adapters of a merge's tasks, beside its weights.

Tensors `<task>.down` [rank, width] and `<task>.up` [width, rank], float32; in the header's metadata one JSON object
under `surgery`: format, rank, width, tasks, experts, and the hash of the recipe whose merge they were fitted to.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from merge3.checkpoint import check_free
from merge3.checkpoint.read import read_header
from merge3.errors import CheckpointError
from merge3.files import resource_error, sync, write_atomically
from merge3.live.hooks import Adapter

FILE = "surgery.safetensors"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Adapters:
    """tasks: task -> its adapter, all of one rank and width. experts: task -> the model it was fitted to; recipe: hash
    of the one whose merge they belong to."""

    tasks: Mapping[str, Adapter]
    experts: Mapping[str, str] = field(default_factory=dict)
    recipe: str = ""

    @property
    def rank(self) -> int:
        """Of every adapter."""
        return next(iter(self.tasks.values())).down.shape[0]

    @property
    def width(self) -> int:
        """Of the representation that they change."""
        return next(iter(self.tasks.values())).down.shape[1]

    @property
    def parameters(self) -> int:
        """Numbers in all."""
        return sum(tensor.numel() for adapter in self.tasks.values() for tensor in adapter)


def save(adapters: Adapters, path: str | Path) -> Path:
    """Write a file, or FILE in a folder, whole or not at all. Raises ResourceError."""
    file = _file(path)
    write_atomically(file, _bytes(adapters))
    return file


def _bytes(adapters: Adapters) -> bytes:
    from safetensors.torch import save as to_bytes

    tensors = {}
    for task, adapter in adapters.tasks.items():
        for name, tensor in zip(("down", "up"), adapter):  # cloned: safetensors refuses what shares memory
            tensors[f"{task}.{name}"] = tensor.detach().float().cpu().contiguous().clone()
    about = {
        "format": FORMAT,
        "rank": adapters.rank,
        "width": adapters.width,
        "tasks": list(adapters.tasks),
        "experts": dict(adapters.experts),
        "recipe": adapters.recipe,
    }
    return to_bytes(tensors, {"surgery": json.dumps(about)})


def save_beside(adapters: Adapters, model: Path, export: Callable[[Path], object]) -> None:
    """A checkpoint with its adapters in the folder `model`, there whole or not at all.

    What lies there with these very adapters stays; with others, or without, it is replaced. export: writes the
    checkpoint into the folder it is given, a new one. Raises ResourceError, or what `export` raises.
    """
    if model.exists():
        file = model / FILE
        if file.is_file() and file.read_bytes() == _bytes(adapters):
            return
    else:
        check_free(model)
    remove_partials(model.parent, model.name)
    partial, old = (model.with_name(f".{model.name}.partial-{os.getpid()}{end}") for end in ("", "-old"))
    try:
        export(partial)
        save(adapters, partial)
        if model.exists():
            os.rename(model, old)
        os.rename(partial, model)
        sync(model.parent)
    except OSError as error:
        raise resource_error(model, error) from None
    finally:
        remove_partials(model.parent, model.name)


def remove_partials(directory: Path, name: str = "") -> None:
    """What a process that was killed while it wrote has left in a directory. name: of the file or folder that it was
    to be, or the end of it; all by default."""
    for left in directory.glob(f".*{name}.partial-*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def load(path: str | Path) -> Adapters:
    """From a file, or FILE in a checkpoint's folder. Raises CheckpointError for what is missing, damaged or of another
    format, ResourceError for what may not be read.

    adapters = load("runs/surgery/model")
    """
    from safetensors import SafetensorError, safe_open

    file = _file(path)
    if not file.is_file():
        raise CheckpointError(file, "no such file", "adapters that `merge3-client fit` wrote")
    header = read_header(file)  # says what is damaged in one line
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("surgery", "null"))
            tensors = {name: opened.get_tensor(name) for name in header}
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(file, f"unreadable ({str(error).splitlines()[0][:200]})", "a whole file") from None
    if not isinstance(about, dict) or "format" not in about:
        raise CheckpointError(file, "nothing in its metadata about surgery", "adapters that `merge3-client fit` wrote")
    if about["format"] != FORMAT:
        raise CheckpointError(file, f"format {about['format']!r}", f"{FORMAT}, which this merge3 reads")
    try:
        tasks, experts = [str(task) for task in about["tasks"]], dict(about["experts"])
        shape = int(about["rank"]), int(about["width"])
        recipe = str(about["recipe"])
    except (KeyError, TypeError, ValueError):
        expected = "format, rank, width, tasks, experts, recipe"
        raise CheckpointError(file, "metadata that is not complete", expected) from None
    wanted = {f"{task}.down": shape for task in tasks} | {f"{task}.up": shape[::-1] for task in tasks}
    for name in (*wanted, *tensors):
        if name not in tensors or name not in wanted:
            found = f"{'no' if name in wanted else 'a'} tensor {name!r}"
            raise CheckpointError(file, found, "`down` and `up` of every task that its metadata names")
        tensor = tensors[name]
        if tuple(tensor.shape) != wanted[name] or tensor.dtype != torch.float32:
            found = f"tensor {name!r} of shape {list(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"
            raise CheckpointError(file, found, f"{list(wanted[name])} in float32")
        if not tensor.isfinite().all():
            raise CheckpointError(file, f"tensor {name!r} has NaN or infinite numbers", "finite ones")
    if not tasks:
        raise CheckpointError(file, "no task", "at least one")
    return Adapters({task: Adapter(tensors[f"{task}.down"], tensors[f"{task}.up"]) for task in tasks}, experts, recipe)


def _file(path: str | Path) -> Path:
    path = Path(path).expanduser()
    return path / FILE if path.is_dir() else path
