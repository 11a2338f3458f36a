"""Models of equal shapes that do not belong together: a warning names the setting and both values; --strict refuses."""

import json
import re

import pytest
import torch
import yaml

from merge3.errors import CheckpointError, Merge3Warning
from merge3.pool import Pool
from merge3.recipe import Tokenizer
from merge3.world.tokenizer import make_tokenizer
from tests.classifiers import make_classifier
from tests.commands import client

SETTINGS = {
    "rope": (
        dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        r"rope_theta is 1000000\.0, 10000\.0 in the base",
    ),
    "activation": (dict(hidden_act="gelu"), "hidden_act is 'gelu', 'silu' in the base"),
    "epsilon": (dict(rms_norm_eps=1e-3), r"rms_norm_eps is 0\.001, 1e-06 in the base"),
    "window": (dict(max_position_embeddings=128), "max_position_embeddings is 128, 64 in the base"),
    "type": (
        dict(model_type="mistral", architectures=["MistralForCausalLM"]),
        "model_type is 'mistral', 'llama' in the base",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_another_setting_is_named_with_both_values(workshop, case):
    change, message = SETTINGS[case]
    workshop.model("base")
    workshop.expert("base", "one")
    workshop.edited("one", "other", config=lambda c: c.update(change))
    pool = Pool.open(str(workshop.root / "base"), [str(workshop.root / "other")])
    assert any(re.search(message, line) and "other" in line for line in pool.warnings), pool.warnings
    assert not Pool.open(str(workshop.root / "base"), [str(workshop.root / "one")]).warnings


def test_other_heads_of_equal_shapes(workshop):
    workshop.model("base")
    workshop.model("heads", num_attention_heads=8, num_key_value_heads=4)
    (lines,) = (Pool.open(str(workshop.root / "base"), [str(workshop.root / "heads")]).warnings,)
    assert any("num_attention_heads is 8, 4 in the base" in line for line in lines)


def test_layers_of_other_kinds(workshop):
    """A merge of models has the base's kinds of layers; with `slices` each brings its own."""
    workshop.model("base")
    workshop.expert("base", "one")
    kinds = ["full_attention", "sliding_attention"]
    for model, own in (("base", kinds), ("one", kinds[::-1])):
        workshop.edited(model, f"kinds of {model}", config=lambda c, own=own: c.update(layer_types=own * 2))
    base, one = (str(workshop.root / f"kinds of {model}") for model in ("base", "one"))
    (line,) = Pool.open(base, [one]).warnings
    assert "layer_types is ['sliding_attention', 'full_attention'" in line and "computes with the base's" in line
    workshop.edited("one", "shorter", config=lambda c: c.update(layer_types=kinds))
    assert not any("layer_types" in line for line in Pool.open(base, [str(workshop.root / "shorter")]).warnings)


def test_settings_left_to_their_defaults_are_no_difference(workshop):
    workshop.model("base")
    workshop.expert("base", "one")

    def shorten(config):
        for key in ("rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias", "pretraining_tp", "head_dim"):
            config.pop(key, None)

    workshop.edited("one", "short", config=shorten)
    assert not Pool.open(str(workshop.root / "base"), [str(workshop.root / "short")]).warnings


def test_two_pretrainings_of_one_architecture(workshop):
    workshop.model("base")
    workshop.model("stranger", seed=9)
    workshop.expert("base", "far", scale=0.02)
    (line,) = Pool.open(str(workshop.root / "base"), [str(workshop.root / "stranger")]).warnings
    assert "does not seem to be a fine-tune of" in line and "cosine" in line
    assert not Pool.open(str(workshop.root / "base"), [str(workshop.root / "far")]).warnings


def test_a_tokenizer_that_numbers_tokens_otherwise(workshop):
    workshop.model("base")
    workshop.expert("base", "one")
    for name in ("base", "one"):
        make_tokenizer().save_pretrained(workshop.root / name)
    opened = lambda: Pool.open(str(workshop.root / "base"), [str(workshop.root / "one")])
    assert not opened().warnings
    file = workshop.root / "one" / "tokenizer.json"
    data = json.loads(file.read_text())
    words = data["model"]["vocab"]
    words["one"], words["two"] = words["two"], words["one"]
    file.write_text(json.dumps(data))
    (line,) = opened().warnings
    assert "numbers tokens otherwise" in line


@pytest.fixture
def speaking(workshop):
    """A base with rows to spare, two fine-tunes of it, and the tokenizer of all three."""
    workshop.model("base", vocab_size=320)
    for name in ("one", "two"):
        workshop.expert("base", name)
    for name in ("base", "one", "two"):
        make_tokenizer().save_pretrained(workshop.root / name)
    return workshop


def warnings_of(workshop, *models, **settings):
    return Pool.open(str(workshop.root / "base"), [str(workshop.root / model) for model in models], **settings).warnings


def test_tokens_that_the_output_would_not_know_are_said_once_for_each_expert(speaking):
    """Added in rows that padded, they are lost with equal numbers of rows."""
    for model, tokens in (("one", [f"<|{i}|>" for i in range(5)]), ("two", ["<|0|>"])):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(tokens, special_tokens=True)
        tokenizer.save_pretrained(speaking.root / model)
    one, two = warnings_of(speaking, "one", "two")
    assert re.search(r"one: 5 of its tokens are not in the output's tokenizer \(e\.g\. '<\|0\|>', '<\|1\|>'", one)
    assert re.search(r"two: 1 of its tokens is not in the output's tokenizer \('<\|0\|>'\), which splits them", two)
    assert "`tokenizer_source: union`" in one and "`tokenizer_source: union`" in two
    assert not warnings_of(speaking, "one", "two", tokenizer=Tokenizer("union"))
    tokenizer.save_pretrained(speaking.root / "base")  # it has the one that `two` added
    (line,) = warnings_of(speaking, "one", "two")
    assert "one: 4 of its tokens" in line


def test_a_token_renamed_in_its_place_is_lost_too(speaking):
    file = speaking.root / "one" / "tokenizer.json"
    data = json.loads(file.read_text())
    words = data["model"]["vocab"]
    words["<|im_start|>"] = words.pop("two")
    file.write_text(json.dumps(data))
    (line,) = warnings_of(speaking, "one")
    assert "1 of its tokens is not in the output's tokenizer ('<|im_start|>')" in line


WORDS = {
    "vocab.txt": lambda words: "\n".join(words),
    "vocab.json": lambda words: json.dumps({word: number for number, word in enumerate(words)}),
}


@pytest.mark.parametrize("file", WORDS)
def test_older_forms_of_vocabularies_are_compared_too(speaking, file):
    words = [word for word, _ in sorted(make_tokenizer().get_vocab().items(), key=lambda pair: pair[1])]
    for model in ("base", "one", "two"):
        (speaking.root / model / "tokenizer.json").unlink()
        (speaking.root / model / file).write_text(WORDS[file](words))
    assert not warnings_of(speaking, "one", "two")
    (speaking.root / "two" / file).write_text(WORDS[file]([*words[:5], words[6], words[5], *words[7:]]))
    (speaking.root / "one" / "added_tokens.json").write_text(json.dumps({"<|im_end|>": len(words)}))
    one, two = warnings_of(speaking, "one", "two")
    assert "one: 1 of its tokens is not in the output's tokenizer ('<|im_end|>')" in one
    assert "two: its tokenizer numbers tokens otherwise" in two


def test_tokens_added_to_a_vocabulary_that_is_not_read_are_compared(speaking):
    for model in ("base", "one", "two"):
        (speaking.root / model / "tokenizer.json").unlink()
        (speaking.root / model / "tokenizer.model").write_text("sentencepiece's own")
    (speaking.root / "one" / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 300}))
    (line,) = warnings_of(speaking, "one", "two")
    assert "one: 1 of its tokens is not in the output's tokenizer ('<|im_end|>')" in line


