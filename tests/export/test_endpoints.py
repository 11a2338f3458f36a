"""Whatever is listed, in whatever order: every tensor of every model is merged, kept aloud, or the merge is refused."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from merge3.errors import BadInput, CheckpointError, RecipeError
from merge3.live.slot import Slot
from merge3.pool import Pool
from tests.families import FAMILIES, TEXT, Family, make, padded

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


def equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# -- depth


def test_models_of_unequal_depth_are_refused_in_any_order(workshop):
    workshop.model("base")
    workshop.expert("base", "same")
    workshop.model("deep", num_hidden_layers=5)
    for models in (["same", "deep"], ["deep", "same"]):
        with pytest.raises(RecipeError, match=r"models: .*deep has 5 layers, .*base 3; expected models of equal depth"):
            workshop.merge(models, "base")
    with pytest.raises(RecipeError, match="equal depth"):
        workshop.merge(["base", "deep"], method="linear")
    assert not (workshop.root / "out").exists()


def test_slices_may_take_layers_of_models_of_other_depths(workshop):
    base, deep = workshop.model("base"), workshop.model("deep", num_hidden_layers=5)
    slices = [
        {"sources": [{"model": str(base), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(deep), "layer_range": [1, 5]}]},
        {"sources": [{"model": str(base), "layer_range": [3, 3]}]},  # norm and head alone
    ]
    recipe = {"merge_method": "passthrough", "slices": slices}
    from merge3.export import merge_to_disk
    from merge3.recipe import Recipe

    merge_to_disk(Recipe.parse(recipe), workshop.root / "out")
    found, shallow, theirs = (workshop.tensors(n) for n in ("out", "base", "deep"))
    assert workshop.config("out")["num_hidden_layers"] == 6
    assert torch.equal(found["model.layers.2.mlp.up_proj.weight"], theirs["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(found[HEAD], shallow[HEAD])
    _, said = AutoModelForCausalLM.from_pretrained(workshop.root / "out", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]


# -- one model by two names


def test_one_folder_written_in_two_ways_is_refused(workshop, monkeypatch):
    """The base would be an expert without changes, which elections of signs and averages count."""
    workshop.model("base")
    workshop.expert("base", "one")
    monkeypatch.chdir(workshop.root)
    (workshop.root / "link").symlink_to(workshop.root / "base")
    for other in ("base/", "./base", str(workshop.root / "base"), "link"):
        with pytest.raises(CheckpointError, match=rf"{other}: the model that is also written base; expected one way"):
            Pool.open("base", ["one", other])
    with pytest.raises(CheckpointError, match="one/: the model that is also written one; expected one way"):
        Pool.open("base", ["one", "one/"])
    assert list(Pool.open("base", ["one", "base"]).endpoints) == ["base", "one"]


# -- what only one of two models has


def test_tensors_that_the_base_lacks_are_never_lost_in_silence(workshop):
    workshop.model("base")
    workshop.expert("base", "plain")
    bias = "model.layers.0.self_attn.q_proj.bias"
    workshop.edited(
        "plain", "biased", lambda t: t.update({bias: torch.ones(32)}), lambda c: c.update(attention_bias=True)
    )
    message = rf"biased: tensor '{bias}' is not in the base .*base, a merge would lose it.*--drop"
    for models in (["biased", "plain"], ["plain", "biased"]):
        with pytest.raises(CheckpointError, match=message):
            workshop.merge(models, "base")
    result, found = workshop.merge(["biased", "plain"], "base", drop=["*.bias"])
    assert list(result["left_out"].values()) == ["dropped, as asked"] and bias not in found
    with pytest.raises(CheckpointError, match=rf"base: no tensor '{bias}'"):
        workshop.merge(["base"], "biased", out="other")


def test_qwen_biases_do_not_vanish_in_a_llama(workshop):
    workshop.model("llama")
    workshop.model("qwen", "qwen2")
    with pytest.raises(CheckpointError, match=r"q_proj\.bias' is not in the base|k_proj\.bias' is not in the base"):
        workshop.merge(["qwen"], "llama")
    with pytest.raises(CheckpointError, match=r"llama: no tensor 'model\.layers\.0\.self_attn\.[kqv]_proj\.bias'"):
        workshop.merge(["llama"], "qwen")


def test_what_is_no_parameter_of_its_own_model_is_left_out_with_the_reason(workshop):
    workshop.model("base")
    workshop.expert("base", "plain")
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    workshop.edited("plain", "old", lambda t: t.update(frequencies | {"v_head.summary.weight": torch.ones(1, 32)}))
    result, found = workshop.merge(["old"], "base")
    reasons = {name.split(": ")[1]: reason for name, reason in result["left_out"].items()}
    assert "no parameter" in reasons["v_head.summary.weight"] and "buffer" in reasons[next(iter(frequencies))]
    assert found.keys() == workshop.tensors("base").keys()


def test_an_expert_with_more_tokens_keeps_the_base_embedding_and_says_so(workshop):
    workshop.model("base")
    workshop.expert("base", "big", rows=66)
    workshop.expert("base", "small", seed=2)
    result, found = workshop.merge(["big", "small"], "base")
    other, again = workshop.merge(["small", "big"], "base", out="again")
    equal(found, again)
    assert set(result["kept"]) == set(other["kept"]) == {EMBED, HEAD} and "[66, 32] in" in result["kept"][HEAD]
    assert torch.equal(found[EMBED], workshop.tensors("base")[EMBED])
    for models in (["big", "small"], ["small", "big"]):  # without a base nothing says whose to keep
        with pytest.raises(
            RecipeError, match=r"tensor 'model\.embed_tokens\.weight': shape .*base_model to keep it from"
        ):
            workshop.merge(models, method="linear", out="never")


# -- tied and untied


@pytest.fixture
def tied(workshop):
    """A tied base, two tied fine-tunes, an untied one, and one that stores a copy of what it ties."""
    workshop.model("base", "qwen2", tie_word_embeddings=True)
    workshop.expert("base", "one")
    workshop.expert("base", "two", seed=2)
    untie = lambda t: t.update({HEAD: t[EMBED] + 0.1})
    workshop.edited("one", "untied", untie, lambda c: c.update(tie_word_embeddings=False))
    workshop.edited("two", "stored", lambda t: t.update({HEAD: t[EMBED].clone()}))
    workshop.edited("one", "contradiction", untie)  # tied, says its config; transformers believes the tensors
    return workshop


def head_of(workshop, name):
    found = workshop.tensors(name)
    return found.get(HEAD, found[EMBED])


@pytest.mark.parametrize(
    "base,models", [("untied", ["untied", "one"]), ("base", ["untied", "two"]), ("base", ["stored", "contradiction"])]
)
def test_the_head_is_the_base_head_and_the_weighted_changes(tied, base, models):
    results = []
    for number, order in enumerate(itertools.permutations(models)):
        results.append(tied.merge(list(order), base, out=f"out{number}")[1])
        assert tied.config(f"out{number}")["tie_word_embeddings"] is False
    equal(*results)
    theta = head_of(tied, base)
    expected = theta + sum(0.5 * (head_of(tied, m) - theta) for m in models)
    assert torch.allclose(results[0][HEAD], expected, atol=1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(tied.root / "out0")
    assert torch.equal(loaded.lm_head.weight, results[0][HEAD])
    assert torch.equal(loaded.model.embed_tokens.weight, results[0][EMBED])


def test_linear_merges_of_tied_and_untied_models_do_not_depend_on_the_order(tied):
    one = tied.merge(["one", "untied"], method="linear", out="a")[1]
    equal(one, tied.merge(["untied", "one"], method="linear", out="b")[1])
    assert HEAD in one and not tied.config("a")["tie_word_embeddings"] and not tied.config("b")["tie_word_embeddings"]


@pytest.mark.parametrize(
    "base,models", [("base", ["one", "two"]), ("base", ["stored", "one"]), ("stored", ["one", "two"])]
)
def test_models_that_all_tie_their_head_make_one_that_does(tied, base, models):
    _, found = tied.merge(models, base)
    assert HEAD not in found and tied.config("out")["tie_word_embeddings"] is True


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties"])
@pytest.mark.parametrize("models", [["untied", "two"], ["one", "two"]])
def test_a_live_model_holds_the_head_that_is_exported(tied, method, models):
    pool = Pool.open(str(tied.root / "base"), [str(tied.root / m) for m in ("one", "two", "untied")])
    slot = Slot(pool)
    recipe = tied.recipe(
        models, "base", method=method, parameters={} if method == "task_arithmetic" else {"density": 0.6}
    )
    slot.swap(tied.recipe(["untied", "one"], "base", weight=1.0))  # what was there before must not matter
    slot.swap(recipe, seed=3)
    from merge3.export import merge_to_disk

    merge_to_disk(recipe, tied.root / "out", pool, seed=3)
    loaded = AutoModelForCausalLM.from_pretrained(tied.root / "out")
    equal(dict(loaded.state_dict()), dict(slot.model.state_dict()))
    slot.load(str(tied.root / "untied"))
    equal(dict(AutoModelForCausalLM.from_pretrained(tied.root / "untied").state_dict()), dict(slot.model.state_dict()))


# -- tensors that a class ties beside its head

EMBEDS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
SIZED = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"} | {"tie_word_embeddings": True}
COPIES = {
    "T5": (FAMILIES["T5"], dict.fromkeys(EMBEDS, "shared.weight")),
    "BART": (FAMILIES["BART"], {f"model.{name}": "model.shared.weight" for name in EMBEDS}),
    "Whisper": (FAMILIES["Whisper"], {"proj_out.weight": "model.decoder.embed_tokens.weight"}),
    "ALBERT": (
        Family(
            "albert", "AlbertForMaskedLM", "AutoModelForMaskedLM", SIZED | {"embedding_size": 16}, padded, (),
            "albert.encoder.albert_layer_groups",
        ),
        {"predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
         "predictions.decoder.bias": "predictions.bias"},
    ),
    "ModernBERT": (
        Family("modernbert", "ModernBertForMaskedLM", "AutoModelForMaskedLM", SIZED, padded, (), "model.layers"),
        {"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    ),
}  # fmt: skip


def storing(workshop, name, copies):
    """The same model with copies of what it ties, as files of older versions have them."""
    return workshop.edited(name, f"{name}_twice", lambda t: t.update({n: t[of].clone() for n, of in copies.items()}))


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_what_a_class_ties_are_one_tensor_with_it(name, workshop):
    """Random keeps would draw another mask for each, and an expert without them keep the base's."""
    family, copies = COPIES[name]
    assert make(family, workshop.root) is None
    for model in ("base", "e0", "e1"):
        storing(workshop, model, copies)
    settings = dict(method="dare_linear", parameters={"density": 0.5})
    _, expected = workshop.merge(["e0", "e1"], "base", **settings)
    assert not copies.keys() & expected.keys()
    for out, twice in (("a", ("base",)), ("b", ("e0",)), ("c", ("base", "e0", "e1"))):
        base, *models = (f"{model}_twice" if model in twice else model for model in ("base", "e0", "e1"))
        result, found = workshop.merge(models, base, out=out, **settings)
        assert not copies.keys() & result["kept"].keys()
        equal(found, expected)


