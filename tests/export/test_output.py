"""What stands in the output beside merged weights, and what is refused for its values."""

import ast
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from merge3.checkpoint.beside import HUB_FILES, TOKENIZER_FILES, Words
from merge3.errors import BadInput, Merge3Warning, RecipeError
from merge3.export import check_recipe, merge_to_disk
from merge3.pool import Pool
from merge3.recipe import Recipe

EMBED = "model.embed_tokens.weight"


def test_a_merge_that_overflows_its_dtype_names_tensor_and_count(workshop):
    workshop.model("base")
    workshop.expert("base", "one")
    name = "model.layers.1.mlp.up_proj.weight"

    def large(t):
        t[name][0, :3] = 4e4

    workshop.edited("one", "large", large)
    with pytest.raises(BadInput, match=rf"'{name}': 3 of 1,536 merged values are infinite or NaN in float16.*bfloat16"):
        workshop.merge(["large"], "base", weight=2.0, out_dtype="float16")
    assert not (workshop.root / "out").exists() and not list(workshop.root.glob(".out*"))
    _, found = workshop.merge(["large"], "base", weight=2.0, out_dtype="bfloat16")
    assert torch.isfinite(found[name]).all()


def test_a_kept_tensor_that_overflows_is_found_too(workshop):
    workshop.model("base")
    workshop.expert("base", "big", rows=66)
    workshop.edited("base", "large", lambda t: t[EMBED].__setitem__((0, 0), 1e6))
    with pytest.raises(BadInput, match=rf"'{EMBED}': 1 of 2,048 .* float16"):
        workshop.merge(["big"], "large", dtype="float16")


def test_code_and_side_files_travel_with_the_output(workshop):
    workshop.model("plain")
    workshop.expert("plain", "one")
    named = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    base = workshop.edited("plain", "base", config=lambda c: c.update(auto_map=named))
    files = {
        "modeling_own.py": "from .configuration_own import OwnConfig\nfrom .layers_own import Layer\n",
        "configuration_own.py": "x = 1\n",
        "layers_own.py": "y = 1\n",
        "unrelated.py": "z = 1\n",
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": '{"temperature": 0.6, "eos_token_id": [2, 5]}',
        "preprocessor_config.json": "{}",
        "processor_config.json": "{}",
        "special_tokens_map.json": "{}",
        "added_tokens.json": "{}",
        "vocab.json": "{}",
        "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", null]}}',
        "tokenization_own.py": "w = 1\n",
    }
    for name, text in files.items():
        (base / name).write_text(text)
    workshop.merge(["one"], "base")
    written = {p.name: p for p in (workshop.root / "out").iterdir()}
    assert set(files) - set(written) == {"unrelated.py"}
    assert all(written[n].read_text() == text for n, text in files.items() if n in written)


# Of Devstral, Marian, BERTweet, GPT-NeoX-Japanese, Whisper, Qwen and Kimi; and templates beside the first.
SPOKEN = (
    *("tekken.json", "source.spm", "target.spm", "bpe.codes", "emoji.json", "normalizer.json", "qwen.tiktoken"),
    *("tiktoken.model", "additional_chat_templates/rag.jinja", "chat_template.jinja"),
)


@pytest.mark.parametrize("words", [{}, {"chat_template": "{{ messages }}"}], ids=["own", "another template"])
def test_whatever_a_tokenizer_has_travels_with_the_output(workshop, words):
    base = workshop.model("base")
    workshop.expert("base", "one")
    for name in SPOKEN:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(f"of {name}")
    workshop.merge(["one"], "base", **words)
    texts = {name: (workshop.root / "out" / name).read_text() for name in SPOKEN}
    replaced = {"chat_template.jinja": "{{ messages }}"} if words else {}
    assert texts == {name: f"of {name}" for name in SPOKEN} | replaced
    asked_with = Words(base)
    assert all((asked_with.folder("{{ messages }}") / name).is_file() for name in SPOKEN)


