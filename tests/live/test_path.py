"""A path through resident layers is the model that one gets by really stacking copies of them."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge3.checkpoint.layout import Ref
from merge3.errors import BadInput, CheckpointError, ConfigError, RecipeError
from merge3.hops import Hop, hops_of, path_recipe, writers_of
from merge3.live.slot import Slot
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.space import Space, SpaceDefinition
from merge3.tasks.lm import LM
from merge3.tasks.requests import Choices, Start

SIZES = dict(vocab_size=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)
WIDE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
KINDS = {
    "Llama": SIZES | WIDE,
    "Mistral": SIZES | WIDE | {"sliding_window": 6},
    "Qwen2": SIZES | WIDE | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "Qwen3": SIZES | WIDE | {"head_dim": 16},
    "GPT2": SIZES | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "tie_word_embeddings": True},
}
PATHS = {
    "in place": [("a", 0, 1.0), ("a", 1, 1.0), ("a", 2, 1.0)],
    "shorter": [("b", 1, 1.3)],
    "both, twice": [
        ("a", 0, 1.0), ("b", 0, 0.7), ("b", 1, 1.0), ("b", 2, 1.0), ("a", 1, 1.4), ("a", 2, 1.0), ("a", 1, 0.9), ("a", 2, 1.0),
    ],
}  # fmt: skip
IDS = torch.tensor([[1, 5, 9, 11, 17, 40, 3, 8, 33], [1, 8, 8, 30, 22, 4, 6, 51, 12]])


class Words:
    """As much of a tokenizer as writing asks for."""

    eos_token_id, pad_token_id = 2, 0

    def decode(self, tokens, skip_special_tokens=True):
        """Numbers as words."""
        return " ".join(map(str, tokens))


def make_kind(folder, kind, **other):
    import transformers

    for number, name in enumerate(("a", "b")):
        torch.manual_seed(number)
        settings = KINDS[kind] | (other if name == "b" else {})
        model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
        made = model(getattr(transformers, f"{kind}Config")(**settings))
        with torch.no_grad():
            for p in made.parameters():
                p.add_(0.3 / p.shape[-1] ** 0.5 * torch.randn_like(p))
        made.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module", params=list(KINDS))
def models(request, tmp_path_factory):
    folder = make_kind(tmp_path_factory.mktemp(request.param), request.param)
    return {name: str(folder / name) for name in ("a", "b")}


def hops(models, path):
    return [Hop(models[name], layer, scale) for name, layer, scale in path]


class Scaled(torch.nn.Module):
    def __init__(self, layer, scale):
        super().__init__()
        self.layer, self.scale = layer, scale
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, states, *args, **kwargs):
        return self.layer(states * self.scale, *args, **kwargs)


def stacked(models, path):
    """The oracle: copies of layers in a model of that depth."""
    from transformers import AutoModelForCausalLM

    loaded = {name: AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in models.items()}
    whole = loaded["a"]
    inner = whole.transformer if hasattr(whole, "transformer") else whole.model
    own = {name: list(getattr(m, "transformer", None).h if hasattr(m, "transformer") else m.model.layers) for name, m in loaded.items()}
    layers = []
    for index, (name, layer, scale) in enumerate(path):
        made = copy.deepcopy(own[name][layer])
        for module in made.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
        layers.append(Scaled(made, scale))
    kinds = getattr(whole.config, "layer_types", None)
    whole.config.num_hidden_layers = len(path)
    if kinds is not None:
        whole.config.layer_types = [kinds[layer] for _, layer, _ in path]
    setattr(inner, "h" if hasattr(inner, "h") else "layers", torch.nn.ModuleList(layers))
    return whole


def recipe(models, path, outside="a"):
    names = [n.partition(".")[2].partition(".")[2] for n in ()]
    pool = Pool.open(models["a"], [models["b"]])
    writers = writers_of(pool.layouts[models["a"]].layer_names)
    return path_recipe(hops(models, path), models[outside], writers)


@torch.inference_mode()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_the_model_of_stacked_copies(models, name):
    slot = Slot(Pool.open(models["a"], [models["b"]]))
    slot.swap(recipe(models, PATHS[name]))
    expected = stacked(models, PATHS[name])
    torch.testing.assert_close(logits(slot.model), logits(expected), rtol=1e-5, atol=1e-5)
    written = slot.model.generate(IDS, max_new_tokens=12, do_sample=False)
    assert torch.equal(written, expected.generate(IDS, max_new_tokens=12, do_sample=False))
