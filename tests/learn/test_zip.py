"""Maps of families: a model zipped with a copy of itself whose units lie in another order is that model."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge3.errors import BadInput, CheckpointError, ItemsError
from merge3.learn.zip import built, check_alike, depth_of, measure_zip, rewritten, zip_models
from merge3.learn.zip_correlation import Batch, renew_statistics
from merge3.learn.zip_grouping import Grouping
from merge3.learn.zip_maps import FAMILIES, map_of
from merge3.learn.zip_matching import match_as_they_are, match_one_to_one, match_zip

TEXT = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64}


# name -> (config class, its settings, model class)
MODELS = {
    "llama": ("LlamaConfig", GROUPED, "LlamaForCausalLM"),
    "llama tied": ("LlamaConfig", TEXT | {"tie_word_embeddings": True}, "LlamaForCausalLM"),
    "llama, a bias everywhere": (
        "LlamaConfig",
        GROUPED | {"attention_bias": True, "mlp_bias": True},
        "LlamaForSequenceClassification",
    ),
    "mistral": ("MistralConfig", GROUPED | {"head_dim": 8}, "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", GROUPED, "Qwen2ForCausalLM"),
    "bert": ("BertConfig", TEXT, "BertForSequenceClassification"),
    "bert, tokens": ("BertConfig", TEXT, "BertForTokenClassification"),
    "bert, masked": ("BertConfig", TEXT, "BertForMaskedLM"),
    "bert, masked, not tied": ("BertConfig", TEXT | {"tie_word_embeddings": False}, "BertForMaskedLM"),
    "vit": (
        "ViTConfig",
        {k: v for k, v in TEXT.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 2, "num_channels": 1},
        "ViTForImageClassification",
    ),
    "resnet": (
        "ResNetConfig",
        {"num_channels": 1, "embedding_size": 12, "hidden_sizes": [12, 20], "depths": [2, 2], "layer_type": "basic"},
        "ResNetForImageClassification",
    ),
    "resnet, bottlenecks": (
        "ResNetConfig",
        {"num_channels": 1, "embedding_size": 12, "hidden_sizes": [24, 32], "depths": [1, 2]},
        "ResNetForImageClassification",
    ),
}


def made(name, seed=0):
    """A model whose units differ, and what it is shown."""
    import transformers

    config, settings_, kind = MODELS[name]
    torch.manual_seed(seed)
    own = {"num_labels": 3, "pad_token_id": 0} if "Classification" in kind else {}
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings_, **own)).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor_name, tensor in model.state_dict().items():
            if "running_var" in tensor_name:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=g))
            elif tensor.is_floating_point() and tensor.dim() == 2:
                tensor.mul_(4)
            elif tensor.is_floating_point() and tensor.dim() == 1:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=g))
    return model, batches(model)


def batches(model):
    g = torch.Generator().manual_seed(5)
    if model.main_input_name == "pixel_values":
        side = getattr(model.config, "image_size", 24)
        return [Batch({"pixel_values": torch.randn(rows, 1, side, side, generator=g)}) for rows in (10, 6)]
    ids, mask = torch.randint(1, 40, (12, 9), generator=g), torch.ones(12, 9, dtype=torch.long)
    ids[3, 6:], mask[3, 6:] = 0, 0
    return [Batch({"input_ids": ids[at], "attention_mask": mask[at]}, mask[at]) for at in (slice(8), slice(8, 12))]


@torch.no_grad()
def said(model, shown):
    """Outputs of all inputs, where no input is padding."""
    found = []
    for batch in shown:
        out = model(**batch.inputs).logits
        found.append(out[batch.mask.bool()] if batch.mask is not None and out.dim() == 3 else out)
    return torch.cat([part.flatten() for part in found])


def shuffled(model, seed=1):
    """The same function, its units of every space in another order. Written from what the map's rows say."""
    rng, found, sizes = np.random.default_rng(seed), map_of(model), {}
    for name, tensor in model.state_dict().items():
        for dim, axis in enumerate(found.row(name).axes):
            if axis:
                sizes[axis[1:]] = tensor.shape[dim]
    places = {space: rng.permutation(size) for space, size in sizes.items()}
    for own in found.attentions:
        heads, inside = rng.permutation(own.heads), np.arange(own.width)
        for head in range(own.heads):
            values, order = rng.permutation(own.width), rng.permutation(own.share)
            keys = inside if own.rotary else rng.permutation(own.width)
            places[own.value][head * own.width + inside] = heads[head] * own.width + values
            places[own.key][head * own.width + inside] = heads[head] * own.width + keys
            for query in range(own.share):
                start = (head * own.share + query) * own.width
                goes = (heads[head] * own.share + order[query]) * own.width
                places[own.mixed][start + inside] = goes + values
                places[own.query][start + inside] = goes + keys
    groupings = {space: Grouping.of(np.stack([own, own])) for space, own in places.items()}
    _, (_, other) = rewritten(found, groupings, [model.state_dict()] * 2, limit=-1)
    return built(model, other)


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_in_another_order_gives_the_model_back(name):
    model, shown = made(name)
    other, right = shuffled(model), said(model, shown)
    assert (said(other, shown) - right).abs().max() < 1e-4  # the map tells the truth of the family
    same = [key for key, tensor in model.state_dict().items() if torch.equal(tensor, other.state_dict()[key])]
    assert len(same) < 0.5 * len(model.state_dict())
    for match in (match_zip, match_one_to_one):
        for depth in (1.0, 1):
            seen = measure_zip((model, other), shown, depth)
            zipped = zip_models((model, other), seen, match)
            assert zipped.one == isinstance(depth, float)
            for own, of in zip(zipped.own, (model, other)):
                result = built(of, {**zipped.common, **own})
                assert (said(result, shown) - right).abs().max() < 1e-4
            assert min(after for _, after in zipped.correlation.values()) > 0.85
    plain = zip_models((model, other), measure_zip((model, other), shown, 1.0), match_as_they_are)
    assert (said(built(model, plain.common), shown) - right).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "bert, masked", "vit", "resnet"])
