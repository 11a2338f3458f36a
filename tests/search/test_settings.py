"""Settings of an evolve configuration, each through a whole small search: what was searched is what comes out."""

import json
import sqlite3

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaForSequenceClassification

from merge3.client import run
from merge3.engine import LocalEngine
from merge3.errors import ConfigError, ItemsError
from merge3.export import merge_to_disk
from merge3.fitness import mean_over_tasks
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.search.config_files import load_config
from merge3.search.questions import load_questions
from merge3.space import Space
from merge3.world.numbers import ENGLISH, make_items
from merge3.world.tokenizer import make_tokenizer
from tests.asking import answers
from tests.classifiers import make_classifier
from tests.commands import client

SMALL = {"optimizer": {"budget": 4, "population": 4, "seed": 3}}


def configuration(folder, genome=None, **changes):
    data = yaml.safe_load((folder / "evolve.yaml").read_text()) | SMALL | changes
    data["genome"] |= genome or {}
    (folder / "changed.yaml").write_text(yaml.safe_dump(data))
    return load_config(folder / "changed.yaml")


def journal(directory):
    """[(genome, responses)], in order."""
    with sqlite3.connect(directory / "run.db") as db:
        rows = db.execute("SELECT genome, responses FROM candidates ORDER BY generation, position").fetchall()
    return [tuple(np.frombuffer(cell) for cell in row) for row in rows]


def space_of(config):
    pool = Pool.open(config.models[0], config.models[1:])
    return Space(config.genome.definition(), pool.layouts[pool.base])


# name -> (genome, how many genes that makes for three experts and four layers)
SPACES = {
    "sakana6": (dict(preset="sakana6", merge_method="dare_ties"), 3 * 2),
    "evolve": (dict(preset="evolve", merge_method="ties", layer_granularity=2), 2 * 3 * 2),
    "smooth": (dict(smooth=True, merge_method="task_arithmetic", layer_granularity=1, filters=["mlp"]), 4 * 3 * 2),
}


@pytest.mark.parametrize("name", SPACES)
def test_spaces(own_world, tmp_path, name):
    genome, size = SPACES[name]
    config = configuration(own_world, genome, limit=8)
    result = run.evolve(config, tmp_path / "run", quiet=True)
    rows = journal(tmp_path / "run")
    assert [len(genes) for genes, _ in rows] == [size] * 4
    assert (
        len({genes.tobytes() for genes, _ in rows}) == 3
    )  # a search's last candidate is its mean: here, still the start
    questions = load_questions(config)
    exported = LocalEngine(Pool.open(str(tmp_path / "run" / "model"), []))
    found = answers(exported, exported.pool.base, questions.subset)
    assert any(np.array_equal(found, responses) for _, responses in rows)
    assert mean_over_tasks(found, questions.subset)[0] == result["search_value"]


def test_with_no_items_held_out_it_is_said_that_all_is_measured_on_those_searched(own_world, tmp_path):
    """On the terminal, the page, in result.json and in front.csv: nowhere are they called held-out."""
    both = {"objectives": ["english", "length"], "optimizer": SMALL["optimizer"] | {"name": "nsga2"}}
    config = configuration(own_world, limit=6, heldout={"fraction": 0}, **both)
    done = client("evolve", own_world / "changed.yaml", "--run-dir", tmp_path / "run", "--no-export")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())  # the terminal's width breaks lines anywhere
    assert "on the 12 items of the search itself: none were held out" in said
    assert "values on the search's own items" in said and "held-out" not in said and "never saw" not in said
    assert "the search's own items: none are held out" in done.stderr
    page = (tmp_path / "run" / "report.html").read_text().split("<h2>The configuration")[0]
    assert "12 items of the search itself" in page and "never saw" not in page and "eld-out" not in page
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["measured_on"] == "the search's own items: none were held out" and result["heldout_items"] == 12
    assert len(load_questions(config).search) == 12
    assert "english_searched" in (tmp_path / "run" / "front.csv").read_text().splitlines()[0]


def test_a_task_in_two_files_says_one_thing(own_world):
    lines = (own_world / "english.jsonl").read_text().splitlines()
    for number, own in enumerate((lines[:20], lines[20:40])):
        rows = [json.dumps(json.loads(line) | {"id": f"{number}-{i}"}) for i, line in enumerate(own)]
        (own_world / f"part{number}.jsonl").write_text("\n".join(rows) + "\n")
    parts = [{"items": f"./part{number}.jsonl", "name": "english"} for number in range(2)]
    asked = load_questions(configuration(own_world, tasks=parts))
    assert len(asked.search) + len(asked.heldout) == 40 and set(asked.weights) == {"english"}
    for word, value in (("weight", 2.0), ("limit", 5), ("system_instruction", "Briefly.")):
        said = f"task 'english': {word} .*, and .* in another entry of it; expected the same"
        with pytest.raises(ConfigError, match=said):
            load_questions(
                configuration(own_world, tasks=[parts[0], parts[1] | {word: value}], apply_chat_template=True)
            )


def test_a_random_start(own_world, tmp_path):
    """The first candidate is drawn from the whole space, by the seed."""
    config = configuration(own_world, random_init=True, limit=2)
    run.evolve(config, tmp_path / "run", quiet=True, export=False)
    space = space_of(config)
    expected = np.random.default_rng(3).uniform(*space.bounds())
    first = journal(tmp_path / "run")[0][0]
    np.testing.assert_allclose(first, expected, rtol=0, atol=0.02)  # CMA bends what lies close to a bound
    assert not np.allclose(first, space.initial(), atol=0.1)


