"""Tiny models of every family in common use, made by transformers, and what each is shown.

A row says which class of which configuration, how the class is loaded again by others, and the inputs that a forward
takes. Widths are small, layers two, and where a model has two stacks their depths differ, so that a mix-up shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

TEXT = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)
VISION = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=16,
    patch_size=8,
)
IDS = torch.tensor([[1, 5, 9, 11, 17, 40, 3], [1, 8, 8, 30, 22, 4, 6]])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16).sin()


@dataclass(frozen=True)
class Family:
    """kind: the configuration's model type. model: the class. auto: what others load it with. settings: of the
    configuration. inputs: of a forward. asks: item kinds that such a model answers. main: what
    stands before the numbers of the layers that gradients, slices and spaces count. note: for the documentation."""

    kind: str
    model: str
    auto: str
    settings: dict[str, Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    asks: tuple[str, ...]
    main: str
    note: str = ""


def text() -> dict[str, torch.Tensor]:
    """Token ids."""
    return {"input_ids": IDS}


def padded() -> dict[str, torch.Tensor]:
    """Token ids of different lengths, for encoders."""
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    return {"input_ids": IDS, "attention_mask": mask}


def both() -> dict[str, torch.Tensor]:
    """Token ids for an encoder, and others for its decoder."""
    return {"input_ids": IDS, "decoder_input_ids": IDS[:, 2:5]}


def picture() -> dict[str, torch.Tensor]:
    """Two images."""
    return {"pixel_values": PIXELS}


def text_and_picture() -> dict[str, torch.Tensor]:
    """Two texts and two images, side by side."""
    return {"input_ids": IDS, "pixel_values": PIXELS}


def picture_in_text() -> dict[str, torch.Tensor]:
    """Two texts in each of which four tokens (63) stand for an image's patches."""
    ids = torch.cat([IDS[:, :2], torch.full((2, 4), 63), IDS[:, 2:]], 1)
    return {"input_ids": ids, "pixel_values": PIXELS}


def patches_in_text() -> dict[str, torch.Tensor]:
    """The same for Qwen-VL, which takes an image as a list of patches: 4 by 4 of them, merged 2 by 2."""
    ids = torch.cat([IDS[:1, :2], torch.tensor([[61, 63, 63, 63, 63, 62]]), IDS[:1, 2:]], 1)
    pixels = torch.linspace(-1, 1, 16 * 3 * 2 * 4 * 4).reshape(16, -1).sin()
    kinds = (ids == 63).long()
    grid = torch.tensor([[1, 4, 4]])
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}


def sound() -> dict[str, torch.Tensor]:
    """Two spectrograms, and tokens for the decoder."""
    features = torch.linspace(-1, 1, 2 * 8 * 32).reshape(2, 8, 32).sin()
    return {"input_features": features, "decoder_input_ids": IDS[:, 1:5]}


ASKED = ("choice", "generate")
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40)
MAMBA = dict(mamba_d_state=8, mamba_d_conv=4, mamba_expand=2, mamba_n_groups=1, mamba_d_head=8, mamba_chunk_size=8)
# Heads whose labels have no names are merged with a warning.
NAMED = dict(id2label={0: "no", 1: "maybe", 2: "yes"}, label2id={"no": 0, "maybe": 1, "yes": 2})
BIASED = dict(pos_att_type=["c2p", "p2c"], relative_attention=True)
PAIR = dict(
    vocab_size=64,
    d_model=32,
    encoder_layers=4,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
)
ROTATED = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
TOKENS = dict(image_token_id=63, video_token_id=60, vision_start_token_id=61, vision_end_token_id=62)
FUSED = "experts are fused as they load; a swap writes each into its part"
RENAMED = "names as transformers stores them; others as it loads them"
STATE = "answers share no beginning"


def _causal(kind: str, model: str, main: str = "model.layers", note: str = "", **settings) -> Family:
    return Family(kind, model, "AutoModelForCausalLM", TEXT | settings, text, ASKED, main, note)


def _encoder(kind: str, model: str, main: str, asks: tuple[str, ...] = (), **settings) -> Family:
    auto = f"AutoModel{re.sub('^.*(?=For)', '', model)}" if "For" in model else "AutoModel"
    sizes = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    return Family(kind, model, auto, sizes | settings, padded, asks, main)