def test_no_depth_leaves_both_as_they_are(name):
    (model, shown), (other, _) = made(name), made(name, seed=3)
    zipped = zip_models((model, other), measure_zip((model, other), shown, 0), match_zip)
    assert not zipped.common and not zipped.groupings
    for own, of in zip(zipped.own, (model, other)):
        assert all(torch.equal(own[key], tensor) for key, tensor in of.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "resnet", "resnet, bottlenecks"])
def test_models_of_other_initialisations(name):
    """What is one, what is each model's own, and that both results are finite models of their class."""
    (model, shown), (other, _) = made(name), made(name, seed=3)
    seen = measure_zip((model, other), shown, 1)
    zipped = zip_models((model, other), seen, match_zip)
    assert set(zipped.common) | set(zipped.own[0]) == set(model.state_dict())
    assert not set(zipped.common) & set(zipped.own[0]) and set(zipped.own[0]) == set(zipped.own[1])
    layer = [key for key in zipped.common if "layers.1." in key or ("layer.1." in key and "stages" not in key)]
    assert zipped.common and not layer
    for own, of in zip(zipped.own, (model, other)):
        assert said(built(of, {**zipped.common, **own}), shown).isfinite().all()
    whole = zip_models((model, other), measure_zip((model, other), shown, 1.0), match_zip)
    assert whole.one and set(whole.common) == set(model.state_dict())
    assert said(built(model, whole.common), shown).isfinite().all()
    for space, (before, after) in whole.correlation.items():
        # Queries and keys turn with what their heads write; heads may all be merged within their models.
        assert space.endswith(("queries", "keys")) or np.isnan(after) or after > before, space


def test_a_stream_that_goes_on_is_renamed():
    """It runs across the depth: one to one there, zipped where the whole model is."""
    (model, shown), (other, _) = made("vit"), made("vit", seed=3)
    for depth, renamed in ((1, True), (1.0, False)):
        groupings = zip_models((model, other), measure_zip((model, other), shown, depth), match_zip).groupings
        assert groupings["stream"].one_to_one == renamed


