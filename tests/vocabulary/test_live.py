"""The live model has the rows, the tokenizer, the template and the end of text that the exported one will have."""

import gc
import json
import shutil

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge3.checkpoint.layout import Ref
from merge3.engine import LocalEngine
from merge3.export import check_recipe, merge_to_disk
from merge3.live.slot import Slot
from merge3.packaging import chat_template
from merge3.pool import Pool
from merge3.recipe import Recipe, Tokenizer
from merge3.registration import Registration
from merge3.tasks import Item
from merge3.tasks.decoder import end_tokens
from merge3.tasks.prompts import Reader
from tests.asking import answers
from tests.commands import client
from tests.speakers import ROWS, VOCABULARIES, renumber, tokenizer_of

SPECIALS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>"}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CASES = {
    "union": ("speakers", dict(tokenizer_source="union")),
    "base": ("bf16_speakers", dict(tokenizer_source="base")),
    "expert": ("speakers", dict(tokenizer_source="ONE")),
    "tied": ("tied_speakers", dict(tokenizer={"pad_to_multiple_of": 16})),
    "bf16": ("bf16_speakers", dict(tokenizer={"tokens": {"x1": {"source": {"kind": "zero"}}}})),
}


def opened(recipe, **options):
    models = [str(model) for model in recipe.models()]
    return Pool.open(models[0], models[1:], tokenizer=recipe.tokenizer, **options)


@pytest.fixture(params=CASES)
def case(request, recipe_of):
    world, change = CASES[request.param]
    root = request.getfixturevalue(world)
    return root, recipe_of(root, **json.loads(json.dumps(change).replace("ONE", str(root / "one"))))


def test_the_live_model_is_the_exported_one(case, tmp_path):
    """Bytes, tokens, and what it writes; with a pool that searches, and with the one a merge opens by itself."""
    root, recipe = case
    pool = opened(recipe)
    engine = LocalEngine(pool)
    engine.slot.swap(recipe)
    engine.export(recipe, tmp_path / "searched")
    merge_to_disk(recipe, tmp_path / "alone")
    written = load_file(tmp_path / "searched" / "model.safetensors")
    for name, tensor in written.items():
        assert torch.equal(engine.slot._weights[name], tensor), name
        assert tensor.shape[0] == pool.vocabulary.rows or name not in (EMBED, HEAD)
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "searched" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "searched", dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "searched")
    asked = AutoTokenizer.from_pretrained(pool.words.folder())
    assert tokenizer.get_vocab() == asked.get_vocab() and len(tokenizer) <= model.config.vocab_size
    assert end_tokens(model, tokenizer) == end_tokens(engine.slot.model, asked) == {tokenizer.eos_token_id}
    ids = tokenizer("w6 w8 w10", return_tensors="pt")
    assert torch.equal(ids["input_ids"], asked("w6 w8 w10", return_tensors="pt")["input_ids"])
    said = [m.generate(**ids, max_new_tokens=8, do_sample=False) for m in (model, engine.slot.model)]
    assert torch.equal(*said)


def test_a_slot_begins_as_the_base(speakers, recipe_of):
    pool = opened(recipe_of(speakers, tokenizer_source="union"))
    slot = Slot(pool)
    base = load_file(speakers / "base" / "model.safetensors")
    assert torch.equal(slot._weights[EMBED][:43], base[EMBED]) and torch.equal(slot._weights[HEAD][:43], base[HEAD])
    one, new = load_file(speakers / "one" / "model.safetensors")[EMBED], pool.vocabulary.tokens["x0"]
    number = AutoTokenizer.from_pretrained(speakers / "one").get_vocab()["x0"]
    assert torch.equal(slot._weights[EMBED][new], one[number])  # the base has none: the only owner's


