"""Texts ranked by their embeddings, against a plain forward per text: poolings, prompts, batches, search and daemon."""

import functools
import json
import shutil
import warnings
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merge3.checkpoint.modules import module_files
from merge3.client import run
from merge3.client.channel import Target
from merge3.client.remote import RemoteEngine
from merge3.engine import LocalEngine
from merge3.errors import BadInput, CheckpointError, ItemsError, Merge3Warning, ResourceError
from merge3.export import merge_to_disk
from merge3.pool import Pool
from merge3.recipe import Recipe, Tokenizer
from merge3.registration import Registration
from merge3.search.config_files import load_config
from merge3.tasks import Item, LogitsError, Scorer, fit_to_model, read_items
from merge3.tasks import embeddings as computed
from merge3.tasks.kinds import KINDS
from merge3.tasks.prompts import Reader
from merge3.tasks.sentences import POOLINGS, Sentences, read_sentences
from merge3_server.generate import continuation
from tests.asking import answers
from tests.encoders import lay_out, make_model, make_tokenizer
from tests.server.daemons import Thread

FLAGS = {name: flag for flag, name in POOLINGS.items()}


def words(rng, count):
    return " ".join(f"w{rng.integers(57)}" for _ in range(count))


def rank_items(count=24, metric="acc", seed=0, texts=4):
    """Of different lengths; some texts occur in several items."""
    rng = np.random.default_rng(seed)
    shared = [words(rng, 1 + i) for i in range(8)]
    items = []
    for i in range(count):
        choices = [shared[i % 8], *(words(rng, 1 + (i + j) % 9) for j in range(texts - 1))]
        prompt = shared[(i + 3) % 8] if i % 3 == 0 else words(rng, 1 + i % 6)
        items.append(Item(f"r{i}", "r", "rank", prompt, int(rng.integers(texts)), tuple(choices), metric))
    return items


@functools.cache  # one forward for all poolings
@torch.no_grad()
def states_of(model, ids):
    return model(input_ids=torch.tensor([ids])).last_hidden_state[0].double()


def plain(model, tokenizer, text, pooling, prompt=""):
    """A text's embedding by a forward of its own: float64. prompt: of it, where its tokens are not pooled."""
    states = states_of(model, tuple(tokenizer(prompt + text)["input_ids"]))
    skip = len(tokenizer(prompt)["input_ids"]) - 1 if prompt else 0
    rest, n = states[skip:], len(states) - skip
    numbers = torch.arange(skip + 1, len(states) + 1, dtype=torch.float64)[:, None]
    return {
        "mean": rest.mean(0),
        "mean_sqrt_len_tokens": rest.sum(0) / n**0.5,
        "weightedmean": (rest * numbers).sum(0) / numbers.sum(),
        "cls": states[0],
        "lasttoken": states[-1],
        "max": rest.max(0).values,
    }[pooling]


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """kind -> model; and a folder with the tokenizer, whose sentence files a test lays out as it wants."""
    folder = tmp_path_factory.mktemp("encoder")
    make_tokenizer().save_pretrained(folder)
    models = {kind: make_model(kind) for kind in ("bert", "deberta", "llama", "t5")}
    return SimpleNamespace(models=models, folder=folder, tokenizer=make_tokenizer())


def expected(items, embed):
    """(acc, mrr) of each item by cosines of what embed(text, is_query) gives."""
    found = []
    for item in items:
        query = embed(item.prompt, True)
        cosines = [cosine(query, embed(text, False)) for text in item.choices]
        place = 1 + sum(c >= cosines[item.answer] for i, c in enumerate(cosines) if i != item.answer)
        found.append((float(place == 1), 1 / place))
    return np.array(found)


# A decoder's first token sees no other: there all texts would be equal.
PAIRS = [(kind, pooling) for kind in ("bert", "deberta", "llama", "t5") for pooling in FLAGS]
PAIRS.remove(("llama", "cls"))


@torch.no_grad()
@pytest.mark.parametrize("kind, pooling", PAIRS)
def test_ranks_are_those_of_a_plain_forward_per_text(encoders, kind, pooling):
    folder, tokenizer, model = encoders.folder, encoders.tokenizer, encoders.models[kind]
    lay_out(folder, (pooling,))
    truth = expected(rank_items(), lambda text, _: plain(model, tokenizer, text, pooling))
    assert 0 < truth[:, 0].mean() < 1
    for column, metric in enumerate(("acc", "mrr")):
        for batch_tokens in (16, 4096):
            scorer = Scorer(rank_items(metric=metric), model, folder, batch_tokens=batch_tokens)
            assert np.array_equal(scorer.score(model), truth[:, column])