def test_a_stage_that_ends_is_folded():
    """Its next layer is a convolution on both paths: units of one model are merged, and U is in that layer."""
    (model, shown), (other, _) = made("resnet"), made("resnet", seed=3)
    zipped = zip_models((model, other), measure_zip((model, other), shown, 2), match_zip)
    stem = zipped.groupings["stem"]
    assert not stem.one_to_one
    name = "resnet.encoder.stages.1.layers.0.shortcut.convolution.weight"
    for at, of in enumerate((model, other)):
        expected = torch.zeros_like(of.state_dict()[name])
        for unit, place in enumerate(stem.places[at].tolist()):
            expected[:, place] += of.state_dict()[name][:, unit]
        assert torch.allclose(zipped.own[at][name], expected)


def test_an_output_is_untied_where_it_came_out_differently():
    (model, shown), (other, _) = made("llama tied"), made("llama tied", seed=3)
    zipped = zip_models((model, other), measure_zip((model, other), shown, 1.0), match_zip)
    result = built(model, zipped.common)
    assert not zipped.groupings["stream"].one_to_one and not result.config.tie_word_embeddings
    assert result.lm_head.weight is not result.model.embed_tokens.weight and model.config.tie_word_embeddings
    permuted = zip_models((model, other), measure_zip((model, other), shown, 1.0), match_one_to_one)
    kept = built(model, permuted.common)
    assert kept.config.tie_word_embeddings and kept.lm_head.weight is kept.model.embed_tokens.weight


def test_heads_of_other_labels_stay_with_their_models():
    (model, shown), (other, _) = made("resnet"), made("resnet", seed=3)
    other.config.id2label = {0: "x", 1: "y", 2: "z"}
    other.config.label2id = {"x": 0, "y": 1, "z": 2}
    zipped = zip_models((model, other), measure_zip((model, other), shown, 1.0), match_zip)
    assert set(zipped.own[0]) == {"classifier.1.weight", "classifier.1.bias"} and not zipped.one


def test_statistics_are_those_of_the_items():
    model, shown = made("resnet")
    norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    first = model.get_submodule(norms[0])
    kept = first.momentum, model.get_submodule(norms[1]).running_mean.clone()
    renew_statistics(model, shown, norms[:1])
    given = []
    handle = first.register_forward_hook(lambda module, arguments, out: given.append(arguments[0]))
    said(model, shown)
    handle.remove()
    mean = torch.stack([part.mean((0, 2, 3)) for part in given]).mean(0)
    assert torch.allclose(first.running_mean, mean, atol=1e-5) and first.momentum == kept[0] and not first.training
    assert torch.equal(model.get_submodule(norms[1]).running_mean, kept[1])


@given(st.integers(1, 64), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_depth_is_a_share_or_a_number(layers, share):
    assert depth_of(1.0, layers) == layers and depth_of(0.0, layers) == 0 and depth_of(1, layers) == 1
    assert abs(depth_of(share, layers) - share * layers) <= 0.5
    with pytest.raises(BadInput, match=f"depth: {layers + 1} layers; expected at most the models' {layers}"):
        depth_of(layers + 1, layers)


def test_what_is_refused():
    llama, bert = made("llama")[0], made("bert")[0]
    with pytest.raises(CheckpointError, match="a LlamaForCausalLM and a BertForSequenceClassification"):
        check_alike((llama, bert))
    wider = copy.deepcopy(llama.config)
    wider.intermediate_size = 40
    with pytest.raises(CheckpointError, match="intermediate_size is 36 in the first, 40 in the second"):
        check_alike((llama, type(llama)(wider)))
    from transformers import GPT2Config, GPT2LMHeadModel

    unknown = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10, n_positions=8))
    with pytest.raises(
        BadInput, match=f"no map of its units, model_type 'gpt2'; expected one of {', '.join(FAMILIES)}"
    ):
        map_of(unknown)
    llama.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(BadInput, match=r"tensor 'model\.extra\.weight', of which the map of llama says nothing"):
        map_of(llama)


def test_inputs_that_a_model_cannot_take():
    model, _ = made("vit")
    with pytest.raises(ItemsError, match="a ViTForImageClassification cannot take them"):
        measure_zip((model, model), [Batch({"pixel_values": torch.zeros(2, 1, 9, 9)})], 1.0)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.vit.layers[0].mlp.fc1.weight[0] = float("nan")
    with pytest.raises(ItemsError, match=r"model 2: .*states that are NaN or infinite"):
        measure_zip((model, broken), batches(model), 1.0)
