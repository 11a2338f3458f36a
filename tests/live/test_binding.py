"""Checkpoint tensors that are parts of live parameters, or made of several: a swap writes them in place."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merge3 import Pool, Recipe, Slot, merge_to_disk
from merge3.errors import BadInput, CheckpointError
from tests.families import FAMILIES, Family, make, outputs, picture


def recipe(root, weight=0.5):
    models = [{"model": str(root / name), "parameters": {"weight": weight}} for name in ("e0", "e1")]
    return Recipe.parse({"merge_method": "task_arithmetic", "base_model": str(root / "base"), "models": models})


def opened(root):
    return Slot(Pool.open(str(root / "base"), [str(root / "e0"), str(root / "e1")]))


def check(root, family, weight=0.5):
    """The slot after a swap is what transformers loads from the exported merge. Returns the slot."""
    import transformers

    slot = opened(root)
    places = {name: p.data_ptr() for name, p in slot.model.named_parameters()}
    before = outputs(slot.model, family)
    slot.swap(recipe(root, weight))
    assert {name: p.data_ptr() for name, p in slot.model.named_parameters()} == places
    merge_to_disk(recipe(root, weight), root / "out")
    loaded = getattr(transformers, family.auto).from_pretrained(root / "out")
    for name, value in loaded.state_dict().items():
        assert torch.equal(slot.model.state_dict()[name], value), name
    found, expected = outputs(slot.model, family), outputs(loaded, family)
    assert all(torch.allclose(found[key], value, rtol=1e-5, atol=1e-6) for key, value in expected.items())
    assert any(not torch.equal(found[key], value) for key, value in before.items())
    return slot


def test_one_expert_of_a_mixture_can_be_merged_alone(tmp_path):
    """Experts are fused in the live model; a recipe's filters name them as they are stored."""
    family = FAMILIES["Mixtral"]
    make(family, tmp_path)
    slot = check(tmp_path, family, [{"filter": "experts.2.w3", "value": 1.0}, {"value": 0.0}])
    stored = {name: load_file(tmp_path / name / "model.safetensors") for name in ("base", "e0", "e1")}
    name = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
    fused = slot.model.model.layers[1].mlp.experts.gate_up_proj
    for expert in range(4):
        for half, part in enumerate(("w1", "w3")):
            base, *others = (stored[model][name.format(expert, part)] for model in stored)
            change = sum(other - base for other in others) if (expert, part) == (2, "w3") else 0.0
            rows = len(base)
            assert torch.allclose(fused[expert, half * rows : (half + 1) * rows], base + change, atol=1e-6)


def test_parameters_that_are_parts_of_one_tensor(tmp_path):
    """DINOv2 with gates stores both halves as one tensor; transformers loads two parameters."""
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8)
    family = Family(
        "dinov2", "Dinov2Model", "AutoModel", sizes | {"use_swiglu_ffn": True}, picture, (), "encoder.layer"
    )
    assert make(family, tmp_path) is None
    assert "encoder.layer.0.mlp.weights_in.weight" in load_file(tmp_path / "base" / "model.safetensors")
    check(tmp_path, family)