def test_a_head_beside_tied_embeddings_is_merged_as_its_own(workshop):
    """T5 1.1 and Flan: config.json says that nothing is tied, and transformers ties the two embeddings all the same."""
    family, copies = COPIES["T5"]
    make(family, workshop.root)
    for model in ("base", "e0"):
        head = lambda t: t.update({HEAD: t["shared.weight"] * 0.5 + 0.1})
        workshop.edited(model, f"{model}_headed", head, lambda c: c.update(tie_word_embeddings=False))
    storing(workshop, "base_headed", copies)
    _, expected = workshop.merge(["e0_headed"], "base_headed", out="plain")
    result, found = workshop.merge(["e0_headed"], "base_headed_twice")
    equal(found, expected)
    assert result["kept"] == {} and HEAD in found and workshop.config("out") == workshop.config("plain")
    slot = Slot(Pool.open(str(workshop.root / "base_headed_twice"), [str(workshop.root / "e0_headed")]))
    slot.swap(workshop.recipe(["e0_headed"], "base_headed_twice"))
    loaded = AutoModelForSeq2SeqLM.from_pretrained(workshop.root / "out")
    equal(dict(loaded.state_dict()), dict(slot.model.state_dict()))


def test_a_stack_beside_the_main_one_is_as_deep_in_every_model(workshop):
    """Decoders of equal depth are merged; an encoder's last blocks would stay the base's."""
    family = FAMILIES["T5"]
    make(family, workshop.root, models=1)
    make(replace(family, settings=family.settings | {"num_layers": 2}), workshop.root / "shallow", models=1)
    with pytest.raises(CheckpointError, match=r"base: encoder\.block has 2 layers; expected 4 as in the base .*base"):
        workshop.merge(["shallow/base"], "base")
    assert not (workshop.root / "out").exists()