def _vision_language(kind: str, model: str, main: str, note: str, text_settings, vision, inputs, **settings) -> Family:
    nested = {"text_config": TEXT | text_settings, "vision_config": vision, "tie_word_embeddings": False}
    return Family(kind, model, "AutoModelForImageTextToText", nested | settings, inputs, ASKED, main, note)


FAMILIES: dict[str, Family] = {
    "Llama": _causal("llama", "LlamaForCausalLM"),
    "Mistral": _causal("mistral", "MistralForCausalLM", sliding_window=6),
    "Qwen2": _causal("qwen2", "Qwen2ForCausalLM"),
    "Qwen3": _causal("qwen3", "Qwen3ForCausalLM", head_dim=8),
    "Gemma 2": _causal("gemma2", "Gemma2ForCausalLM", head_dim=8, sliding_window=6, tie_word_embeddings=True),
    "Gemma 3": _causal("gemma3_text", "Gemma3ForCausalLM", head_dim=8, sliding_window=6, tie_word_embeddings=True),
    "Phi-2": _causal("phi", "PhiForCausalLM"),
    "Phi-3": _causal("phi3", "Phi3ForCausalLM"),
    "GPT-2": Family(
        "gpt2", "GPT2LMHeadModel", "AutoModelForCausalLM",
        dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64), text, ASKED, "transformer.h",
    ),
    "GPT-NeoX": _causal("gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.layers"),
    "OLMo": _causal("olmo", "OlmoForCausalLM"),
    "OLMo 2": _causal("olmo2", "Olmo2ForCausalLM"),
    "Mixtral": _causal("mixtral", "MixtralForCausalLM", note=FUSED, num_local_experts=4, num_experts_per_tok=2),
    "Qwen2-MoE": _causal("qwen2_moe", "Qwen2MoeForCausalLM", note=FUSED, **EXPERTS),
    "Qwen3-MoE": _causal("qwen3_moe", "Qwen3MoeForCausalLM", note=FUSED, head_dim=8, **EXPERTS),
    "Mamba": _causal("mamba", "MambaForCausalLM", "backbone.layers", STATE, state_size=8),
    "Jamba": _causal(
        "jamba", "JambaForCausalLM", note=f"{STATE}; experts as above", num_experts=4, num_experts_per_tok=2,
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_dt_rank=4,
        use_mamba_kernels=False, **MAMBA,
    ),
    "Falcon-H1": _causal(
        "falcon_h1", "FalconH1ForCausalLM", note=STATE, mamba_d_ssm=32, mamba_n_heads=4, head_dim=8, **MAMBA
    ),
    "Bamba": _causal("bamba", "BambaForCausalLM", note=STATE, attn_layer_indices=[1], mamba_n_heads=8, **MAMBA),
    "BERT": _encoder("bert", "BertModel", "encoder.layer", ("rank",)),
    "BERT, masked": _encoder("bert", "BertForMaskedLM", "bert.encoder.layer", tie_word_embeddings=True),
    "BERT, classifier": _encoder(
        "bert", "BertForSequenceClassification", "bert.encoder.layer", ("classify",), **NAMED
    ),
    "RoBERTa": _encoder("roberta", "RobertaForMaskedLM", "roberta.encoder.layer", tie_word_embeddings=True),
    "DeBERTa": _encoder(
        "deberta", "DebertaForSequenceClassification", "deberta.encoder.layer", ("classify",), **NAMED, **BIASED
    ),
    "DeBERTa-v2": _encoder("deberta-v2", "DebertaV2ForMaskedLM", "deberta.encoder.layer", position_buckets=8, **BIASED),
    "T5": Family(
        "t5", "T5ForConditionalGeneration", "AutoModelForSeq2SeqLM",
        dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_decoder_layers=2, num_heads=4,
             decoder_start_token_id=0), both, ASKED, "decoder.block",
    ),
    "BART": Family(
        "bart", "BartForConditionalGeneration", "AutoModelForSeq2SeqLM", PAIR | {"max_position_embeddings": 64}, both,
        ASKED, "model.decoder.layers",
    ),
    "ViT": Family(
        "vit", "ViTForImageClassification", "AutoModelForImageClassification", VISION | NAMED, picture,
        ("classify",), "vit.encoder.layer", RENAMED,
    ),
    "ResNet": Family(
        "resnet", "ResNetForImageClassification", "AutoModelForImageClassification",
        dict(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic", **NAMED), picture,
        ("classify",), "resnet.encoder.stages", "a stage counts as a layer; `num_batches_tracked` is the base's",
    ),
    "CLIP": Family(
        "clip", "CLIPModel", "AutoModel",
        dict(text_config={k: TEXT[k] for k in TEXT if "key_value" not in k}, vision_config=VISION, projection_dim=16),
        text_and_picture, (), "vision_model.encoder.layers", "of two towers the one with more layers",
    ),
    "Whisper": Family(
        "whisper", "WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq",
        PAIR | dict(num_mel_bins=8, max_source_positions=16, max_target_positions=32, pad_token_id=0, bos_token_id=1,
                    eos_token_id=2, decoder_start_token_id=1), sound, (), "model.decoder.layers",
    ),
    "LLaVA": _vision_language(
        "llava", "LlavaForConditionalGeneration", "language_model.model.layers", RENAMED, {"model_type": "llama"},
        VISION | {"model_type": "clip_vision_model"}, picture_in_text, image_token_index=63, vision_feature_layer=-1,
        image_seq_length=4,
    ),
    "Qwen2-VL": _vision_language(
        "qwen2_vl", "Qwen2VLForConditionalGeneration", "model.layers", RENAMED, ROTATED,
        dict(depth=3, embed_dim=16, hidden_size=32, num_heads=2, patch_size=4, mlp_ratio=2, in_channels=3),
        patches_in_text, **TOKENS,
    ),
    "Qwen2.5-VL": _vision_language(
        "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "model.layers", RENAMED, ROTATED,
        dict(depth=3, hidden_size=16, out_hidden_size=32, intermediate_size=24, num_heads=2, patch_size=4,
             window_size=16, fullatt_block_indexes=[1], in_channels=3),
        patches_in_text, **TOKENS,
    ),
}  # fmt: skip

