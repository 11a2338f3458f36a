"""Models of several stacks: which one counts as the layers, and what config.json says of it where slices change it."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from merge3 import Recipe, merge_to_disk
from merge3.checkpoint.layout import layout
from merge3.errors import CheckpointError
from tests.families import FAMILIES, make

LAYER = ("self_attn.q_proj.weight", "mlp.up_proj.weight")
STACKS = {
    "a deep encoder": ({"model.encoder.layers": 32, "model.decoder.layers": 2}, "model.decoder.layers"),
    "a wide vision tower": ({"visual.blocks": 32, "model.layers": 28}, "model.layers"),
    "nested names": (
        {"model.vision_tower.encoder.layers": 9, "model.language_model.layers": 2},
        "model.language_model",
    ),
    "two that read": ({"text_model.encoder.layers": 12, "vision_model.encoder.layers": 24}, "vision_model"),
    "one that segments": ({"vision_encoder.layers": 12, "mask_decoder.transformer.layers": 2}, "vision_encoder"),
    "a list of heads": ({"resnet.encoder.stages": 4, "classifier": 2}, "resnet.encoder"),
    "no encoder at all": ({"model.layers": 3, "model.mtp.layers": 4}, "model.mtp"),
}


@pytest.mark.parametrize("case", STACKS)
def test_the_stack_that_writes_is_the_main_one(case):
    stacks, expected = STACKS[case]
    names = [f"{prefix}.{i}.{name}" for prefix, depth in stacks.items() for i in range(depth) for name in LAYER]
    found = layout([*names, "model.embed_tokens.weight", "lm_head.weight"])
    assert found.prefix.startswith(expected)
    inside = [found.layer_tensor(i, name) for i in range(found.layers) for name in found.layer_names]
    assert sorted([*inside, *found.pre, *found.post]) == sorted([*names, "model.embed_tokens.weight", "lm_head.weight"])


def cut(root, sources):
    """A merge to disk of ranges of the base's layers. Returns its config.json."""
    slices = [{"sources": [{"model": str(root / "base"), "layer_range": list(part)}]} for part in sources]
    merge_to_disk(Recipe.parse({"merge_method": "passthrough", "slices": slices}), root / "out")
    return json.loads((root / "out" / "config.json").read_text())


DEPTHS = {
    "T5": {"num_decoder_layers": 3, "num_layers": 4},
    "BART": {"decoder_layers": 3, "encoder_layers": 4},
    "Whisper": {"decoder_layers": 3, "encoder_layers": 4},
    "CLIP": {"vision_config.num_hidden_layers": 3, "text_config.num_hidden_layers": 2},
    "LLaVA": {"text_config.num_hidden_layers": 3, "vision_config.num_hidden_layers": 3},
    "Qwen2-VL": {"text_config.num_hidden_layers": 3, "vision_config.depth": 3},
    "Mixtral": {"num_hidden_layers": 3},
}


@pytest.mark.parametrize("name", DEPTHS)
def test_slices_change_the_depth_of_the_main_stack_alone(name, tmp_path):
    import transformers

    family = FAMILIES[name]
    make(family, tmp_path, models=1)
    depth = layout(load_file(tmp_path / "base" / "model.safetensors")).layers
    config = cut(tmp_path, [(0, 2), (1, 2)])  # the second layer twice
    found = {key: config for key in DEPTHS[name]}
    for key in found:
        for part in key.split("."):
            found[key] = found[key][part]
    assert found == DEPTHS[name] and depth == (3 if name == "CLIP" else 2)
    _, said = getattr(transformers, family.auto).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]


def test_layers_that_config_json_does_not_count_stay_so(tmp_path):
    """DeepSeek stores a layer that drafts tokens behind the last; transformers loads it not."""
    make(FAMILIES["Llama"], tmp_path, models=2)
    for model in ("base", "e0"):
        file = Path(tmp_path / model / "config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1}))
    models = [{"model": str(tmp_path / "e0"), "parameters": {"weight": 0.5}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": models}
    merge_to_disk(Recipe.parse(recipe), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1
    stored = (load_file(tmp_path / model / "model.safetensors").keys() for model in ("base", "out"))
    assert next(stored) == next(stored)


def test_layers_that_config_json_does_not_count_are_not_taken_apart(tmp_path):
    """Of slices it is not known which layers counted: one would be written that nobody loads."""
    make(FAMILIES["Llama"], tmp_path, models=1)
    file = Path(tmp_path / "base" / "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1}))
    slices = [{"sources": [{"model": str(tmp_path / "base"), "layer_range": [at, at + 1]}]} for at in (1, 0)]
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1, and 2 layers are stored"):
        merge_to_disk(Recipe.parse({"merge_method": "passthrough", "slices": slices}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