# -- classifiers whose labels nobody named


def classifiers(root, *tasks):
    """Fine-tunes of one model, each with what its config.json says of its task; none names its labels."""
    model = make_classifier(2)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for number, task in enumerate(tasks):
        torch.manual_seed(number)
        model.load_state_dict({name: value + 0.01 * torch.randn_like(value) for name, value in start.items()})
        model.config.finetuning_task = task
        model.save_pretrained(root / f"m{number}")
    return str(root / "m0"), [str(root / f"m{number}") for number in range(1, len(tasks))]


def test_heads_of_two_tasks_are_not_averaged_for_want_of_names(tmp_path):
    pool = Pool.open(*classifiers(tmp_path, "sst2", "cola"))
    assert "answers another question" in pool.fixed["score.weight"] and not pool.warnings


@pytest.mark.parametrize("tasks", [(None, None, None), ("sst2", None, "sst2"), (None, "cola", "cola")])
def test_heads_whose_labels_nobody_named_are_merged_aloud(tasks, tmp_path):
    base, models = classifiers(tmp_path, *tasks)
    file = tmp_path / "m1" / "config.json"  # as older versions write what nobody said
    file.write_text(json.dumps(json.loads(file.read_text()) | {"label2id": {"LABEL_0": 0, "LABEL_1": 1}}))
    pool = Pool.open(base, models)
    (line,) = pool.warnings
    more = " and 1 more" if tasks[0] is None else ""
    expected = (
        f"m1{more}: heads whose labels have no names are merged with that of {tmp_path / 'm0'} as if they answered"
    )
    assert expected in line and not pool.fixed


def test_heads_of_one_task_need_no_names(tmp_path):
    pool = Pool.open(*classifiers(tmp_path, "sst2", "sst2"))
    assert not pool.warnings and not pool.fixed


def test_a_base_without_a_tokenizer_where_another_model_has_one(workshop):
    workshop.model("base", vocab_size=320)
    for number in (1, 2):
        workshop.expert("base", f"e{number}", seed=number)
        make_tokenizer().save_pretrained(workshop.root / f"e{number}")
    base, one, two = (str(workshop.root / name) for name in ("base", "e1", "e2"))
    (line,) = Pool.open(base, [one, two]).warnings
    assert line.startswith(f"{base}: no tokenizer files, so the output has none")
    assert f"`tokenizer_source: {one}`" in line
    recipe = workshop.recipe(["e1", "e2"], "base", tokenizer_source=one)
    assert not any("so the output" in said for said in Pool.open(base, [one, two], tokenizer=recipe.tokenizer).warnings)
    assert not Pool.open(one, [base, two]).warnings


