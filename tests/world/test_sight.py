"""Pictures and two languages: what is made, and that the merge of both experts answers what neither does."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from merge3 import Pool
from merge3.checkpoint import open_checkpoint
from merge3.client.evaluate import Asked, evaluate_files
from merge3.client.run import evolve
from merge3.search.config_files import load_config
from merge3.tasks import read_items
from merge3.world.glyphs import COLOURS, LANGUAGES, SHAPES, SIDE, WORDS, Scene, scene
from merge3.world.sight import make_sight
from tests.worlds import WORLDS, shared

EXAMPLE = Path(__file__).parents[2] / "examples" / "cross_domain"


def test_what_is_said_of_a_picture_is_in_the_vocabulary():
    for shape in SHAPES:
        for colour in COLOURS:
            for language in LANGUAGES.values():
                said = [language.says(Scene(shape, colour, 0, 0)), *language.asks]
                said += [answer(Scene(shape, colour, 0, 0)) for answer in language.asks.values()]
                assert set(" ".join(said).split()) <= set(WORDS)
    asks = LANGUAGES["italian"].asks
    assert asks["che cosa vedi ?"](Scene("cross", "red", 0, 0)) == "croce rossa"
    assert asks["che cosa vedi ?"](Scene("ring", "red", 0, 0)) == "anello rosso"
    assert asks["che cosa vedi ?"](Scene("bar", "green", 0, 0)) == "barra verde"
    assert len(set(WORDS)) == len(WORDS)


def test_a_sign_is_where_it_is_said_to_be():
    shown = Scene("bar", "blue", 1, 2).pixels(np.random.default_rng(0)).astype(int)
    assert shown.shape == (SIDE, SIDE, 3)
    blue = (shown[..., 2] - shown[..., 0]) > 100
    assert blue[5:7, 8:12].all() and blue.sum() == 8
    assert len({scene(random.Random(i)) for i in range(200)}) > 100


@pytest.fixture(scope="module")
def unlearned():
    """Everything there, and hardly trained."""
    yield from shared(make_sight, steps={"words": 3, "eyes": 3, "italian": 3}, items=12)


def test_a_small_world_is_searched_and_exported(unlearned, tmp_path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    world = shutil.copytree(unlearned, tmp_path / "world")
    shutil.copy(EXAMPLE / "evolve.yaml", world)
    result = evolve(load_config(world / "evolve.yaml", budget=6), tmp_path / "run", quiet=True)
    assert result["candidates"] == 6 and set(result["baselines"]) >= {"base", "english", "italian"}
    out, base = tmp_path / "run" / "model", open_checkpoint(world / "base")
    LlavaForConditionalGeneration.from_pretrained(out)
    assert AutoProcessor.from_pretrained(out).image_token == "<image>"
    assert {name: info.shape for name, info in open_checkpoint(out).tensors.items()} == {
        name: info.shape for name, info in base.tensors.items()}  # fmt: skip
    items = read_items(world / "italian.jsonl")
    assert len(items) == 12 and {item.image.rsplit("/", 2)[1] for item in items} == {"italian"}
    assert evaluate_files(out, Asked((world / "italian.jsonl",)))["tasks"]["italian"]["items"] == 12
    again = evolve(load_config(world / "evolve.yaml", budget=6), tmp_path / "again", quiet=True, export=False)
    assert again["heldout"] == result["heldout"] and again["recipe_hash"] == result["recipe_hash"]


def test_the_language_model_has_one_word_less(unlearned):
    pool = Pool.open(str(unlearned / "base"), [str(unlearned / "english"), str(unlearned / "italian")])
    assert list(pool.towers) == [str(unlearned / "italian")] and len(pool.notes) == 3
    head = [json.loads((unlearned / name / "config.json").read_text()) for name in ("base", "italian")]
    assert head[0]["text_config"]["vocab_size"] == head[1]["vocab_size"] + 1


@pytest.mark.heavy
def test_a_merge_answers_in_a_language_that_it_was_never_shown_a_picture_in(tmp_path):
    """examples/cross_domain: better than either endpoint on items that the search never saw."""
    from merge3.world.kept import made

    world = shutil.copytree(made(WORLDS, make_sight), tmp_path / "world")
    shutil.copy(EXAMPLE / "evolve.yaml", world)
    result = evolve(load_config(world / "evolve.yaml"), tmp_path / "run", quiet=True)
    alone = {name: result["baselines"][name] for name in ("base", "english", "italian")}
    assert result["heldout"] > max(alone.values()) + 0.1, (result["heldout"], alone)
    seen = evaluate_files(world / "english", Asked((world / "english.jsonl",)))
    assert seen["accuracy"] > 0.8  # it does see
    exported = evaluate_files(tmp_path / "run" / "model", Asked((world / "italian.jsonl",)))
    assert exported["accuracy"] == pytest.approx(result["heldout"], abs=0.15)