@torch.no_grad()
def test_embeddings_are_close_and_each_text_is_embedded_once(encoders):
    folder, tokenizer, model = encoders.folder, encoders.tokenizer, encoders.models["bert"]
    lay_out(folder, ("cls", "mean"))
    items = rank_items()
    scorer = Scorer(items, model, folder, batch_tokens=64)
    (asked,) = scorer.asked
    found = dict(asked.question(model))
    for i, item in enumerate(items):
        for text, row in zip((item.prompt, *item.choices), found[i]):
            truth = torch.cat([plain(model, tokenizer, text, pooling) for pooling in ("cls", "mean")])
            assert torch.allclose(row.double(), truth, atol=1e-4)
    distinct = {text for item in items for text in (item.prompt, *item.choices)}
    assert sum(len(batch.places) for batch in asked.question.batches) == len(distinct) < 5 * len(items)
    assert len(asked.question.batches) > 2
    assert all(batch.inputs["input_ids"].numel() <= 64 for batch in asked.question.batches)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "weightedmean", "max", "cls", "lasttoken"])
@pytest.mark.parametrize("include", [True, False])
def test_prompts_of_the_checkpoint(encoders, pooling, include):
    folder, tokenizer, model = encoders.folder, encoders.tokenizer, encoders.models["bert"]
    lay_out(folder, (pooling,), {"query": "w1 w2 ", "passage": "w3 "}, include_prompt=include)
    before = {True: "w1 w2 ", False: "w3 "}

    def embed(text, query):
        if include:
            return plain(model, tokenizer, before[query] + text, pooling)
        return plain(model, tokenizer, text, pooling, before[query])

    items = rank_items(metric="mrr")
    assert np.array_equal(Scorer(items, model, folder).score(model), expected(items, embed)[:, 1])


def test_what_a_folder_says(tmp_path):
    assert read_sentences(tmp_path) == Sentences() and module_files(tmp_path) == {}
    lay_out(tmp_path, ("cls",), limit=12)
    assert read_sentences(tmp_path) == Sentences(("cls",), True, limit=12)
    assert set(module_files(tmp_path)) == {
        "modules.json",
        "1_Pooling/config.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
    }
    pooling, prompts = tmp_path / "1_Pooling/config.json", tmp_path / "config_sentence_transformers.json"
    pooling.write_text('{"pooling_mode": "lasttoken", "include_prompt": false}')
    prompts.write_text('{"prompts": {"search": "s: ", "document": "d: "}, "default_prompt_name": "search"}')
    assert read_sentences(tmp_path) == Sentences(("lasttoken",), True, False, "s: ", "d: ", 12)
    sentence, tokenizer = tmp_path / "sentence_bert_config.json", tmp_path / "tokenizer_config.json"
    for said, own, limit in ((None, 256, 256), (12, 256, 12), (None, 10**30, None), (None, None, None)):
        sentence.write_text(json.dumps({"max_seq_length": said}))
        tokenizer.write_text(json.dumps({"model_max_length": own}))
        assert read_sentences(tmp_path).limit == limit
    modules = tmp_path / "modules.json"
    for file, text, message in (
        (
            pooling,
            '{"pooling_mode": "median"}',
            "1_Pooling/config.json: pooling .'median'.*; expected one or more of cls",
        ),
        (pooling, "{}", r"pooling \[\]"),
        (pooling, "[]", "found list; expected dict"),
        (pooling, "{", "unreadable"),
        (prompts, '{"prompts": {}, "default_prompt_name": "x"}', "default_prompt_name is 'x'; expected null"),
        (prompts, '{"prompts": {"query": 1}}', "prompts are .* expected names and texts"),
        (tmp_path / "sentence_bert_config.json", '{"max_seq_length": 0}', "max_seq_length is 0"),
        (modules, '[{"type": "a.Dense", "path": "2_Dense"}]', "a module 'Dense'; expected Transformer, Pooling, Norm"),
        (modules, '[{"type": "a.Transformer", "path": "0_T"}]', "the transformer lies in '0_T'"),
        (modules, '[{"type": "a.Pooling", "path": "../x"}]', "path '../x'; expected a folder of the checkpoint"),
        (modules, "[1]", "an entry '1'; expected modules with type and path"),
    ):
        kept = file.read_text()
        file.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_sentences(tmp_path)
        file.write_text(kept)