def test_every_file_that_transformers_names_as_a_vocabulary_is_a_tokenizers():
    """`vocab_files_names` of all its tokenizers, read from their source: importing them takes longer."""
    import transformers

    names = set()
    for file in Path(transformers.__file__).parent.glob("**/token*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            target = getattr(node, "targets", [None])[0]
            if getattr(target, "id", "").lower() == "vocab_files_names" and isinstance(node.value, ast.Dict):
                names |= {value.value for value in node.value.values if isinstance(value, ast.Constant)}
    assert {"vocab.json", "source.spm", "bpe.codes", "normalizer.json"} <= names
    for patterns in (TOKENIZER_FILES, HUB_FILES):
        assert [name for name in sorted(names) if not any(fnmatch(name, pattern) for pattern in patterns)] == []


def test_padded_embeddings_keep_their_rows_unless_a_tokenizer_is_asked_for(workshop):
    from merge3.world.tokenizer import make_tokenizer

    workshop.model("base", vocab_size=320)
    workshop.expert("base", "one")
    for name in ("base", "one"):
        make_tokenizer().save_pretrained(workshop.root / name)
    tokens = len(make_tokenizer())
    spelled = [
        ({}, 320),
        ({"tokenizer_source": "base"}, tokens),
        ({"tokenizer": {"source": "base"}}, tokens),
        ({"tokenizer": {"source": str(workshop.root / "one")}}, tokens),
        ({"tokenizer": {"source": "base", "pad_to_multiple_of": 320}}, 320),
    ]
    merged = []
    for number, (changes, rows) in enumerate(spelled):
        _, found = workshop.merge(["one"], "base", out=f"out{number}", **changes)
        assert found[EMBED].shape == (rows, 32) and workshop.config(f"out{number}")["vocab_size"] == rows
        merged.append(found)
    for found in merged[1:]:
        assert torch.equal(found[EMBED][:tokens], merged[0][EMBED][:tokens])
        assert all(torch.equal(found[name], merged[0][name]) for name in found if "layers" in name)


def test_chat_templates_by_name_and_by_text(workshop):
    from transformers import AutoTokenizer

    from merge3.world.tokenizer import make_tokenizer

    workshop.model("base", vocab_size=320)
    workshop.expert("base", "one")
    for name, length in (("base", 32), ("one", 17)):
        tokenizer = make_tokenizer()
        tokenizer.chat_template, tokenizer.model_max_length = f"{name}: {{{{ messages[0]['content'] }}}}", length
        tokenizer.save_pretrained(workshop.root / name)
    messages = [{"role": "user", "content": "hi"}]
    one = str(workshop.root / "one")
    cases = [
        ("own", {}, 32, "base: hi"),
        ("expert", {"tokenizer_source": one}, 17, "one: hi"),
        ("chatml", {"chat_template": "chatml"}, 32, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        ("text", {"chat_template": "<s> {{ messages[-1]['content'] }}"}, 32, "<s> hi"),
        ("both", {"chat_template": "<s> {{ messages[-1]['content'] }}", "tokenizer_source": one}, 17, "<s> hi"),
    ]
    for name, changes, length, expected in cases:
        workshop.merge(["one"], "base", out=name, **changes)
        tokenizer = AutoTokenizer.from_pretrained(workshop.root / name)
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
        assert tokenizer.model_max_length == length
    for bad, message in (
        ("chatlm", "expected auto, chatml, or a Jinja template"),
        ("{% if %}", "not a Jinja template"),
    ):
        with pytest.raises(RecipeError, match=f"chat_template: .*{message}"):
            workshop.merge(["one"], "base", out="bad", chat_template=bad)


def test_a_dry_run_refuses_what_the_export_would(workshop):
    workshop.model("base")
    workshop.expert("base", "one")
    pool = Pool.open(str(workshop.root / "base"), [str(workshop.root / "one")])
    check_recipe(workshop.recipe(["one"], "base"), pool)
    with pytest.raises(RecipeError, match="expected rows as they are stored, as this pool was opened"):
        check_recipe(workshop.recipe(["one"], "base", tokenizer_source="union"), pool)
    assert not (workshop.root / "out").exists()


def test_a_recipe_beside_its_models_merges_from_anywhere(workshop, monkeypatch, tmp_path_factory):
    workshop.model("base")
    workshop.expert("base", "one")
    (workshop.root / "recipe.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: {model: base}\n"
        "models:\n  - model: one\n    parameters: {weight: 0.5}\n"
    )
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    merge_to_disk(Recipe.from_yaml(workshop.root / "recipe.yaml"), workshop.root / "out")
    _, expected = workshop.merge(["one"], "base", out="direct")
    found = workshop.tensors("out")
    assert all(torch.equal(found[n], t) for n, t in expected.items())


def test_a_damaged_write_never_gets_its_final_name(workshop, monkeypatch):
    """The headers of what was written are read again before the folder is renamed."""
    from merge3.checkpoint.write import CheckpointWriter

    workshop.model("base")
    workshop.expert("base", "one")
    finish = CheckpointWriter.finish

    def torn(self):
        finish(self)
        file = self.temporary / "model.safetensors"
        if file.exists() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:-10])

    monkeypatch.setattr(CheckpointWriter, "finish", torn)
    with pytest.raises(BadInput, match="truncated"):
        workshop.merge(["one"], "base")
    assert not (workshop.root / "out").exists() and not list(workshop.root.glob(".out*"))