def test_chat_templates_are_applied(own_world, tmp_path):
    """Prompts without their last word, which a template adds, are answered like the whole prompts."""
    tasks = [{"items": "./english.jsonl"}]
    plain = configuration(own_world, tasks=tasks)
    with pytest.raises(ItemsError, match="apply_chat_template: the tokenizer has no chat template"):
        run.evolve(configuration(own_world, tasks=tasks, apply_chat_template=True), tmp_path / "none", quiet=True)
    run.evolve(plain, tmp_path / "plain", quiet=True, export=False)
    lines = [json.loads(line) for line in (own_world / "english.jsonl").read_text().splitlines()]
    for item in lines:
        item["prompt"] = item["prompt"].removesuffix(" equals")
    (own_world / "english.jsonl").write_text("\n".join(map(json.dumps, lines)))
    template = "<s> {{ messages[0]['content'] }}{% if add_generation_prompt %} equals{% endif %}"
    for name in ("base", "english", "italian", "translation"):
        (own_world / name / "chat_template.jinja").write_text(template)
    config = configuration(own_world, tasks=tasks, apply_chat_template=True)
    run.evolve(config, tmp_path / "chat", quiet=True)
    for (genome, responses), (expected, others) in zip(
        journal(tmp_path / "chat"), journal(tmp_path / "plain"), strict=True
    ):
        assert np.array_equal(genome, expected) and np.array_equal(responses, others)
    written = AutoTokenizer.from_pretrained(tmp_path / "chat" / "model")
    said = written.apply_chat_template(
        [{"role": "user", "content": "one plus one"}], tokenize=False, add_generation_prompt=True
    )
    assert said == "<s> one plus one equals"


def test_the_tokenizer_of_one_of_the_experts(own_world, tmp_path):
    file = own_world / "english" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 17}))
    config = configuration(own_world, {"tokenizer_source": "./english"}, limit=2)
    run.evolve(config, tmp_path / "run", quiet=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").model_max_length == 17
    assert Recipe.from_yaml(tmp_path / "run" / "best.yaml").tokenizer_source == str(own_world / "english")


@pytest.fixture
def classifiers(tmp_path):
    """base, a and b: Llamas with heads of 2, 3 and 4 labels, and questions for the heads of a and b."""
    folder = tmp_path / "classifiers"
    start = None
    for seed, (name, labels) in enumerate((("base", 2), ("a", 3), ("b", 4))):
        model = make_classifier(labels, seed, vocabulary=200)
        start = start or {key: value.clone() for key, value in model.model.state_dict().items()}
        model.model.load_state_dict({key: value + 0.2 * torch.randn(value.shape) for key, value in start.items()})
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    for name, labels in (("a", 3), ("b", 4)):
        items = [
            {"id": f"{i}", "kind": "classify", "prompt": " ".join(ENGLISH[i : i + 3]), "answer": i % labels}
            for i in range(40)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    genome = {"models": ["./a", "./b"], "base_model": "./base", "merge_method": "task_arithmetic"}
    tasks = [{"items": f"./{name}.jsonl", "head": f"./{name}"} for name in ("a", "b")]
    (folder / "evolve.yaml").write_text(yaml.safe_dump({"genome": genome, "tasks": tasks}))
    return folder


@pytest.mark.filterwarnings("ignore::merge3.errors.Merge3Warning")  # these experts are far from their base
def test_each_task_is_answered_by_its_own_head(classifiers, tmp_path):
    """Against transformers: the merged backbone from the disk, under the head of the task's expert."""
    config = configuration(classifiers)
    run.evolve(config, tmp_path / "run", quiet=True, export=False)
    items = load_questions(config).subset
    tokenizer, space = make_tokenizer(), space_of(config)
    for number, (genome, responses) in enumerate(journal(tmp_path / "run")):
        merge_to_disk(space.recipe(genome), tmp_path / f"merged-{number}")
        expected = []
        for item in items:
            if not expected or item.task != items[len(expected) - 1].task:
                model = LlamaForSequenceClassification.from_pretrained(classifiers / item.task)
                merged = LlamaForSequenceClassification.from_pretrained(tmp_path / f"merged-{number}")
                model.model.load_state_dict(merged.model.state_dict())
            with torch.no_grad():
                logits = model(**tokenizer(item.prompt, return_tensors="pt")).logits
            expected.append(float(int(logits.argmax()) == item.answer))
        assert responses.tolist() == expected
        assert {item.task for item in items} == {"a", "b"} and 0 < sum(expected) < len(items)


@pytest.mark.heavy
def test_a_search_beats_every_baseline(solving_world, tmp_path):
    """On 300 held-out questions: what the demo promises, on models that are trained as little as tests can afford."""
    folder = tmp_path / "world"
    folder.mkdir()
    for name in ("base", "english", "italian", "translation", "sorting"):
        (folder / name).symlink_to(solving_world / name)
    experts = ("english", "italian", "translation", "sorting")
    for task in experts:
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, make_items(task, 0, 150))))
    genome = {
        "models": [f"./{name}" for name in experts],
        "base_model": "./base",
        "merge_method": "task_arithmetic",
        "layer_granularity": 2,
        "allow_negative_weights": True,
        "bounds": {"weight": [-0.5, 1.5]},
    }
    data = {
        "genome": genome,
        "tasks": [{"items": f"./{task}.jsonl"} for task in experts],
        "heldout": {"fraction": 0.5},
        "extract": {"method": "random", "size": 20},
        "optimizer": {"budget": 120, "population": 12, "sigma": 0.15, "seed": 0},
    }
    (folder / "evolve.yaml").write_text(yaml.safe_dump(data))
    result = run.evolve(load_config(folder / "evolve.yaml"), tmp_path / "run", quiet=True, export=False)
    assert result["heldout_items"] == 300
    assert result["heldout"] > max(result["baselines"].values()), (result["heldout"], result["baselines"])