# -- the same model under other names


def test_gpt2_with_and_without_its_prefix_and_old_masks(workshop):
    workshop.model("base", "gpt2", n_layer=2, n_embd=32, n_head=4, n_positions=64, tie_word_embeddings=True)
    workshop.expert("base", "tuned")
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}

    def hub(t):  # as the first GPT-2 checkpoints on the hub are stored
        for name in list(t):
            t[name.removeprefix("transformer.")] = t.pop(name)
        t.update(masks)

    workshop.edited("base", "hub", hub)
    workshop.edited("tuned", "tuned_hub", hub)
    _, expected = workshop.merge(["tuned"], "base", out="plain")
    _, found = workshop.merge(["tuned_hub"], "base", out="a")
    equal(found, expected)
    result, found = workshop.merge(["tuned"], "hub", out="b")
    assert set(result["kept"]) == set(masks)
    equal({f"transformer.{n}": t for n, t in found.items() if n not in masks}, expected)
    for out in ("plain", "a", "b"):
        _, said = AutoModelForCausalLM.from_pretrained(workshop.root / out, output_loading_info=True)
        assert not said["missing_keys"]
    slot = Slot(Pool.open(str(workshop.root / "hub"), [str(workshop.root / "tuned")]))
    slot.swap(workshop.recipe(["tuned"], "hub"))
    equal(
        dict(AutoModelForCausalLM.from_pretrained(workshop.root / "plain").state_dict()), dict(slot.model.state_dict())
    )