# Families whose ways another one shows: walked by `make test-heavy`, for time's sake.
ALIKE = {
    "Qwen2", "Qwen3", "Gemma 2", "Phi-2", "GPT-NeoX", "OLMo", "OLMo 2", "Qwen2-MoE", "Bamba", "BERT, masked", "DeBERTa",
    "Qwen2.5-VL",
}  # fmt: skip


def walked(names: Iterable[str] = FAMILIES) -> list:
    """Names of families as parameters of a test."""
    return [pytest.param(name, marks=[pytest.mark.heavy] if name in ALIKE else []) for name in names]


def make(family: Family, folder: Path, models: int = 3) -> str | None:
    """Write `base` and its fine-tunes `e0`, `e1`, which are it plus noise. Returns why not, where this transformers
    does not have the family or needs what is not installed."""
    import transformers

    torch.manual_seed(0)
    try:
        model = getattr(transformers, family.model)(transformers.AutoConfig.for_model(family.kind, **family.settings))
    except (AttributeError, ImportError, KeyError, ValueError) as error:
        return str(error).split("\n")[0]
    weights = [value for value in model.state_dict().values() if value.is_floating_point()]
    base = [value.clone() for value in weights]
    for number, name in enumerate(("base", "e0", "e1")[:models]):
        with torch.no_grad():
            for value, start in zip(weights, base):
                noise = torch.randn(value.shape, dtype=value.dtype) * 0.02
                # Ones and zeros that a new model has would hide tensors that are exchanged.
                start.add_(noise) if number == 0 else None
                value.copy_(start if number == 0 else start + noise)
        model.save_pretrained(folder / name)
    return None


@torch.no_grad()
def outputs(model, family: Family) -> dict[str, torch.Tensor]:
    """Everything that a forward gives, by where it stands."""
    found = {}
    waiting = [("", model(**family.inputs()))]
    while waiting:
        place, value = waiting.pop()
        if torch.is_tensor(value):
            found[place] = value
        elif isinstance(value, (tuple, list)):
            waiting += [(f"{place}.{i}", part) for i, part in enumerate(value)]
        elif hasattr(value, "items"):
            waiting += [(f"{place}.{key}", part) for key, part in value.items()]
    return {place: value for place, value in found.items() if value.is_floating_point()}