RECIPES = {
    "top-level normalize": (
        dict(normalize=True),
        r"normalize: stands at the top level; expected `normalize` under `parameters`",
    ),
    "dtype among parameters": (
        dict(parameters={"dtype": "bfloat16"}),
        r"parameters\.dtype: stands under `parameters`; expected .* top level",
    ),
    "misspelt parameter": (
        dict(parameters={"lamda": 0.5}),
        "lamda: task_arithmetic has no such parameter.*did you mean 'lambda'",
    ),
    "misspelt key": (dict(dtpye="float32"), "unknown key 'dtpye'.*did you mean 'dtype'"),
    "mergekit-moe": (dict(experts=[], gate_mode="hidden"), "a mergekit-moe configuration; expected a merge recipe"),
    "bad dtype": (
        dict(dtype="bfloat"),
        "dtype: found 'bfloat'; expected float32, float16, bfloat16 .did you mean 'bfloat16'",
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_misplaced_and_misspelt_keys_say_where_they_belong(workshop, case):
    change, message = RECIPES[case]
    workshop.model("base")
    workshop.expert("base", "one")
    with pytest.raises(RecipeError, match=message):
        workshop.merge(["one"], "base", **change)


def test_settings_beside_a_model_belong_under_its_parameters(workshop):
    with pytest.raises(RecipeError, match=r"models\[0\]: unknown key 'density'.*`density` belongs under `parameters`"):
        Recipe.parse({"merge_method": "ties", "base_model": "b", "models": [{"model": "m", "density": 0.5}]})


def test_recipes_that_mergekit_merges_merge_here(workshop):
    workshop.model("base")
    workshop.expert("base", "one")
    with pytest.warns(Merge3Warning, match=r"parameters\.random_seed: ignored, task_arithmetic has no such parameter"):
        recipe = workshop.recipe(
            ["one"], "base", parameters={"random_seed": 145}, dtype="torch.float16", anchors={"a": 1}
        )
        merge_to_disk(recipe, workshop.root / "ignored")
    assert workshop.tensors("ignored")[EMBED].dtype == torch.float16
    # nothing is kept where a density is 0: there the base stays
    _, found = workshop.merge(["one"], "base", method="ties", parameters={"density": [0.0, 1.0]})
    base = workshop.tensors("base")
    first, last = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 2))
    assert torch.equal(found[first], base[first]) and not torch.equal(found[last], base[last])
    for method in ("dare_ties", "breadcrumbs"):
        _, found = workshop.merge(["one"], "base", method=method, out=method, parameters={"density": 0})
        assert all(torch.equal(found[n], t) for n, t in base.items())


def test_several_documents_and_fences_are_named(tmp_path):
    files = {
        "a: 1\n---\nb: 2\n": "several documents",
        "```yaml\na: 1\n```\n": "begin with ```",
        "a:\n\tb: 1\n": "spaces, not tabs",
    }
    for text, message in files.items():
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(RecipeError, match=message):
            Recipe.from_yaml(tmp_path / "r.yaml")


def test_moved_checkpoints_of_shards_are_whole(workshop):
    """A tensor that the index forgot is loaded all the same, as transformers does."""
    from transformers import AutoModelForCausalLM

    workshop.model("base")
    workshop.expert("base", "one")
    AutoModelForCausalLM.from_pretrained(workshop.root / "one").save_pretrained(
        workshop.root / "sharded", max_shard_size="20KB"
    )
    index = workshop.root / "sharded" / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(data))
    shutil.copy(
        workshop.root / "base" / "model.safetensors", workshop.root / "sharded" / "model.safetensors"
    )  # a stray one
    _, expected = workshop.merge(["one"], "base", out="a")
    _, found = workshop.merge(["sharded"], "base", out="b")
    assert all(torch.equal(found[n], t) for n, t in expected.items())


def test_what_an_architecture_needs_is_remembered_and_asked_anew_when_anything_differs(workshop, tmp_path, monkeypatch):
    from merge3.checkpoint import architecture
    from merge3.checkpoint.read import open_checkpoint

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = []
    ask = architecture._loading
    monkeypatch.setattr(architecture, "_loading", lambda *a: asked.append(1) or ask(*a))
    workshop.model("base")
    checkpoint = open_checkpoint(workshop.root / "base")
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    first = architecture.loading(checkpoint.config, shapes)
    assert architecture.loading(checkpoint.config, shapes) == first and len(asked) == 1
    fewer = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    assert architecture.loading(checkpoint.config, fewer).missing == ("lm_head.weight",)
    wide = architecture.loading(checkpoint.config | {"intermediate_size": 64}, shapes)
    assert (
        wide.mismatched
        and architecture.loading(checkpoint.config | {"intermediate_size": 64}, shapes) == wide
        and len(asked) == 3
    )
    next((tmp_path / "cache").rglob("*.json")).write_text("{")  # damaged: asked again
    architecture.loading(checkpoint.config, shapes), architecture.loading(checkpoint.config, fewer)
