"""Models of several stacks: which one counts as the layers, and what config.json says of it where slices change it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge3 import Pool, Recipe, Slot, merge_to_disk
from merge3.checkpoint.layout import layout
from merge3.errors import CheckpointError, RecipeError
from tests.families import FAMILIES, TEXT, make, outputs

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


def cut(root, sources, out="out"):
    """A merge to disk of ranges of the base's layers. Returns its config.json."""
    merge_to_disk(recipe(root, sources), root / out)
    return json.loads((root / out / "config.json").read_text())


def recipe(root, sources):
    """Ranges of the base's layers, one after the other."""
    slices = [{"sources": [{"model": str(root / "base"), "layer_range": list(part)}]} for part in sources]
    return Recipe.parse({"merge_method": "passthrough", "slices": slices})


def edit(folder, change):
    """Change a config.json in place by a function."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def causal(kind, model, main="model.layers", **settings):
    """A family that no other test needs."""
    return replace(FAMILIES["Llama"], kind=kind, model=model, main=main, settings=TEXT | settings)


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
    arithmetic = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": models}
    merge_to_disk(Recipe.parse(arithmetic), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1
    stored = (load_file(tmp_path / model / "model.safetensors").keys() for model in ("base", "out"))
    assert next(stored) == next(stored)


def test_layers_of_experts_alone_are_in_place_in_a_live_model(tmp_path, monkeypatch):
    """Of no base, as a search's default merges are: every layer has its number, and nothing is built to say so."""
    make(FAMILIES["Llama"], tmp_path, models=3)
    for model in ("base", "e0", "e1"):
        file = Path(tmp_path / model / "config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1}))
    base, *experts = (str(tmp_path / model) for model in ("base", "e0", "e1"))
    slot = Slot(Pool.open(base, experts))
    monkeypatch.setattr("merge3.stacking.layer_kinds", lambda *_: pytest.fail("models were built"))
    half = [{"model": model, "parameters": {"weight": 0.5}} for model in experts]
    slot.compile(Recipe.parse({"merge_method": "linear", "models": half}))


def test_layers_that_config_json_does_not_count_are_not_taken_apart(tmp_path):
    """Of slices it is not known which layers counted: one would be written that nobody loads."""
    make(FAMILIES["Llama"], tmp_path, models=1)
    file = Path(tmp_path / "base" / "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1}))
    slices = [{"sources": [{"model": str(tmp_path / "base"), "layer_range": [at, at + 1]}]} for at in (1, 0)]
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1, and 2 layers are stored"):
        merge_to_disk(Recipe.parse({"merge_method": "passthrough", "slices": slices}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- layers of several kinds

DEEP = dict(num_hidden_layers=4)
ORDER = [(0, 1), (2, 4), (1, 3)]  # one more than there were, and three elsewhere
KINDS = {
    "Gemma 2": (FAMILIES["Gemma 2"], DEEP | dict(sliding_window=2)),
    "Gemma 3": (FAMILIES["Gemma 3"], DEEP | dict(sliding_window=2, sliding_window_pattern=2)),
    "Qwen2 with a window": (
        FAMILIES["Qwen2"],
        DEEP | dict(use_sliding_window=True, sliding_window=2, max_window_layers=2),
    ),
    "SmolLM3": (
        causal("smollm3", "SmolLM3ForCausalLM", no_rope_layer_interval=2),
        DEEP,
    ),
    "GPT-Neo": (
        causal("gpt_neo", "GPTNeoForCausalLM", "transformer.h"),
        DEEP | dict(attention_types=[[["global", "local"], 2]], window_size=2),
    ),
}
LISTS = ("layer_types", "no_rope_layers", "attention_layers")


@pytest.mark.parametrize("name", KINDS)
def test_layers_keep_their_kind_where_their_type_makes_it_of_their_number(name, tmp_path):
    """As first published, their config.json lists no kinds: those of the output's numbers would be others."""
    import transformers

    family, changes = KINDS[name]
    family = replace(family, settings=family.settings | changes)
    make(family, tmp_path, models=1)
    edit(tmp_path / "base", lambda config: [config.pop(key, None) for key in LISTS])
    cut(tmp_path, ORDER)
    loader = getattr(transformers, family.model)
    base, out = (loader.from_pretrained(tmp_path / model).eval() for model in ("base", "out"))
    order = [layer for part in ORDER for layer in range(*part)]
    settings = base.config.to_dict()
    lists = {key: settings[key] for key in LISTS if isinstance(settings.get(key), list)}
    assert any(len(set(kinds)) > 1 for kinds in lists.values())
    lists = {key: [kinds[layer] for layer in order] for key, kinds in lists.items()}
    assert all(getattr(out.config, key) == kinds for key, kinds in lists.items())
    settings |= lists | {"num_layers" if name == "GPT-Neo" else "num_hidden_layers": len(order)}
    if name == "GPT-Neo":
        settings["attention_types"] = [[lists["attention_layers"], 1]]
    hand = loader(type(base.config)(**settings)).eval()
    weights = base.state_dict()
    taken = {}
    for number, layer in enumerate(order):
        start = f"{family.main}.{layer}."
        taken |= {
            f"{family.main}.{number}.{n.removeprefix(start)}": t for n, t in weights.items() if n.startswith(start)
        }
    hand.load_state_dict({n: t for n, t in weights.items() if not n.startswith(f"{family.main}.")} | taken)
    found, expected = outputs(out, family)[".logits"], outputs(hand, family)[".logits"]
    assert torch.equal(found, expected)


def test_layers_in_place_leave_the_rule_to_the_type(tmp_path):
    family = replace(FAMILIES["Gemma 2"], settings=FAMILIES["Gemma 2"].settings | DEEP)
    make(family, tmp_path, models=1)
    edit(tmp_path / "base", lambda config: config.pop("layer_types"))
    assert "layer_types" not in cut(tmp_path, [(0, 1), (1, 4)])
    assert "layer_types" not in cut(tmp_path, [(2, 4), (0, 2)], "moved")  # full attention at every second place still


RULES = {
    "attention scaled by a layer's number": (
        FAMILIES["GPT-2"],
        dict(n_layer=3, scale_attn_by_inverse_layer_idx=True),
        r"layer 0 of the output, which is 1 of .*base, would have attn\.scaling 0\.35\d+; expected 0\.17\d+ as there",
    ),
    "a table with a part for each layer": (
        causal("gemma3n_text", "Gemma3nForCausalLM"),
        dict(
            num_hidden_layers=3, head_dim=8, hidden_size_per_layer_input=4, vocab_size_per_layer_input=64,
            num_kv_shared_layers=0, laurel_rank=4, layer_types=["full_attention"] * 3, altup_num_inputs=2,
        ),
        r"tensor '.*per_layer.*' of .*base has a part for each layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_rules_of_numbers_that_no_config_can_say_are_refused(case, tmp_path):
    family, changes, message = RULES[case]
    family = replace(family, settings=family.settings | changes)
    assert make(family, tmp_path, models=1) is None
    with pytest.raises(CheckpointError, match=message):
        cut(tmp_path, [(1, 3), (0, 1)])
    assert not (tmp_path / "out").exists()
    cut(tmp_path, [(0, 1), (1, 3)])


# -- outputs that nobody can build


def test_an_output_that_transformers_cannot_build_is_refused_where_its_lead_is_one_that_it_can(tmp_path):
    sizes = dict(attention_window=[4, 4, 4], num_hidden_layers=3)
    family = causal("longformer", "LongformerForMaskedLM", "longformer.encoder.layer", **sizes)
    make(family, tmp_path, models=1)
    with pytest.raises(CheckpointError, match="transformers cannot build the output from its config.json"):
        cut(tmp_path, [(0, 3), (1, 3)])
    assert not (tmp_path / "out").exists()


def own(config):
    """Of a type that nobody knows, as OpenELM is to transformers."""
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["num_transformer_layers"] = config.pop("num_hidden_layers")


def test_a_depth_that_config_json_says_by_another_key_is_not_changed(tmp_path):
    make(FAMILIES["Llama"], tmp_path, models=1)
    edit(tmp_path / "base", own)
    with pytest.raises(CheckpointError, match="by no key that is known how many layers it has; there would be 3"):
        cut(tmp_path, [(0, 2), (1, 2)])
    assert cut(tmp_path, [(1, 2), (0, 1)])["num_transformer_layers"] == 2  # all layers are alike


UNKNOWN = {
    "type": lambda config: config.update(model_type="own", architectures=["OwnForCausalLM"]),
    "class": lambda config: config.pop("architectures"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_layers_of_an_unknown_type_or_class_are_compared_with_the_leads(what, tmp_path):
    make(FAMILIES["Llama"], tmp_path, models=1)
    edit(tmp_path / "base", UNKNOWN[what])
    assert cut(tmp_path, [(0, 2), (1, 2)], "alike")["num_hidden_layers"] == 3
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    wide = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {wide: torch.zeros(96, 32)}, file)
    for sources in ([(1, 2), (0, 1)], [(0, 2), (1, 2)]):
        with pytest.raises(CheckpointError, match=r"layer \d of the output has other tensors than layer \d of .*base"):
            cut(tmp_path, sources)
    assert not (tmp_path / "out").exists()
    cut(tmp_path, [(0, 1), (1, 2)])


def test_a_list_of_an_unknown_type_that_may_be_of_its_layers_is_not_left_behind(tmp_path):
    make(FAMILIES["Llama"], tmp_path, models=1)
    edit(tmp_path / "base", UNKNOWN["type"])
    edit(tmp_path / "base", lambda config: config.update(kinds=["wide", "narrow"]))
    with pytest.raises(CheckpointError, match="kinds may have an entry for each layer, in a type that transformers"):
        cut(tmp_path, [(1, 2), (0, 1)], "never")


def test_a_live_model_holds_no_layers_whose_kind_stays_behind(tmp_path):
    """Its own keep the kinds of their places: what it answers would not be the merge on disk."""
    family = replace(FAMILIES["Gemma 2"], settings=FAMILIES["Gemma 2"].settings | DEEP)
    make(family, tmp_path, models=1)
    slot = Slot(Pool.open(str(tmp_path / "base"), []))
    slot.swap(recipe(tmp_path, [(2, 4), (0, 2)]))
    with pytest.raises(RecipeError, match=r"layers of several kinds \(layer_types\), others .*; expected the base's"):
        slot.swap(recipe(tmp_path, [(1, 4), (0, 1)]))
