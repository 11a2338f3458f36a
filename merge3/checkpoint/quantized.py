"""Quantized checkpoints: their codes are no weights, and merging codes, or scales beside them, makes noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from merge3.errors import CheckpointError

# What quantizers write beside their codes: bitsandbytes, GPTQ, AWQ, FP8, compressed-tensors, MXFP4.
_SIDE_TENSORS = (
    ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".qweight", ".qzeros", ".g_idx",
    ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_zero_point", ".input_scale", "_blocks",
)  # fmt: skip
_CODES = {torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64}
_CODES |= {torch.float8_e4m3fn, torch.float8_e5m2}
_HINT = "merge the original weights, or load it once with transformers, call `model.dequantize()` and save_pretrained"


def refuse_quantized(directory: Path, config: Mapping, tensors: Mapping) -> None:
    """Raise CheckpointError if a checkpoint holds codes instead of weights.

    config: config.json. tensors: name -> something with `dtype` and `shape`. Masks and positions that old checkpoints
    store as integers are no codes.
    """
    for name, section in _sections(config):
        for key in ("quantization_config", "compression_config"):
            if section.get(key):
                raise quantized(directory, f"config.json: {name}{key}, method {_method(section[key])!r}")
    for name, info in tensors.items():
        if name.endswith(_SIDE_TENSORS) or ".quant_state." in name:
            raise quantized(directory, f"tensor {name!r} beside codes")
        if info.dtype in _CODES and not integer_buffer(name, info.shape):
            raise quantized(directory, f"tensor {name!r} of {str(info.dtype).removeprefix('torch.')}")


def quantized(where: Path, found: str) -> CheckpointError:
    """The error for a checkpoint, or a file of one, that holds codes."""
    return CheckpointError(where, f"quantized ({found})", "weights in float32, float16 or bfloat16", _HINT)


def integer_buffer(name: str, shape: Iterable[int]) -> bool:
    """Whether an integer tensor is a mask or a table of positions, as old checkpoints store them."""
    mask = name.rpartition(".")[2] in ("bias", "masked_bias", "mask", "attn_mask") and (len(tuple(shape)) in (0, 4))
    return mask or "position" in name.rpartition(".")[2] or name.endswith("num_batches_tracked") or not tuple(shape)


def _sections(config: Mapping) -> list[tuple[str, Mapping]]:
    nested = [
        (f"{key}.", value) for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)
    ]
    return [("", config), *[n for n in nested if n[0] not in ("quantization_config.", "compression_config.")]]


def _method(settings: object) -> object:
    return settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else settings
