"""What a zip is on disk: one ordinary checkpoint, or one for each model and zip.json, which says what they share."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from merge3.checkpoint import check_free
from merge3.checkpoint.beside import copy_speaking
from merge3.errors import BadInput
from merge3.files import put_in_place, resource_error, sync
from merge3.learn.zip import States, Zipped
from merge3.packaging import MODEL_FILES

FILE = "zip.json"


def save_zip(
    zipped: Zipped,
    models: Mapping[str, torch.nn.Module],
    folders: Mapping[str, Path],
    told: Mapping[str, Any],
    directory: Path,
    dtype: torch.dtype,
) -> dict[str, Path]:
    """Write `models`, name -> what `built` made of it, atomically. folders: whose tokenizer and processor each has.
    told: what zip.json says beside. Returns name -> where its checkpoint lies; of a zip that is one model all names
    lead to it.

    Raises BadInput for weights that are not finite in `dtype`, ResourceError for a disk; nothing is left then.
    """
    final = check_free(directory)
    places = {name: Path() if zipped.one else Path(name) for name in models}
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=final.parent))
    except OSError as error:
        raise resource_error(directory, error) from None
    try:
        written: set[Path] = set()
        for name, place in places.items():
            if place not in written:
                _write(models[name], folders[name], temporary / place, dtype)
                written.add(place)
        said = json.dumps({**told, **contents(zipped, places, dtype)}, indent=2)
        (temporary / FILE).write_text(said, encoding="utf-8")
        for file in temporary.rglob("*"):
            sync(file)
        mode = os.umask(0)
        os.umask(mode)
        os.chmod(temporary, 0o777 & ~mode)  # mkdtemp made it private
        put_in_place(temporary, final)
    except OSError as error:
        raise resource_error(directory, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {name: directory / place for name, place in places.items()}


def parts(zipped: Zipped, names: Sequence[str]) -> tuple[States, dict[str, States]]:
    """(tensors in common, name of each result -> those that only it has), as the live models' states name them: what a
    file of variants would hold. Of a zip that is one model there are none of the second kind."""
    return zipped.common, {} if zipped.one else dict(zip(names, zipped.own))


def contents(zipped: Zipped, places: Mapping[str, Path], dtype: torch.dtype) -> dict[str, Any]:
    """What zip.json says of the weights: which tensors all results have, and bytes stored once, for each alone, and of
    the models apart."""
    size = lambda tensors: sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.itemsize) for t in tensors)
    shared, alone = parts(zipped, list(places))
    common, own = size(shared.values()), [size(tensors.values()) for tensors in alone.values()]
    together, apart = common + sum(own), max(1, len(own)) * common + sum(own)
    return {
        "results": {name: str(place) for name, place in places.items()},
        "shared": [] if zipped.one else sorted(zipped.common),
        "bytes": {"shared": common, "own": own, "together": together, "apart": apart},
    }


def _write(model: torch.nn.Module, folder: Path, target: Path, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise BadInput(f"tensor {name!r}", f"infinite or NaN in {kind}", "finite weights", "another dtype")
    target.mkdir(exist_ok=True)
    model.save_pretrained(target)
    copy_speaking(folder, target)
    for file in (file for pattern in MODEL_FILES for file in folder.glob(pattern)):
        if file.is_file():
            shutil.copyfile(file, target / file.name)