def test_bert_with_and_without_prefix_pooler_and_old_norms(workshop):
    workshop.model("base", "bert", loader="AutoModel")  # no prefix, a pooler
    workshop.expert("base", "tuned", loader="AutoModel")

    def prefixed(t):
        for name in list(t):
            t[
                "bert."
                + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            ] = t.pop(name)

    workshop.edited("tuned", "prefixed", prefixed)
    _, expected = workshop.merge(["tuned"], "base", out="plain")
    _, found = workshop.merge(["prefixed"], "base", out="a")
    equal(found, expected)
    unpooled = lambda t: [t.pop(n) for n in list(t) if "pooler" in n]
    workshop.edited("tuned", "headless", unpooled, lambda c: c.update(architectures=["BertForMaskedLM"]))
    with pytest.raises(
        BadInput
    ):  # a masked language model without its head is not whole: nothing says what may be missing
        workshop.merge(["headless"], "base", out="b")


# -- settings that belong to layers


def test_settings_with_one_entry_a_layer_follow_their_layers(workshop):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    base = workshop.model("base", "qwen2", layer_types=kinds, sliding_window=8, use_sliding_window=True)
    ranges = [[1, 3], [0, 2]]
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(base), "layer_range": r}]} for r in ranges],
    }
    from merge3.export import merge_to_disk
    from merge3.recipe import Recipe

    merge_to_disk(Recipe.parse(recipe), workshop.root / "out")
    config = workshop.config("out")
    assert config["layer_types"] == [kinds[1], kinds[2], kinds[0], kinds[1]] and config["num_hidden_layers"] == 4


# -- the output against its own configuration


def test_a_checkpoint_that_its_own_config_does_not_describe_is_not_written(workshop):
    workshop.model("base")
    workshop.expert("base", "one")
    workshop.edited("base", "headless", lambda t: t.pop(HEAD))
    workshop.edited("one", "one_headless", lambda t: t.pop(HEAD))
    with pytest.raises(CheckpointError, match=rf"the output would lack '{HEAD}', and .*headless lacks it too"):
        workshop.merge(["one_headless"], "headless")
    workshop.edited("base", "wide", config=lambda c: c.update(intermediate_size=64))
    with pytest.raises(
        CheckpointError, match=r"mlp\.\w+_proj\.weight' of shape .*as config\.json says of LlamaForCausalLM"
    ):
        workshop.merge(["one"], "wide")
    assert not (workshop.root / "out").exists() and not list(workshop.root.glob(".out*"))


def test_an_unknown_architecture_is_compared_with_its_base(workshop):
    own = lambda c: c.update(architectures=["OwnForCausalLM"], model_type="own")
    workshop.model("plain")
    workshop.expert("plain", "tuned")
    workshop.edited("plain", "base", config=own)
    workshop.edited("tuned", "one", config=own)
    _, found = workshop.merge(["one"], "base")
    assert found.keys() == workshop.tensors("base").keys()
    assert json.loads((workshop.root / "out" / "config.json").read_text())["architectures"] == ["OwnForCausalLM"]
