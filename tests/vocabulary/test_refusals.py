"""What is wrong with a tokenizer is one line, before any weight is merged; what is only unusual is said."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge3.errors import BadInput, CheckpointError, Merge3Warning, RecipeError
from merge3.export import check_recipe, merge_to_disk
from merge3.pool import Pool
from merge3.recipe import Recipe, Tokenizer
from tests.commands import client
from tests.speakers import WORDS, tokenizer_of

ROW = lambda **source: {"tokens": {"w1": {"source": source}}}
RECIPES = {
    "both": (dict(tokenizer_source="base", tokenizer={}), "both `tokenizer_source` and `tokenizer`"),
    "a source not in the recipe": (dict(tokenizer_source="other"), "found 'other'; expected union, base, or one of"),
    "a mapping": (dict(tokenizer="union"), "tokenizer: found str; expected a mapping"),
    "an unknown key": (dict(tokenizer={"sorce": "base"}), "unknown key 'sorce'.*did you mean 'source'"),
    "a token's model not in the recipe": (
        dict(tokenizer={"tokens": {"w1": {"source": "other"}}}),
        r"tokens\.w1: model 'other' is not in the recipe; expected one of",
    ),
    "no source": (dict(tokenizer={"tokens": {"w1": {"force": True}}}), r"w1\.source: missing; expected a model, {kind"),
    "an unknown kind": (dict(tokenizer=ROW(kind="one")), r"source\.kind: found 'one'; expected zero or model_token"),
    "neither": (dict(tokenizer=ROW(kind="model_token", model="ONE")), "neither `token` nor `token_id`"),
    "token and number": (
        dict(tokenizer=ROW(kind="model_token", model="ONE", token="a", token_id=1)),
        "both `token` and `token_id`",
    ),
    "no number": (dict(tokenizer=ROW(kind="model_token", model="ONE", token_id=-1)), "token_id: found -1"),
    "force": (dict(tokenizer={"tokens": {"w1": {"source": "ONE", "force": "y"}}}), "force: found 'y'; expected true"),
    "a number for a token": (dict(tokenizer={"tokens": {1: {"source": "ONE"}}}), "found 1; expected a token's text"),
    "multiple of 0": (dict(tokenizer={"pad_to_multiple_of": 0}), "found 0; expected a positive whole number"),
    "multiple of -8": (dict(tokenizer={"pad_to_multiple_of": -8}), "found -8; expected a positive whole number"),
    "multiple of true": (dict(tokenizer={"pad_to_multiple_of": True}), "found True; expected a positive"),
    # what only the tokenizers show
    "a token that its model lacks": (
        dict(tokenizer={"tokens": {"y0": {"source": "ONE"}}}),
        r"tokens\.y0\.source: the tokenizer of .*one has no 'y0'; expected one of its tokens \(.*two has it",
    ),
    "a token that no model has": (
        dict(tokenizer={"tokens": {"zz": {"source": "ONE"}}}),
        r"tokens\.zz\.source: the tokenizer of .*one has no 'zz'.*no model has it",
    ),
    "another token that no model has": (
        dict(tokenizer=ROW(kind="model_token", model="ONE", token="zz")),
        r"tokens\.w1\.source: the tokenizer of .*one has no 'zz'",
    ),
    "a number beyond the rows": (
        dict(tokenizer=ROW(kind="model_token", model="ONE", token_id=48)),
        r"w1\.source\.token_id: found 48; expected below 48, the rows of .*one",
    ),
}


def named(value, root):
    """ONE, in the models' places."""
    return json.loads(json.dumps(value).replace("ONE", str(root / "one")))


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(speakers, recipe_of, tmp_path, case):
    change, message = RECIPES[case]
    if case != "a number for a token":  # JSON has none
        change = named(change, speakers)
    with pytest.raises(RecipeError, match=message) as error:
        merge_to_disk(recipe_of(speakers, **change), tmp_path / "out", where="recipe.yaml")
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def beyond(root):
    """A token without a row."""
    tokenizer_of([*WORDS, "a", "b", "<pad>", "<s>", "</s>", "c", "d", "e", "f"]).save_pretrained(root / "one")


def without(root):
    for file in (root / "one").glob("tokenizer*"):
        file.unlink()


