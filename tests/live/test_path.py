"""A path through resident layers is the model that one gets by really stacking copies of them."""

import copy

import pytest
import torch

from merge3.checkpoint.layout import Ref
from merge3.errors import BadInput, ConfigError, RecipeError
from merge3.export import merge_to_disk
from merge3.hops import Hop, hops_of, path_recipe, writers_of
from merge3.live.slot import Slot
from merge3.pool import Pool
from merge3.recipe import Recipe
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
TWICE = [
    ("a", 0, 1.0), ("b", 0, 0.7), ("b", 1, 1.0), ("b", 2, 1.0),
    ("a", 1, 1.4), ("a", 2, 1.0), ("a", 1, 0.9), ("a", 2, 1.0),
]  # fmt: skip
PATHS = {
    "in place": [("a", 0, 1.0), ("a", 1, 1.0), ("a", 2, 1.0)],
    "shorter": [("b", 1, 1.3)],
    "both, twice": TWICE,
}
IDS = torch.tensor([[1, 5, 9, 11, 17, 40, 3, 8, 33], [1, 8, 8, 30, 22, 4, 6, 51, 12]])


class Words:
    """As much of a tokenizer as writing asks for."""

    eos_token_id, pad_token_id = 2, 0

    def decode(self, tokens, skip_special_tokens=True):
        return " ".join(map(str, tokens))


def make_pair(folder, kind, **other):
    """Two models, a and b, which differs from a in `other` settings too; norms and biases are no ones and zeros."""
    import transformers

    for number, name in enumerate(("a", "b")):
        torch.manual_seed(number)
        settings = KINDS[kind] | (other if name == "b" else {})
        model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
        made = model(getattr(transformers, f"{kind}Config")(**settings))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.3 / parameter.shape[-1] ** 0.5 * torch.randn_like(parameter))
        made.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("a", "b")}


@pytest.fixture(scope="module", params=list(KINDS))
def models(request, tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("llamas"), "Llama")


def recipe(models, path, outside="a", **others):
    pool = Pool.open(models["a"], [models["b"]])
    writers = writers_of(pool.layouts[models["a"]].layer_names)
    hops = [Hop(models[name], layer, scale) for name, layer, scale in path]
    return path_recipe(hops, models[outside], writers, **others)


def opened(models):
    return Slot(Pool.open(models["a"], [models["b"]]))


class Scaled(torch.nn.Module):
    def __init__(self, layer, scale):
        super().__init__()
        self.layer, self.scale = layer, scale
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, states, *args, **kwargs):
        return self.layer(states * self.scale, *args, **kwargs)


def stack_of(model):
    inner = model.transformer if hasattr(model, "transformer") else model.model
    return inner, "h" if hasattr(inner, "h") else "layers"


def stacked(models, path):
    """The oracle: a model of that depth with copies of the layers."""
    from transformers import AutoModelForCausalLM

    loaded = {name: AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in models.items()}
    whole, own = loaded["a"], {name: list(getattr(*stack_of(model))) for name, model in loaded.items()}
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
    inner, attribute = stack_of(whole)
    setattr(inner, attribute, torch.nn.ModuleList(layers))
    return whole


@torch.inference_mode()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_the_model_of_stacked_copies(models, name):
    slot = opened(models)
    slot.swap(recipe(models, PATHS[name]))
    expected = stacked(models, PATHS[name])
    torch.testing.assert_close(logits(slot.model), logits(expected), rtol=1e-5, atol=1e-5)
    written = slot.model.generate(IDS, max_new_tokens=12, do_sample=False)
    assert torch.equal(written, expected.generate(IDS, max_new_tokens=12, do_sample=False))


def test_questions_with_a_shared_prefix_are_answered_alike(models):
    """Choices and continuations, prepared before the path is known, and asked of one path after the other."""
    slot, prefix = opened(models), (1, 5, 9, 11, 17, 40, 3)
    asks = LM(slot.model, Words())
    choices = [Choices((*prefix, 8, n), ((4, 5), (30, 7, 8), (22,))) for n in (33, 12, 6)]
    starts = [Start((*prefix, *more), max_tokens=7) for more in ((8,), (30, 22), (51, 12, 9))]
    likely, written = asks.loglikelihoods(choices), asks.generate(starts)
    for name in ("both, twice", "shorter", "in place", "both, twice"):
        slot.swap(recipe(models, PATHS[name]))
        expected = stacked(models, PATHS[name])
        others = LM(expected, Words())
        found = dict(likely(slot.model))
        for index, own in others.loglikelihoods([Choices(c.tokens, c.choices) for c in choices])(expected):
            torch.testing.assert_close(found[index].sums.float(), own.sums.float(), rtol=1e-4, atol=1e-4)
        with torch.inference_mode():
            for index, answer in written(slot.model):
                ids = torch.tensor([starts[index].tokens])
                told = expected.generate(ids, max_new_tokens=7, do_sample=False)[0, ids.shape[1] :].tolist()
                told = told[: told.index(2)] if 2 in told else told
                assert list(answer.tokens) == told


