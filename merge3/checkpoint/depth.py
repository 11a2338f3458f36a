"""What a config.json says of the main stack's layers: how many there are, and settings that have one entry a layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# What a stack's prefix says of the section that describes it, where a config.json has such sections.
_SECTIONS = (
    (re.compile(r"^(model\.)?decoder\."), ("decoder",)),
    (re.compile(r"^(model\.)?encoder\."), ("encoder",)),
    (re.compile(r"vision|visual|image"), ("vision_config",)),
    (re.compile(r"audio|speech"), ("audio_config", "encoder_config")),
)
# Lists with one entry for each layer, where they are lists at all.
_PER_LAYER = (
    "layer_types", "mlp_layer_types", "no_rope_layers", "block_configs", "attention_layers", "layers_block_type",
    "activation_sparsity_pattern", "intermediate_size", "moe_intermediate_size", "layer_rope_theta", "sliding_windows",
    "indexer_types", "num_attention_heads_per_layer", "num_key_value_heads_per_layer",
)  # fmt: skip
_OF_ONE_STACK = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
_OF_DECODER = ("num_decoder_layers", "decoder_layers")
_OF_ENCODER = ("num_layers", "num_encoder_layers", "encoder_layers", "num_hidden_layers")


def stack_section(config: Mapping[str, Any], prefix: str) -> Any:
    """The part of a config.json that describes the stack of this prefix: itself, or a mapping in it."""
    for pattern, keys in _SECTIONS:
        if pattern.search(prefix):
            for key in keys:
                if isinstance(config.get(key), Mapping):
                    return config[key]
    return config["text_config"] if isinstance(config.get("text_config"), Mapping) else config


def depth_keys(settings: Mapping[str, Any], prefix: str) -> list[str]:
    """The keys of a section that say how many layers the stack of this prefix has."""
    known = _OF_ONE_STACK
    if any(key in settings for key in _OF_DECODER):  # one section, two stacks
        known = _OF_DECODER if "decoder" in prefix else _OF_ENCODER
    return [key for key in known if isinstance(settings.get(key), int)]


def per_layer_lists(settings: Mapping[str, Any]) -> dict[str, list]:
    """The settings of a section whose value is a list with one entry for each layer."""
    return {key: list(settings[key]) for key in _PER_LAYER if isinstance(settings.get(key), list | tuple)}


def unknown_lists(settings: Mapping[str, Any], layers: int) -> list[str]:
    """Settings of a section that may well have one entry for each of so many layers, and are none that is known."""
    lists = {key: value for key, value in settings.items() if isinstance(value, list) and key not in _PER_LAYER}
    return [key for key, value in lists.items() if len(value) == layers and any(entry != value[0] for entry in value)]


def repeat_types(settings: dict[str, Any]) -> None:
    """GPT-Neo has its kinds of layers twice, and reads them from the shorter form: [[kinds], how many times]."""
    if settings.get("model_type") == "gpt_neo" and "attention_layers" in settings:
        settings["attention_types"] = [[settings["attention_layers"], 1]]
