"""Searches over models that number their tokens otherwise, in this process and on a daemon."""

import json
import random

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge3.client import run
from merge3.client.channel import Target
from merge3.client.remote import RemoteEngine
from merge3.engine import LocalEngine
from merge3.errors import RecipeError
from merge3.pool import Pool
from merge3.recipe import Recipe, Tokenizer
from merge3.search.config_files import load_config
from merge3.search.journal import Journal
from merge3.search.questions import load_questions
from tests.asking import answers
from tests.server.daemons import Thread
from tests.speakers import renumber


def configuration(folder, name, genome, **changes):
    data = yaml.safe_load((folder / "evolve.yaml").read_text())
    data |= {"optimizer": {"budget": 4, "population": 4, "seed": 3}, "limit": 6} | changes
    data["genome"] |= genome
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    return load_config(folder / f"{name}.yaml")


def candidates(directory):
    return [(c.genome, c.responses) for c in Journal(directory).candidates()]


def shuffled(folder, name):
    """Other numbers for all tokens of a model of the world."""
    count = len(AutoTokenizer.from_pretrained(folder / name))
    renumber(folder / name, random.Random(name).sample(range(count), count))


def with_a_word_more(folder, name, word):
    model, tokenizer = (auto.from_pretrained(folder / name) for auto in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.add_tokens([word])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[-1] = 0.01
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)


@pytest.fixture
def babel(own_world):
    """The tiny world; `english` and `italian` number their tokens otherwise, `translation` has a word more."""
    shuffled(own_world, "english")
    shuffled(own_world, "italian")
    with_a_word_more(own_world, "translation", "<more>")
    return own_world


def test_other_numbers_make_no_other_search(own_world, tmp_path):
    """To the last answer, and the last byte of the model that comes out."""
    run.evolve(configuration(own_world, "before", {}), tmp_path / "before", quiet=True)
    shuffled(own_world, "english")
    shuffled(own_world, "italian")
    config = configuration(own_world, "after", {"tokenizer_source": "union"})
    result = run.evolve(config, tmp_path / "after", quiet=True)
    for (genome, found), (expected, others) in zip(candidates(tmp_path / "after"), candidates(tmp_path / "before")):
        assert np.array_equal(genome, expected) and np.array_equal(found, others)
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("before", "after")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert {"english", "uniform_linear"} <= set(result["baselines"])
    before = json.loads((tmp_path / "before" / "result.json").read_text())
    assert result["baselines"] == before["baselines"] and result["heldout"] == before["heldout"]


def test_with_a_vocabulary_every_models_tokenizer_counts(babel):
    models = [str(babel / name) for name in ("base", "english", "translation")]
    alone = Pool.open(models[0], models[1:]).words.files
    pool = Pool.open(models[0], models[1:], tokenizer=Tokenizer("union"))
    assert alone.items() < pool.words.files.items() and "the base's tokenizer.json" in alone
    before = pool.words.files["model 2's tokenizer.json"]
    with_a_word_more(babel, "translation", "<and more>")
    again = Pool.open(models[0], models[1:], tokenizer=Tokenizer("union")).words.files
    assert before != again["model 2's tokenizer.json"] and alone.items() < again.items()


def test_a_union_is_searched_exported_and_speaks_as_it_did(babel, tmp_path):
    config = configuration(babel, "union", {"tokenizer_source": "union"})
    run.evolve(config, tmp_path / "run", quiet=True)
    recipe = Recipe.from_yaml(tmp_path / "run" / "best.yaml")
    assert recipe.tokenizer_source == "union"
    engine = run.open_engine(config, quiet=True)
    engine.slot.swap(recipe, config.optimizer.seed)
    out = tmp_path / "run" / "model"
    model, tokenizer = (auto.from_pretrained(out) for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert tokenizer.convert_tokens_to_ids("<more>") == len(tokenizer) - 1 == model.config.vocab_size - 1
    for name, weight in load_file(out / "model.safetensors").items():
        assert torch.equal(engine.slot._weights[name], weight), name
    asked = AutoTokenizer.from_pretrained(engine.pool.words.folder())
    for item in load_questions(config).search[:4]:
        ids = tokenizer(item.prompt, return_tensors="pt")
        assert ids["input_ids"].tolist() == asked(item.prompt, return_tensors="pt")["input_ids"].tolist()
        said = [m.generate(**ids, max_new_tokens=4, do_sample=False) for m in (model, engine.slot.model)]
        assert torch.equal(*said)
    # and a run that was stopped is continued under the same identity
    run.evolve(config, tmp_path / "run", resume=True, quiet=True)


def test_templates_and_lengths_of_the_output_count(babel, tmp_path):
    """Items are cut to fit as they are asked: with the output's tokenizer and the recipe's template."""
    template = "<s> {{ messages[0]['content'] }}{% if add_generation_prompt %} equals{% endif %}"
    block = {"source": "./italian", "pad_to_multiple_of": 64}
    genome = {"tokenizer": block, "chat_template": template}
    tasks = [{"items": "./english.jsonl", "too_long": "skip"}]
    config = configuration(babel, "chat", genome, tasks=tasks, apply_chat_template=True)
    run.evolve(config, tmp_path / "run", quiet=True)
    recipe = Recipe.from_yaml(tmp_path / "run" / "best.yaml")
    assert recipe.chat_template == template and recipe.tokenizer.pad_to_multiple_of == 64
    written, italian = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "run" / "model", babel / "italian"))
    assert written.get_vocab() == italian.get_vocab() and written.chat_template == template


def test_a_daemon_has_a_pool_for_each_tokenizer(babel, tmp_path):
    daemon = Thread(babel, limits={"pools": 8})
    try:
        rows = {"<more>": {"source": {"kind": "model_token", "model": "./base", "token_id": 5}, "force": True}}
        block = {"source": "union", "tokens": rows, "pad_to_multiple_of": 16}
        config = configuration(babel, "block", {"tokenizer": block})
        run.evolve(config, tmp_path / "local", quiet=True)
        run.evolve(config, tmp_path / "remote", quiet=True, target=Target(daemon.address))
        for (genome, found), (expected, others) in zip(*(candidates(tmp_path / n) for n in ("remote", "local"))):
            assert np.array_equal(genome, expected) and np.array_equal(found, others)
        for file in ("best.yaml", "model/model.safetensors", "model/config.json", "model/tokenizer.json"):
            assert (tmp_path / "local" / file).read_bytes() == (tmp_path / "remote" / file).read_bytes(), file
        models, union = config.models, config.genome.recipe_tokenizer()
        engines = [RemoteEngine(daemon.address, models, tokenizer=asked) for asked in (None, union)]
        hashes = [engine.info().content_hashes for engine in engines]
        assert engines[0]._pool_id != engines[1]._pool_id and hashes[0] != hashes[1]
        recipe = Recipe.from_yaml(tmp_path / "local" / "best.yaml")
        items = load_questions(config).search[:3]
        local = LocalEngine(Pool.open(models[0], models[1:], tokenizer=union))
        assert np.array_equal(answers(engines[1], recipe, items), answers(local, recipe, items))
        with pytest.raises(RecipeError, match="expected rows as they are stored, as this pool was opened"):
            engines[0].check(recipe)
        with pytest.raises(RecipeError, match="found 'other'"):
            RemoteEngine(daemon.address, models, tokenizer=type(union)("other"))
        for engine in engines:
            engine.close()
    finally:
        daemon.kill()
