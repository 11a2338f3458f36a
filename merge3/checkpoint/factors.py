"""LoRA adapters as they are stored: two factors and a scale for every matrix they change."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from merge3.checkpoint.read import Checkpoint, read_header
from merge3.errors import CheckpointError

FILE, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of every tensor in an adapter's file
_A, _B = ".lora_A.weight", ".lora_B.weight"
# peft's `init_lora_weights` that leave the base as it is.
_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
CONVERTED = "save it with peft's `path_initial_model_for_weight_conversion`, which makes it one of the base itself"


class Factors(NamedTuple):
    """A matrix of shape [m, d] changes by scale · b · a; b [m, rank], a [rank, d]."""

    b: torch.Tensor
    a: torch.Tensor
    scale: float


def read_factors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Factors]:
    """Tensor of the model -> what the peft adapter in a folder changes it by. shapes: of the model's matrices.

    Raises CheckpointError for adapters that are more than two factors a matrix (DoRA, trained embeddings or heads,
    biases), whose start changed the base, or that do not fit the model.
    """
    for file in (SETTINGS, FILE):
        if not (folder / file).exists():
            raise CheckpointError(folder, f"no {file}", "a peft adapter in safetensors")
    settings = _settings(folder / SETTINGS)
    stored = Checkpoint(folder, {}, read_header(folder / FILE))
    found: dict[str, Factors] = {}
    for key in stored.tensors:
        if key.endswith(_B):
            continue
        if not key.endswith(_A) or key.removesuffix(_A) + _B not in stored.tensors:
            expected = "lora_A and lora_B of matrices alone: no embeddings, heads, biases or magnitudes"
            raise CheckpointError(folder / FILE, f"tensor {key!r}", expected)
        module = key.removesuffix(_A).removeprefix(PREFIX)
        name = _name(module, shapes, folder / FILE)
        a, b = stored.get(key), stored.get(key.removesuffix(_A) + _B)
        rank = a.shape[0]
        if (a.dim(), b.dim()) != (2, 2) or b.shape[1] != rank or rank == 0:
            found_shapes = f"{key!r} of shape {list(a.shape)} beside lora_B of {list(b.shape)}"
            raise CheckpointError(folder / FILE, found_shapes, "[rank, columns] and [rows, rank]")
        scale = _of_module(settings, "alpha_pattern", "lora_alpha", module, folder / SETTINGS) / (
            rank**0.5 if settings.get("use_rslora") else rank
        )
        if settings.get("fan_in_fan_out"):  # the model stores the transposed matrix
            a, b = b.T, a.T
        if (b.shape[0], a.shape[1]) != tuple(shapes[name]):
            found_shape = f"{key!r}: factors of a matrix {[b.shape[0], a.shape[1]]}"
            raise CheckpointError(folder / FILE, found_shape, f"{list(shapes[name])}, as {name!r} has")
        if name in found:
            raise CheckpointError(folder / FILE, f"two pairs of factors for {name!r}", "one")
        found[name] = Factors(b, a, scale)
    if not found:
        raise CheckpointError(folder / FILE, "no factor", "lora_A and lora_B of some matrices")
    return found


def _settings(file) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(settings, dict)
    except (OSError, ValueError, AssertionError):
        raise CheckpointError(file, "not a JSON object", "peft's settings") from None
    if settings.get("peft_type") != "LORA" or settings.get("use_dora"):
        found = "a DoRA adapter" if settings.get("use_dora") else f"peft_type {settings.get('peft_type')!r}"
        raise CheckpointError(file, found, "plain LoRA, whose change is a product of two factors")
    if start := changed_by(settings):
        found = f"init_lora_weights {start!r}: its factors are added to what that left of the base"
        raise CheckpointError(file, found, "factors of the base itself", CONVERTED)
    return settings


def changed_by(settings: Mapping[str, Any]) -> str:
    """How an adapter's training began, where that changed the base beneath it (pissa, olora, loftq, ..); else empty.
    settings: of adapter_config.json."""
    start = str(settings.get("init_lora_weights", True))
    return "" if start.lower() in _STARTS else start


def _of_module(settings: Mapping[str, Any], patterns: str, default: str, module: str, file: Path) -> float:
    """As peft: of the first pattern that the module's name ends with, after a dot, each a regular expression."""
    value, key = settings.get(default), default
    for pattern, own in (settings.get(patterns) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                value, key = own, f"{patterns}: {pattern}"
                break
        except re.error as error:
            found = f"{patterns}: {pattern!r} ({error})"
            raise CheckpointError(file, found, "a regular expression, or a module's name") from None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise CheckpointError(file, f"{key}: found {value!r}", "a number") from None


def _name(module: str, shapes: Mapping[str, tuple[int, ...]], file) -> str:
    """The tensor of a module: by its name, or the only one whose name is the end of it, or it the end of whose."""
    wanted = f"{module}.weight"
    if wanted in shapes:
        return wanted
    close = [name for name in shapes if wanted.endswith(f".{name}") or name.endswith(f".{wanted}")]
    if len(close) != 1:
        found = f"{len(close)} tensors of the base for {module!r}"
        raise CheckpointError(file, found, "one: an adapter of this base")
    return close[0]