def test_an_expert_answers_over_the_vocabulary_as_it_does_by_itself(speakers, recipe_of):
    """All of its own words stand where the tokenizer in common says, and no other word is likelier than before."""
    pool = opened(recipe_of(speakers, tokenizer_source="union"))
    slot = Slot(pool)
    slot.load(str(speakers / "one"))
    alone = AutoModelForCausalLM.from_pretrained(speakers / "one").eval()
    own, common = (AutoTokenizer.from_pretrained(folder) for folder in (speakers / "one", pool.words.folder()))
    ids = [tokenizer("w30 x1 <|im_end|> w7", return_tensors="pt")["input_ids"] for tokenizer in (own, common)]
    assert not torch.equal(*ids)
    with torch.no_grad():
        expected, found = alone(ids[0]).logits, slot.model(ids[1]).logits
    words = [word for word in own.get_vocab()]
    there = lambda tokenizer: torch.tensor(tokenizer.convert_tokens_to_ids(words))
    torch.testing.assert_close(found[..., there(common)], expected[..., there(own)], rtol=0, atol=1e-6)


def test_other_numbers_make_no_other_merge(own_speakers, recipe_of, tmp_path):
    """An expert with the base's tokens under other numbers, its rows moved along, is merged as before."""
    shutil.copytree(own_speakers / "base", own_speakers / "near")
    tensors = load_file(own_speakers / "near" / "model.safetensors")
    torch.manual_seed(0)
    tensors = {name: t + torch.randn(t.shape) * 0.01 for name, t in tensors.items()}
    save_file(tensors, own_speakers / "near" / "model.safetensors", metadata={"format": "pt"})
    recipe = recipe_of(own_speakers, ["near"], tokenizer_source="base")
    merge_to_disk(recipe_of(own_speakers, ["near"]), tmp_path / "before")
    renumber(own_speakers / "near", torch.randperm(43).tolist())
    pool = Pool.open(str(own_speakers / "base"), [str(own_speakers / "near")])
    assert any("numbers tokens otherwise" in line for line in pool.warnings)
    assert not opened(recipe).warnings
    for name, asked in (("base", recipe), ("union", recipe_of(own_speakers, ["near"], tokenizer_source="union"))):
        merge_to_disk(asked, tmp_path / name)
        files = [tmp_path / folder / "model.safetensors" for folder in ("before", name)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_budget_streams_remapped_rows_too(speakers, recipe_of):
    recipe = recipe_of(speakers, method="ties", tokenizer={"pad_to_multiple_of": 65536})
    whole = opened(recipe)
    counted = 65536 * 16 * 4
    assert whole.memory.resident > 2 * 3 * counted and whole.memory.slot > 2 * counted
    tight = opened(recipe, memory_budget=whole.memory.total - counted)
    assert any(ref.tensor in (EMBED, HEAD) for ref in tight.memory.away)
    slots = [Slot(pool) for pool in (whole, tight)]
    for slot in slots:
        slot.swap(recipe)
    for name, tensor in slots[0]._weights.items():
        assert torch.equal(tensor, slots[1]._weights[name]), name


def test_contents_are_those_of_the_rows_and_go_with_the_pool(speakers, recipe_of):
    plain = Pool.open(str(speakers / "base"), [str(speakers / "one")])
    pools = [opened(recipe_of(speakers, ["one"], tokenizer_source=source)) for source in ("base", "union")]
    hashes = [pool.content_hashes() for pool in (plain, *pools)]
    assert all(hashes[a] != hashes[b] for a, b in ((0, 1), (0, 2), (1, 2)))
    assert hashes[0][plain.base] == hashes[1][plain.base]
    folders = [pool.vocabulary.folder.parent for pool in pools]
    assert all(folder.is_dir() and list(folder.glob("rows-*")) for folder in folders)
    del pools
    gc.collect()
    assert not any(folder.exists() for folder in folders)


def test_nothing_is_read_or_written_for_a_dry_run(speakers, recipe_of):
    recipe = recipe_of(speakers, tokenizer_source="union")
    pool = opened(recipe)
    check_recipe(recipe, pool)
    assert pool.shape(Ref(pool.base, EMBED)) == (54, 16)
    assert not list(pool.vocabulary.folder.parent.glob("rows-*"))


TEMPLATES = {"base": "base {{ messages[0]['content'] }}", "one": " w1 {{ messages[0]['content'] }}\n"}


def test_a_recipes_template_is_what_it_is_asked_with(own_speakers, recipe_of, tmp_path, monkeypatch):
    """By name, by text, and the one that most have; as the exported tokenizer has it."""
    for name, text in (TEMPLATES | {"two": TEMPLATES["one"]}).items():
        (own_speakers / name / "chat_template.jinja").write_text(text)
    chatml = "<|im_start|>user\nw3<|im_end|>\n<|im_start|>assistant\n"
    cases = {None: "base w3", "auto": "w1 w3", "chatml": chatml, "w9 {{ messages[0].content }}": "w9 w3"}
    seen, wrapped = [], Reader.wrapped
    monkeypatch.setattr(Reader, "wrapped", lambda self, prompt: seen.append(wrapped(self, prompt)) or seen[-1])
    items = [Item("q", "t", "choice", "w3", 0, ("w4", "w5"))]
    for at, (said, expected) in enumerate(cases.items()):
        changes = {} if said is None else {"chat_template": said}
        recipe = recipe_of(own_speakers, tokenizer_source="union", **changes)
        engine = LocalEngine(opened(recipe))
        answers(engine, recipe, items, chat=True)
        assert seen.pop() == expected
        engine.export(recipe, tmp_path / str(at))
        written = AutoTokenizer.from_pretrained(tmp_path / str(at))
        message = [{"role": "user", "content": "w3"}]
        assert written.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == expected


def test_recipes_with_other_templates_share_an_engine(own_speakers, recipe_of):
    (own_speakers / "base" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    engine = LocalEngine(Pool.open(str(own_speakers / "base"), [str(own_speakers / "one")]))
    asked = Registration((Item("q", "t", "generate", "w3 w5", ("w4",), max_tokens=3),), chat=True)
    recipes = [
        recipe_of(own_speakers, ["one"], **c) for c in ({}, {"chat_template": "w1 w2 {{ messages[0].content }}"})
    ]
    assert [chat_template(recipe, engine.pool) for recipe in recipes] == [None, recipes[1].chat_template]
    for recipe in recipes:
        list(engine.evaluate(asked, [recipe]))
    prompts = {scorer.asked[0].question.batches[0][0][0][1].tokens for scorer in engine._rounds._scorers.values()}
    assert len(engine._rounds._scorers) == 2 and len(prompts) == 2


def test_the_end_of_text_is_the_sources(own_speakers, recipe_of, tmp_path):
    """Generation settings, and config.json where there are none, name tokens by the output's numbers."""
    folder = own_speakers / "one"
    numbers = AutoTokenizer.from_pretrained(folder).get_vocab()
    for with_settings in (True, False):
        if with_settings:
            settings = json.loads((folder / "generation_config.json").read_text())
            settings["eos_token_id"] = [numbers["</s>"], numbers["<|im_end|>"]]
            (folder / "generation_config.json").write_text(json.dumps(settings))
        else:
            (folder / "generation_config.json").unlink()
        recipe = recipe_of(own_speakers, tokenizer_source=str(folder))
        engine = LocalEngine(opened(recipe))
        out = tmp_path / str(with_settings)
        engine.export(recipe, out)
        expected = {numbers["</s>"]} | ({numbers["<|im_end|>"]} if with_settings else set())
        model = AutoModelForCausalLM.from_pretrained(out)
        for found in (model, engine.slot.model):
            assert end_tokens(found, None) == expected
        config = json.loads((out / "config.json").read_text())
        assert [config[f"{key}_token_id"] for key in ("bos", "eos", "pad")] == [0, 1, 2]
        assert engine.slot.model.config.eos_token_id == 1


def test_numbers_that_are_not_used_are_rows_like_padding(own_speakers, recipe_of, tmp_path):
    """mergekit counts tokens, and with a gap in their numbers it writes beyond its tensor, or over tokens."""
    file = own_speakers / "base" / "tokenizer.json"
    data = json.loads(file.read_text())
    del data["model"]["vocab"]["w20"]
    file.write_text(json.dumps(data))
    recipe = recipe_of(own_speakers, ["two"], tokenizer_source="base", weight=0.0)
    merge_to_disk(recipe, tmp_path / "out")
    stored, found = (
        load_file(folder / "model.safetensors")[EMBED] for folder in (own_speakers / "base", tmp_path / "out")
    )
    gap = [number for number in range(43) if number != 23]
    assert torch.equal(found[gap], stored[gap])
    torch.testing.assert_close(found[23], stored[gap].mean(0))


def test_the_tokenizer_of_a_pool_is_a_value(speakers):
    recipe = yaml.safe_load(Recipe.parse({"merge_method": "linear", "models": [{"model": "a"}]}).to_yaml())
    assert Recipe.parse(recipe | {"tokenizer": {}}).tokenizer == Tokenizer("union", base=False)


SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)
STACKS = dict(d_model=16, encoder_layers=1, decoder_layers=1, decoder_start_token_id=0, max_position_embeddings=64)
HEADS = dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24)
FAMILIES = {  # -> (class, settings, how many tensors have a row, or a column, for every token)
    "gpt2": ("AutoModelForCausalLM", dict(n_layer=2, n_embd=16, n_head=2, n_positions=60), 1),
    "gpt_neox": ("AutoModelForCausalLM", SMALL | dict(intermediate_size=24, tie_word_embeddings=False), 2),
    "phi": ("AutoModelForCausalLM", SMALL | dict(intermediate_size=24, tie_word_embeddings=False), 3),  # a bias too
    "bert": ("AutoModelForMaskedLM", SMALL | dict(intermediate_size=24, max_position_embeddings=60), 2),
    "bart": ("AutoModelForSeq2SeqLM", STACKS | HEADS, 2),  # final_logits_bias: [1, tokens]
    "mamba": ("AutoModelForCausalLM", dict(hidden_size=12, num_hidden_layers=2, state_size=4), 1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, recipe_of, family):
    """Whatever their embeddings, heads and biases are called: written, loaded whole, and live, to the last bit."""
    loader, settings, count = FAMILIES[family]
    load = getattr(transformers, loader)
    for name, (words, added) in VOCABULARIES.items():
        tokenizer = tokenizer_of(words, added)
        numbers = {f"{key}_token_id": tokenizer.get_vocab()[text] for key, text in SPECIALS.items()}
        config = transformers.AutoConfig.for_model(family, vocab_size=ROWS[name], **settings, **numbers)
        torch.manual_seed(ROWS[name])
        load.from_config(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    recipe = recipe_of(tmp_path, tokenizer={"pad_to_multiple_of": 61})
    engine = LocalEngine(opened(recipe))
    engine.check(recipe)
    engine.slot.swap(recipe)
    engine.export(recipe, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in written.items():
        assert torch.equal(engine.slot._weights[name], tensor), name
    assert sum(61 in tensor.shape for tensor in written.values()) == count
    _, said = load.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said.values())


def test_a_recipe_is_evaluated_with_its_own_tokens(speakers, recipe_of, tmp_path):
    file, items = tmp_path / "recipe.yaml", tmp_path / "items.jsonl"
    recipe = recipe_of(speakers, tokenizer={"pad_to_multiple_of": 8}, chat_template="chatml")
    file.write_text(recipe.to_yaml())
    row = {"id": "q", "task": "t", "kind": "choice", "prompt": "w3 x1 y0", "choices": ["x2", "y2", "w9"], "answer": 1}
    items.write_text(json.dumps(row) + "\n")
    for options in ((), ("--apply-chat-template",)):
        done = client("evaluate", file, items, "--json", *options)
        assert done.returncode == 0, done.stderr
        engine = LocalEngine(opened(recipe))
        expected = answers(
            engine, recipe, [Item("q", "t", "choice", "w3 x1 y0", 1, ("x2", "y2", "w9"))], chat=bool(options)
        )
        assert json.loads(done.stdout)["accuracy"] == expected.mean()