def test_names_that_torch_once_had(tmp_path):
    """A convolution's length and direction, as checkpoints of Wav2Vec2 on the hub name them."""
    from safetensors.torch import save_file

    sizes = dict(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    sizes |= dict(conv_dim=[8], conv_kernel=[3], conv_stride=[2], num_feat_extract_layers=1)
    sizes |= dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    sound = lambda: {"input_values": torch.linspace(-1, 1, 64)[None].sin()}
    family = Family("wav2vec2", "Wav2Vec2ForCTC", "AutoModelForCTC", sizes, sound, (), "wav2vec2.encoder.layers")
    assert make(family, tmp_path) is None
    for model in ("base", "e0", "e1"):
        file, renamed = tmp_path / model / "model.safetensors", {}
        for name, tensor in load_file(file).items():
            name = name.replace("parametrizations.weight.original0", "weight_g")
            renamed[name.replace("parametrizations.weight.original1", "weight_v")] = tensor
        assert sum(name.endswith(("weight_g", "weight_v")) for name in renamed) == 2
        save_file(renamed, file, metadata={"format": "pt"})
    check(tmp_path, family)


@pytest.fixture
def converting(tmp_path):
    """A function that has transformers convert tensors as it loads Llamas, and makes a base and two fine-tunes whose
    down projections are stored in that form."""
    from transformers import conversion_mapping as table

    def convert(operations):
        from transformers.core_model_loading import WeightConverter

        entry = WeightConverter("mlp.stored.weight", "mlp.down_proj.weight", operations)
        table.register_checkpoint_conversion_mapping("llama", [entry], overwrite=True)
        make(FAMILIES["Llama"], tmp_path)

    yield convert
    table.register_checkpoint_conversion_mapping("llama", [], overwrite=True)


def test_a_tensor_that_is_turned(tmp_path, converting):
    from transformers.core_model_loading import Transpose

    converting([Transpose(0, 1)])
    shape = load_file(tmp_path / "base" / "model.safetensors")["model.layers.0.mlp.stored.weight"].shape
    assert shape == (48, 32)
    slot = check(tmp_path, FAMILIES["Llama"])
    assert not slot._weights["model.layers.0.mlp.stored.weight"].is_contiguous()


def test_a_conversion_that_computes_is_refused_at_open(tmp_path, converting):
    from transformers.core_model_loading import ConversionOps

    class Doubled(ConversionOps):
        factor = 2

        def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
            (tensors,) = input_dict.values()
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            return {target_patterns[0]: tensor * self.factor}

        @property
        def reverse_op(self):
            half = Doubled()
            half.factor = 0.5
            return half

    converting([Doubled()])
    expected = (
        r"base: tensor 'model\.layers\.0\.mlp\.stored\.weight' \(one of 1\) becomes 'model\.layers\.0\.mlp\.down_proj\."
        r"weight' of LlamaForCausalLM; expected a conversion that only stacks, joins, splits or turns tensors"
    )
    with pytest.raises(CheckpointError, match=expected):
        opened(tmp_path)
    assert merge_to_disk(recipe(tmp_path), tmp_path / "out")["kept"] == {}


@pytest.mark.parametrize(("name", "dtype"), [("T5", "float16"), ("DeBERTa", "bfloat16")])
def test_weights_that_stay_wide_are_rounded_as_on_disk(name, dtype, tmp_path):
    """transformers keeps some in float32, where a merge would have more digits than its checkpoint."""
    import transformers
    from safetensors.torch import save_file

    family = FAMILIES[name]
    make(family, tmp_path)
    for model in ("base", "e0", "e1"):
        file = tmp_path / model / "model.safetensors"
        tensors = load_file(file)
        save_file({n: t.to(getattr(torch, dtype)) for n, t in tensors.items()}, file, metadata={"format": "pt"})
        file = tmp_path / model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": dtype}))
    slot = opened(tmp_path)
    slot.swap(recipe(tmp_path))
    merge_to_disk(recipe(tmp_path), tmp_path / "out")
    loaded = getattr(transformers, family.auto).from_pretrained(tmp_path / "out", dtype="auto")
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32, getattr(torch, dtype)}
    for tensor, value in loaded.state_dict().items():
        assert torch.equal(slot.model.state_dict()[tensor], value), tensor


def test_variances_below_zero_are_not_written(tmp_path):
    make(FAMILIES["ResNet"], tmp_path)
    with pytest.raises(BadInput, match=r"running_var': merged variances down to -.*; expected 0 or above"):
        merge_to_disk(recipe(tmp_path, 200.0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_live_model_is_not_of_other_weights_than_the_pool(tmp_path):
    """Of a folder with two checkpoints the pool reads the index's files, and transformers the other."""
    make(FAMILIES["Llama"], tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    (tmp_path / "base" / "part.safetensors").write_bytes(file.read_bytes())
    index = {"weight_map": dict.fromkeys(load_file(file), "part.safetensors")}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="index.json and model.safetensors, which it does not name; expected one"):
        opened(tmp_path)


def test_a_base_without_one_of_its_parameters_is_refused_at_open(tmp_path):
    from safetensors.torch import save_file

    make(FAMILIES["Llama"], tmp_path)
    for name in ("base", "e0", "e1"):
        file = Path(tmp_path / name / "model.safetensors")
        tensors = load_file(file)
        del tensors["lm_head.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
    expected = (
        r"no tensor 'lm_head\.weight' \(one of 1\), and numbers would be made up for it; expected every parameter"
    )
    with pytest.raises(CheckpointError, match=expected):
        opened(tmp_path)