def test_strict_makes_warnings_errors_on_the_command_line(workshop):
    workshop.model("base")
    workshop.expert("base", "one")
    workshop.edited("one", "other", config=lambda c: c.update(hidden_act="gelu"))
    file = workshop.root / "recipe.yaml"
    file.write_text(workshop.recipe(["other"], "base").to_yaml())
    strict = client("merge", file, workshop.root / "out", "--strict")
    assert (
        strict.returncode == 2
        and "hidden_act is 'gelu', 'silu' in the base" in strict.stderr
        and "(--strict)" in strict.stderr
    )
    assert strict.stderr.count("\n") == 1 and not (workshop.root / "out").exists()
    lenient = client("merge", file, workshop.root / "out")
    assert (
        lenient.returncode == 0 and "warning: " in lenient.stderr and (workshop.root / "out" / "config.json").exists()
    )


# -- quantized checkpoints


W = "model.layers.0.mlp.down_proj.weight"


def bitsandbytes(t):
    count = t[W].numel()
    t[W] = torch.randint(0, 255, (count // 2, 1), dtype=torch.uint8)
    t |= {f"{W}.absmax": torch.ones(count // 64), f"{W}.quant_map": torch.ones(16)}
    t[f"{W}.quant_state.bitsandbytes__nf4"] = torch.zeros(8, dtype=torch.uint8)


def gptq(t):
    stem, shape = W.removesuffix("weight"), t.pop(W).shape
    t |= {
        f"{stem}qweight": torch.zeros(shape[1] // 8, shape[0], dtype=torch.int32),
        f"{stem}qzeros": torch.zeros(1, 4, dtype=torch.int32),
    }
    t |= {
        f"{stem}scales": torch.ones(1, shape[0], dtype=torch.float16),
        f"{stem}g_idx": torch.zeros(shape[1], dtype=torch.int32),
    }


def fp8(t):
    t[W] = t[W].to(torch.float8_e4m3fn)
    t[f"{W}_scale_inv"] = torch.ones(1, 1)


def scaled_int8(t):
    t[W] = (t[W] * 100).to(torch.int8)


QUANTIZED = {
    "bitsandbytes": (bitsandbytes, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "method 'bitsandbytes'"),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4}, "method 'gptq'"),
    "fp8": (fp8, {"quant_method": "fp8"}, "method 'fp8'"),
    "bitsandbytes without its config": (bitsandbytes, None, f"tensor '{W}"),
    "gptq without its config": (gptq, None, "qweight|qzeros|g_idx"),
    "fp8 without its config": (fp8, None, f"tensor '{W}"),
    "int8": (scaled_int8, None, f"tensor '{W}' of int8"),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_checkpoints_are_refused_as_such_on_either_side(workshop, case):
    change, settings, message = QUANTIZED[case]
    workshop.model("base")
    workshop.expert("base", "one")
    config = lambda c: c.update(quantization_config=settings) if settings else None
    workshop.edited("one", "codes", change, config)
    workshop.edited("base", "codes_base", change, config)
    for models, base in ((["codes"], "base"), (["one"], "codes_base"), (["codes"], "codes_base")):
        with pytest.raises(
            CheckpointError, match=rf"quantized \(.*({message}).*expected weights in float32.*dequantize"
        ):
            workshop.merge(models, base)
    assert not (workshop.root / "out").exists()


def test_integer_masks_and_positions_are_no_codes(workshop):
    workshop.model("base", "gpt2", n_layer=2, n_embd=32, n_head=4, n_positions=64, tie_word_embeddings=True)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril() for i in range(2)}
    workshop.edited("base", "one", lambda t: t.update(masks))
    result, _ = workshop.merge(["one"], "base")
    assert all("buffer" in reason for reason in result["left_out"].values()) and len(result["left_out"]) == 2


def test_evaluate_refuses_a_quantized_model_too(workshop, tmp_path):
    workshop.model("base")
    workshop.edited(
        "base", "codes", bitsandbytes, lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"})
    )
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"kind": "choice", "prompt": "a", "choices": ["b", "c"], "answer": 0}) + "\n")
    done = client("evaluate", workshop.root / "codes", items)
    assert done.returncode == 2 and "quantized" in done.stderr and done.stderr.count("\n") == 1


# -- the recipe around them


def test_what_a_recipe_says_in_vain_is_said_and_what_is_misplaced_refused(workshop):
    workshop.model("base")
    workshop.expert("base", "one")
    recipe = yaml.safe_load(workshop.recipe(["one"], "base").to_yaml())
    from merge3.recipe import Recipe

    with pytest.warns(Merge3Warning, match="anchors: ignored"):
        Recipe.parse(recipe | {"anchors": {"w": 0.5}})