def test_where_nothing_says_the_mean_is_taken_and_that_is_said(encoders, tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    items, model = rank_items(), encoders.models["bert"]
    with pytest.warns(Merge3Warning, match=r"nothing says how states become an embedding .*their mean is taken"):
        found = Scorer(items, model, tmp_path).score(model)
    lay_out(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Merge3Warning)
        assert np.array_equal(Scorer(items, model, tmp_path).score(model), found)


def test_poolings_have_a_function_each():
    assert set(computed.POOLINGS) == set(POOLINGS.values())


def test_items_are_checked(tmp_path):
    good = {"kind": "rank", "prompt": "w1", "choices": ["w2", "w3"], "answer": 1}
    for change, message in (
        ({"choices": ["w2"], "answer": 0}, "line 2: 1 choices; expected at least 2"),
        ({"choices": ["w2", "w2"]}, r"choices\[0\] and choices\[1\] are both 'w2'"),
        ({"answer": 2}, "answer is 2; expected one of the choices, or an index below 2"),
        ({"answer": "w4"}, "answer is 'w4'; expected one of the choices"),
        ({"metric": "acc_norm"}, "metric is 'acc_norm'; expected acc, mrr"),
        ({"prompt": ""}, "prompt is ''; expected text"),
    ):
        (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in (good, good | change)))
        with pytest.raises(ItemsError, match=message):
            read_items(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_text(json.dumps(good | {"answer": "w3"}))
    (item,) = read_items(tmp_path / "t.jsonl")
    assert item.answer == 1 and item.metric == "acc"


def test_what_cannot_be_embedded(encoders, world):
    folder, model = encoders.folder, encoders.models["bert"]
    lay_out(folder, limit=12)

    def item(prompt="w1", choices=("w2", "w3"), **more):
        return Item("i", "r", "rank", prompt, 0, choices, "acc", **more)

    for wrong, message in (
        (item(choices=("w2 w3", "w2  w3")), "choices.0. 'w2 w3' and choices.1. 'w2  w3' have the same tokens"),
        (item("w1 " * 11), "prompt of 13 tokens; expected at most 12, the model's positions"),
        (item(choices=("w2", "w3 " * 11)), r"choices\[1\] of 13 tokens"),
        (item(image="x.png"), "an image, and kind 'rank'"),
    ):
        with pytest.raises(ItemsError, match=message):
            Scorer([wrong], model, folder)
    with pytest.raises(ItemsError, match="apply_chat_template: item 'i' of task 'r' is embedded, not continued"):
        Scorer([item()], model, folder, chat=True)
    others, _, language = world
    models = "classify for classification heads, choice or generate or forced for language models, rank for encoders"
    with pytest.raises(ItemsError, match=f"kind 'rank' for a LlamaForCausalLM; expected {models}"):
        Scorer([item()], language["llama"], others)
    with pytest.raises(ItemsError, match=f"kind 'choice' for a BertModel; expected {models}"):
        Scorer([Item("i", "r", "choice", "w1", 0, ("w2", "w3"), "acc")], model, folder)
    with pytest.raises(BadInput, match="generate: a BertModel; expected a language model"):
        list(continuation(model, folder, "w1", 2))


def test_long_texts_are_left_out_or_cut(encoders, tmp_path):
    encoders.models["bert"].save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    lay_out(tmp_path, limit=12)
    items = [Item(f"r{i}", "r", "rank", "w1 " * n, 0, ("w2", "w3"), "acc") for i, n in enumerate((2, 20))]
    assert fit_to_model(items, tmp_path, "skip").items == items[:1]
    cut = fit_to_model(items, tmp_path, "truncate_left").items[1]
    assert cut.prompt.split() == ["w1"] * 10
    lay_out(tmp_path)  # no limit of its own: the model's positions
    assert fit_to_model(items, tmp_path, "skip").items == items
    long = Item("l", "r", "rank", "w1", 0, ("w2", "w3 " * 50), "acc")
    with pytest.raises(ItemsError, match=r"choices\[1\] of 52 tokens, and nothing would be left of its prompt"):
        fit_to_model([long, *items], tmp_path, "truncate_left")


def test_no_embedding_is_no_answer(encoders):
    lay_out(encoders.folder)
    model, items = make_model("bert"), rank_items(6)
    scorer = Scorer(items, model, encoders.folder)
    message = "item 'r0' of task 'r': the model's states are NaN or infinite here"
    keep = model.embeddings.LayerNorm.bias.clone()
    for value in (torch.nan, torch.inf):
        model.embeddings.LayerNorm.bias.data[3] = value
        with pytest.raises(LogitsError, match=message):
            scorer.score(model)
        model.embeddings.LayerNorm.bias.data.copy_(keep)
    for p in model.encoder.layer[1].output.LayerNorm.parameters():
        p.data.zero_()  # every text at the origin, which has no direction
    with pytest.raises(LogitsError, match=message):
        scorer.score(model)


def test_equal_cosines_are_not_the_highest():
    item = Item("i", "r", "rank", "w1", 0, ("w2", "w3", "w4"), "acc")
    found = torch.tensor([[1.0, 0], [1, 1], [2, 2], [0, 1]])
    assert KINDS["rank"].metrics["acc"](item, found) == 0.0
    assert KINDS["rank"].metrics["mrr"](item, found) == 0.5
    assert KINDS["rank"].metrics["mrr"](item, found[[0, 1, 3, 3]]) == 1.0


# -- checkpoints, search, daemon


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with sentence encoders `base`, `e0`, `e1` and items that the endpoints answer differently."""
    folder = tmp_path_factory.mktemp("sentence")
    model = make_model("bert")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in ("base", "e0", "e1"):
        with torch.no_grad():
            for key, p in model.named_parameters():
                p.copy_(start[key] + 0.05 * torch.randn(p.shape))
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
        lay_out(folder / name, ("cls",), {"query": "w1 ", "document": "w2 "})
        (folder / name / "2_Normalize").mkdir()
    rows = [
        {"id": i.id, "kind": "rank", "prompt": i.prompt, "choices": i.choices, "answer": i.answer}
        for i in rank_items(40)
    ]
    (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder, weight=0.5):
    models = [{"model": str(folder / name), "parameters": {"weight": weight}} for name in ("e0", "e1")]
    return Recipe.parse({"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "models": models})


def test_an_exported_encoder_is_complete_and_answers_as_searched(checkpoints, tmp_path):
    folder, items = checkpoints, read_items(checkpoints / "r.jsonl")
    engine = LocalEngine(Pool.open(str(folder / "base"), [str(folder / "e0"), str(folder / "e1")]))
    searched = answers(engine, recipe(folder), items)
    engine.export(recipe(folder), tmp_path / "out")
    for name in module_files(folder / "base"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / "base" / name).read_bytes()
    assert read_sentences(tmp_path / "out") == Sentences(("cls",), True, True, "w1 ", "w2 ")
    out = str(tmp_path / "out")
    assert np.array_equal(answers(LocalEngine(Pool.open(out, [])), out, items), searched)
    from transformers import AutoModel

    model = AutoModel.from_pretrained(out).eval()
    assert np.array_equal(Scorer(items, model, out).score(model), searched)


def test_modules_with_weights_of_their_own(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints, tmp_path / "world")
    for name in ("base", "e0", "e1"):
        (folder / name / "3_Dense").mkdir()
        steps = json.loads((folder / name / "modules.json").read_text())
        (folder / name / "modules.json").write_text(json.dumps([*steps, {"type": "x.Dense", "path": "3_Dense"}]))
        save_file({"linear.weight": torch.ones(2, 2)}, folder / name / "3_Dense/model.safetensors")
    merge_to_disk(recipe(folder), tmp_path / "same")
    assert torch.equal(load_file(tmp_path / "same/3_Dense/model.safetensors")["linear.weight"], torch.ones(2, 2))
    engine = LocalEngine(Pool.open(str(folder / "base"), [str(folder / "e0")]))
    with pytest.raises(CheckpointError, match="a module 'Dense'"):
        answers(engine, str(folder / "e0"), rank_items(2))
    save_file({"linear.weight": torch.zeros(2, 2)}, folder / "e1/3_Dense/model.safetensors")
    with pytest.raises(CheckpointError, match="e1: 3_Dense/model.safetensors differs from that of .*base, or is miss"):
        merge_to_disk(recipe(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_pooling_and_prompts_are_said(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints, tmp_path / "world")
    lay_out(folder / "e0", ("mean",), {"query": "w1 ", "document": "w3 "})
    lines = Pool.open(str(folder / "base"), [str(folder / "e0"), str(folder / "e1")]).warnings
    prompts = '{"document": "w%d ", "query": "w1 "}'
    for start in (
        "e0: pooling of its embeddings: mean, cls in the base",
        f"e0: prompts of its embeddings: {prompts % 3}, {prompts % 2} in the base",
    ):
        assert any(start in line and line.endswith("the merge has the base's") for line in lines), start
    assert not any("e1: " in line for line in lines)
    (folder / "e1/1_Pooling/config.json").write_text('{"pooling_mode": "cls"}')  # as newer versions write it
    assert not Pool.open(str(folder / "base"), [str(folder / "e1")]).warnings
    shutil.rmtree(folder / "base/1_Pooling")
    lines = Pool.open(str(folder / "base"), [str(folder / "e1")]).warnings
    assert any("e1: pooling of its embeddings: cls, none in the base" in line for line in lines)


def test_a_folder_made_for_its_tokenizer_has_the_modules_too(checkpoints):
    base = str(checkpoints / "base")
    words = Pool.open(base, [str(checkpoints / "e0")], tokenizer=Tokenizer("union")).words
    for folder in (words.folder(), words.folder("{{ messages }}")):
        assert str(checkpoints) not in str(folder) and read_sentences(folder) == read_sentences(base)


def configuration(folder, where):
    genome = {
        "base_model": str(folder / "base"),
        "models": [str(folder / name) for name in ("e0", "e1")],
        "merge_method": "task_arithmetic",
    }
    data = {
        "genome": genome,
        "tasks": [{"items": str(folder / "r.jsonl"), "metric": "mrr"}],
        "optimizer": {"budget": 8, "population": 4},
        "extract": {"method": "all"},
    }
    (where / "evolve.yaml").write_text(yaml.safe_dump(data))
    return load_config(where / "evolve.yaml")


def test_a_search_and_a_daemon_agree(checkpoints, tmp_path):
    config = configuration(checkpoints, tmp_path)
    here = run.evolve(config, tmp_path / "here", quiet=True)
    assert {"base", "e0", "e1"} <= set(here["baselines"]) and 0 < here["heldout"] < 1
    assert (tmp_path / "here/model/1_Pooling/config.json").is_file()
    daemon = Thread(checkpoints)
    try:
        there = run.evolve(config, tmp_path / "there", quiet=True, target=Target(daemon.address))
        with closing(RemoteEngine(Target(daemon.address), config.models)) as remote:
            asked = Registration(tuple(read_items(checkpoints / "r.jsonl")))
            (evaluation,) = remote.evaluate(asked, [recipe(checkpoints)])
            local = LocalEngine(Pool.open(config.models[0], config.models[1:]))
            assert np.array_equal(evaluation.answers(), answers(local, recipe(checkpoints), asked.items))
            (tmp_path / "outside.json").write_text("{}")
            (checkpoints / "e1/1_Pooling/link.json").symlink_to(tmp_path / "outside.json")
            with pytest.raises(BadInput, match="link.json is a link to outside the daemon's roots"):
                RemoteEngine(Target(daemon.address), [*config.models[:1], str(checkpoints / "e1")])
    finally:
        daemon.kill()
        (checkpoints / "e1/1_Pooling/link.json").unlink(missing_ok=True)
    assert there["recipe_hash"] == here["recipe_hash"] and there["heldout"] == here["heldout"]
    files = {p.relative_to(tmp_path / "there/model") for p in (tmp_path / "there/model").rglob("*") if p.is_file()}
    assert files == {
        p.relative_to(tmp_path / "here/model") for p in (tmp_path / "here/model").rglob("*") if p.is_file()
    }
    assert all((tmp_path / "there/model" / f).read_bytes() == (tmp_path / "here/model" / f).read_bytes() for f in files)


@pytest.mark.parametrize("name", ["", ".", "..", "/x", "../x", "a/../x", "a//b", "./a", "a/", "a\\b"])
def test_a_daemon_cannot_write_elsewhere(tmp_path, name):
    from merge3.client.received import received
    from merge3.rpc import merge3_pb2 as pb

    sent = [pb.ExportResponse(chunk=pb.FileChunk(file=name, data=b"x"))]
    with pytest.raises(ResourceError, match="the daemon sent a file named"):
        received(iter(sent), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_request_needs_no_folder_where_items_are_only_measured():
    (item,) = rank_items(1)
    with pytest.warns(Merge3Warning, match="None: nothing says"):
        asked = KINDS["rank"].request(item, Reader(make_tokenizer()))
    assert asked.poolings == ("mean",) and asked.length()[0] == max(map(len, asked.tokens))