def test_a_path_copies_no_weight(models):
    slot = opened(models)
    pool, before = slot.pool, {id(p): p.data_ptr() for p in slot.model.parameters()}
    slot.swap(recipe(models, TWICE))
    layout = pool.layouts[models["a"]]
    known = set()
    for model in models.values():
        for layer in range(layout.layers):
            known |= {pool.get(Ref(model, layout.layer_tensor(layer, name))).data_ptr() for name in layout.layer_names}
    inside, stack = {}, getattr(*stack_of(slot.model))
    for hop in stack:
        inside |= {id(p): p for p in hop.parameters()}
    assert {p.data_ptr() for p in inside.values()} <= known
    assert len(inside) == 6 * len(layout.layer_names)  # of eight hops, every layer once
    others = [p for p in slot.model.parameters() if id(p) not in inside]
    assert {p.data_ptr() for p in others} <= set(before.values())
    assert sum(p.numel() for p in slot.model.parameters()) < sum(p.numel() for p in stacked(models, TWICE).parameters())


def test_other_merges_after_a_path_are_what_they_were(llamas):
    slot, fresh = opened(llamas), opened(llamas)
    ordinary = Recipe.parse(
        {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in llamas.values()]}
    )
    for ask in (lambda s: s.load(llamas["b"]), lambda s: s.swap(ordinary), lambda s: s.load(llamas["a"])):
        slot.swap(recipe(llamas, TWICE, outside="a"))
        ask(slot)
        ask(fresh)
        assert slot.model.config.num_hidden_layers == 3 and torch.equal(logits(slot.model), logits(fresh.model))
    slot.swap(recipe(llamas, TWICE))
    torch.testing.assert_close(logits(slot.model), logits(stacked(llamas, TWICE)), rtol=1e-5, atol=1e-5)


def test_embedding_norm_and_head_are_those_of_the_first_slice_and_the_last(llamas):
    slot = opened(llamas)
    for outside in "abba":
        slot.swap(recipe(llamas, [("b", 1, 1.0), ("a", 0, 1.0)], outside))
        for tensor in ("embed_tokens.weight", "norm.weight"):
            assert torch.equal(
                slot.model.get_parameter(f"model.{tensor}"), slot.pool.get(Ref(llamas[outside], f"model.{tensor}"))
            )
        assert torch.equal(slot.model.lm_head.weight, slot.pool.get(Ref(llamas[outside], "lm_head.weight")))


def test_the_exported_model_answers_as_the_live_path(models, tmp_path):
    """Scales folded into what writes to the state: LayerNorm with bias is as exact as RMSNorm, epsilon aside."""
    from transformers import AutoModelForCausalLM

    slot, path = opened(models), recipe(models, TWICE, dtype="float32")
    slot.swap(path)
    merge_to_disk(path, tmp_path / "out", slot.pool)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert exported.config.num_hidden_layers == len(TWICE)
    error = (logits(exported) - logits(slot.model)).abs().max()
    plain = recipe(models, [(name, layer, 1.0) for name, layer, _ in TWICE], dtype="float32")
    slot.swap(plain)
    assert error < 1e-3 < 0.03 < (logits(exported) - logits(slot.model)).abs().max()


def test_a_recipe_that_is_no_path_is_refused_as_before(llamas):
    slot = opened(llamas)
    path = recipe(llamas, TWICE)
    negative = copy.deepcopy(path.to_dict())
    for part in negative["slices"]:
        for entry in part["sources"][0].get("parameters", {}).get("scale", ())[:2]:
            entry["value"] *= -1
    whole = path.to_dict() | {"parameters": {"scale": 2.0}}
    for data in (negative, whole):
        assert hops_of(Recipe.parse(data), ("o_proj", "down_proj")) is None
        with pytest.raises(RecipeError, match="a slot cannot grow"):
            slot.swap(Recipe.parse(data))


@pytest.mark.parametrize(
    "change", [{"num_attention_heads": 2, "num_key_value_heads": 1}, {"rms_norm_eps": 1e-2}, {"rope_theta": 500.0}]
)
def test_models_that_compute_otherwise_are_refused_by_name(change, tmp_path):
    models = make_pair(tmp_path, "Llama", **change)
    slot = opened(models)
    with pytest.raises(ConfigError, match=r"b: (num_attention_heads|rms_norm_eps|rope_parameters|head_dim) is"):
        slot.swap(recipe(models, TWICE))


def test_layers_in_place_of_models_that_compute_otherwise_are_merged_as_before(tmp_path):
    models = make_pair(tmp_path, "Llama", rms_norm_eps=1e-2)
    slot = opened(models)
    slot.swap(recipe(models, [("a", 0, 1.0), ("b", 1, 1.0), ("a", 2, 1.0)]))
    name = "model.layers.1.mlp.up_proj.weight"
    assert slot.path.hops is None and torch.equal(slot.written()[name], slot.pool.get(Ref(models["b"], name)))


def test_models_of_other_widths_are_refused_when_they_are_opened(tmp_path):
    models = make_pair(tmp_path, "Llama", hidden_size=64)
    with pytest.raises(BadInput, match=r"layers\.0.*\[64"):
        Pool.open(models["a"], [models["b"]])


def test_other_families_are_refused_naming_those_that_can(tmp_path):
    from transformers import GemmaConfig, GemmaForCausalLM

    for name in ("a", "b"):
        GemmaForCausalLM(GemmaConfig(**SIZES | WIDE, head_dim=8)).save_pretrained(tmp_path / name)
    models = {name: str(tmp_path / name) for name in ("a", "b")}
    with pytest.raises(ConfigError, match="expected a language model of type llama, mistral, qwen2, qwen3, gpt2"):
        opened(models).swap(recipe(models, TWICE))
