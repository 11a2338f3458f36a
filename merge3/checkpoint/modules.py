"""What a sentence encoder's folder holds beside a model's: the list of steps after the transformer (modules.json), a
folder for each of them (1_Pooling), prompts and lengths. No merge changes any of it; it travels with the weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge3.errors import CheckpointError

_MODULES, _POOLING, _PROMPTS = "modules.json", "1_Pooling", "config_sentence_transformers.json"
_LENGTHS = "sentence_*_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".h5", ".onnx", ".msgpack")


def module_files(folder: str | Path) -> dict[str, Path]:
    """Name in a checkpoint -> file, of all that lies there; nothing for a model that is no sentence encoder.

    Raises CheckpointError for a list of modules that cannot be read, or that leads out of the folder.
    """
    folder = Path(folder)
    found = {path.name: path for path in (folder / _MODULES, folder / _PROMPTS, *folder.glob(_LENGTHS))}
    for module in sorted({_POOLING, *_folders(folder)}):
        for path in sorted((folder / module).rglob("*")):
            found[path.relative_to(folder).as_posix()] = path
    return {name: path for name, path in found.items() if path.is_file()}


def copy_modules(source: str | Path, target: Path) -> None:
    """Lay module_files of one folder into another. Raises OSError where they cannot be written."""
    for name, file in module_files(source).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)


def check_modules(folders: Mapping[str, Path]) -> None:
    """Refuse endpoints whose modules have weights that differ: no merge reads them, and the first folder's would be
    written. folders: endpoint -> its folder, first the one whose files an output gets. Raises CheckpointError."""
    (lead, first), *others = folders.items()
    for name, path in module_files(first).items():
        if path.suffix not in _WEIGHTS:
            continue
        for other, folder in others:
            if not (folder / _MODULES).is_file():  # a model without modules, or an adapter's
                continue
            theirs = folder / name
            if not theirs.is_file() or theirs.read_bytes() != path.read_bytes():
                found = f"{name} differs from that of {lead}, or is missing"
                raise CheckpointError(other, found, "equal ones: weights after the transformer do not merge")


def module_settings(folder: str | Path) -> dict[str, str]:
    """What changes embeddings, in words: `pooling` and `prompts`, empty where the folder says nothing of them. What
    cannot be read is empty too: whoever asks for embeddings is told (tasks/sentences.py)."""
    pooling, prompts = (_settings(Path(folder) / file) for file in (f"{_POOLING}/config.json", _PROMPTS))
    chosen = [key.removeprefix("pooling_mode_") for key, value in pooling.items() if value is True and "_mode" in key]
    named = pooling.get("pooling_mode")
    chosen += [named] if isinstance(named, str) else named or []
    chosen = [re.sub("_tokens?$", "", str(name)) for name in chosen]  # flags of older files have longer names
    if chosen and pooling.get("include_prompt") is False:
        chosen.append("without prompts")
    texts = prompts.get("prompts") if isinstance(prompts.get("prompts"), dict) else {}
    used = {name: text for name, text in texts.items() if text}
    return {"pooling": ", ".join(chosen), "prompts": json.dumps(used, sort_keys=True) if used else ""}


def _settings(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _folders(folder: Path) -> list[str]:
    """Those that modules.json names, but for the checkpoint's own."""
    file = folder / _MODULES
    if not file.is_file():
        return []
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        paths = [str(entry.get("path", "")) for entry in entries]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(file, f"unreadable ({str(error)[:100]})", "a list of modules, each with a path") from None
    for path in paths:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise CheckpointError(file, f"path {path!r}", "a folder of the checkpoint")
    return [path for path in paths if path]