def broken(root):
    (root / "one" / "tokenizer.json").write_text('{"model": {}}')


def of_bytes(root):
    """Another notation: a byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(root / "one")


def far_end(root):
    """Whose end of text is beyond all tokens."""
    file = root / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 4000}))


FOLDERS = {
    "more tokens than rows": (beyond, "union", "its tokenizer gives 'f' the number 48, tensor .*embed.* has 48 rows"),
    "no tokenizer for union": (without, "union", r"one: no tokenizer files; expected a tokenizer"),
    "no tokenizer and other rows": (without, "base", r"one: no tokenizer files; expected a tokenizer"),
    "no tokenizer of the source": (without, "ONE", r"one: no tokenizer files; expected a tokenizer"),
    "unreadable": (broken, "union", "one: its tokenizer cannot be read"),
    "another notation": (of_bytes, "union", "its tokenizer is byte-level BPE, that of .*base WordLevel"),
    "another notation below the base's": (
        of_bytes,
        "base",
        "its tokenizer is byte-level BPE, that of .*base WordLevel",
    ),
    "an end beyond all tokens": (far_end, "union", "eos_token_id is 4000; expected a token"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(own_speakers, recipe_of, tmp_path, case):
    spoil, source, message = FOLDERS[case]
    spoil(own_speakers)
    recipe = recipe_of(own_speakers, tokenizer_source=named(source, own_speakers))
    with pytest.raises(CheckpointError, match=message) as error:
        merge_to_disk(recipe, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_search_is_refused_before_its_first_candidate(own_speakers, tmp_path):
    items = own_speakers / "items.jsonl"
    items.write_text(json.dumps({"kind": "choice", "prompt": "w1", "choices": ["w2", "w3"], "answer": 0}) + "\n")
    for genome, message in (
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of: found 0"),
        ({"tokenizer_source": "./three"}, "tokenizer_source: found .*three"),
        ({"tokenizer_source": "base", "tokenizer": {}}, "both `tokenizer_source` and `tokenizer`"),
        ({"tokenizer": {"tokens": {"zz": {"source": "./one"}}}}, "has no 'zz'"),
        ({"chat_template": "chatlm"}, "expected auto, chatml, or a Jinja template"),
    ):
        data = {"genome": {"models": ["./one", "./two"], "base_model": "./base", "merge_method": "linear"} | genome}
        file = own_speakers / "evolve.yaml"
        file.write_text(json.dumps(data | {"tasks": [{"items": "./items.jsonl"}], "heldout": {"fraction": 0}}))
        done = client("evolve", file, "--run-dir", tmp_path / "run")
        said = [line for line in done.stderr.splitlines() if re.search(message, line)]
        assert done.returncode == 2 and len(said) == 1, done.stderr
        assert not (tmp_path / "run" / "best.yaml").exists()


def test_a_pool_with_another_tokenizer(speakers, recipe_of):
    models = [str(speakers / name) for name in ("base", "one", "two")]
    union = Pool.open(models[0], models[1:], tokenizer=Tokenizer("union"))
    check_recipe(recipe_of(speakers, tokenizer_source="union"), union)
    stored = Pool.open(models[0], models[1:])
    asked = {"none": {}, "base": {"tokenizer_source": "base"}, "padded": {"tokenizer": {"pad_to_multiple_of": 8}}}
    for name, change in asked.items():
        with pytest.raises(RecipeError, match="expected tokenizer_source union, as this pool was opened"):
            check_recipe(recipe_of(speakers, **change), union)
        if name != "none":
            with pytest.raises(RecipeError, match="expected rows as they are stored, as this pool was opened"):
                check_recipe(recipe_of(speakers, **change), stored)
    based = Pool.open(models[0], models[1:], tokenizer=Tokenizer("base"))
    check_recipe(recipe_of(speakers, tokenizer_source=models[0]), based)  # the same by its name


def test_an_export_has_the_tokens_of_its_own_models(speakers, recipe_of, tmp_path):
    """What is only measured, such as a merge of the experts alone, may be merged over more tokens."""
    pool = Pool.open(
        str(speakers / "base"), [str(speakers / "one"), str(speakers / "two")], tokenizer=Tokenizer("union")
    )
    with pytest.raises(RecipeError, match="of whose tokens this pool's vocabulary is made"):
        merge_to_disk(recipe_of(speakers, ["one"], tokenizer_source="union"), tmp_path / "out", pool)
    baseless = recipe_of(speakers, ("base", "one", "two"), "linear", None, tokenizer_source="union")
    with pytest.raises(
        RecipeError, match="base_model: None; expected one, as this pool has"
    ):  # some rows would be means
        merge_to_disk(baseless, tmp_path / "out", pool)
    assert not (tmp_path / "out").exists()
    check_recipe(baseless, pool)


def test_a_model_without_a_tokenizer_has_the_bases_if_its_rows_are_as_many(own_speakers, recipe_of, tmp_path):
    shutil.copytree(own_speakers / "base", own_speakers / "silent")
    for file in (own_speakers / "silent").glob("tokenizer*"):
        file.unlink()
    with pytest.warns(Merge3Warning, match="silent: no tokenizer files; its rows are taken to be numbered as those of"):
        merge_to_disk(recipe_of(own_speakers, ["silent"], tokenizer_source="base"), tmp_path / "out")


def test_rows_that_stay_the_bases_are_said(own_speakers, recipe_of, tmp_path):
    for name in ("one", "two"):
        shutil.copy(own_speakers / "base" / "tokenizer.json", own_speakers / name / "tokenizer.json")
    with pytest.warns(
        Merge3Warning, match="one: embeddings of 48 rows, 43 in the base .*: the base's stay as they are; "
    ):
        result = merge_to_disk(recipe_of(own_speakers, ["one"]), tmp_path / "out")
    assert "model.embed_tokens.weight" in result["kept"]
    with pytest.raises(BadInput, match=r"shape \[48, 16\]"):
        merge_to_disk(recipe_of(own_speakers, ["base", "one"], "linear", None), tmp_path / "other")


def test_a_recipe_says_it_again(speakers, recipe_of):
    """Through YAML and back; and recipes that say nothing of it are what they were."""
    one = str(speakers / "one")
    block = {
        "source": one,
        "tokens": {
            "w1": {"source": {"kind": "zero"}},
            "x": {"source": one, "force": True},
            "y": {"source": {"kind": "model_token", "model": one, "token": "w2"}},
            "z": {"source": {"kind": "model_token", "model": {"model": {"path": one}}, "token_id": 0}},
        },
        "pad_to_multiple_of": 8,
    }
    recipe = recipe_of(speakers, tokenizer=block)
    again = Recipe.parse(recipe.to_dict())
    assert again == recipe and again.hash() == recipe.hash() and recipe.tokenizer.tokens[3].model == one
    for said in ({"tokenizer_source": "base"}, {"tokenizer": {"source": "base"}}):
        assert recipe_of(speakers, **said).to_dict()["tokenizer_source"] == "base"
    plain = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}
    hashes = [Recipe.parse(plain | more).hash() for more in ({}, {"tokenizer": {"source": "base"}})]
    assert hashes == ["92e3ae3623e0ea16", "0f2c28810064f3cd"]  # of journals begun before


def test_a_token_that_only_the_bases_configuration_names(own_speakers):
    """An image's, say: under another model's numbering it would be another one."""
    file = own_speakers / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_token_index": 5}))
    base, one = str(own_speakers / "base"), str(own_speakers / "one")
    with pytest.raises(CheckpointError, match="config.json says nothing of image_token_index, 5 in a model"):
        Pool.open(base, [one], tokenizer=Tokenizer(one))
    Pool.open(base, [one], tokenizer=Tokenizer("base"))


def test_a_table_of_tokens_by_an_unknown_name(own_speakers):
    """Merged by the old numbers, its rows would be those of other tokens."""
    for name in ("base", "one"):
        file = own_speakers / name / "model.safetensors"
        tensors = load_file(file)
        rows = len(tensors["model.embed_tokens.weight"])
        save_file(tensors | {"words_per_layer.weight": torch.zeros(rows, 3)}, file)
    base, one = str(own_speakers / "base"), str(own_speakers / "one")
    with pytest.raises(CheckpointError, match="one: tensor 'words_per_layer.weight' of .* rows: one for each token"):
        Pool.open(base, [one], tokenizer=Tokenizer("base"))
