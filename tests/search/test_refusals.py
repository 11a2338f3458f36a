"""What a run would refuse at its end is refused before its first candidate; a moved run is the same run."""

import copy
import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest
import yaml

from merge3.client import run
from merge3.errors import BadInput, ConfigError, ItemsError, RecipeError
from merge3.recipe import Recipe
from merge3.search.config_files import load_config
from merge3.search.questions import load_questions
from tests.commands import client


@pytest.fixture
def world(own_world):
    """The tiny world in a folder of its own, with paths relative to its configuration."""
    folder, text = own_world, (own_world / "evolve.yaml").read_text()

    def configuration(name="evolve.yaml", genome=None, **changes):
        data = yaml.safe_load(text) | {"optimizer": {"budget": 6, "population": 6, "seed": 3}} | changes
        data["genome"] |= {"models": ["english", "italian"], "base_model": "base"} | (genome or {})
        (folder / name).write_text(yaml.safe_dump(data))
        return folder / name

    return folder, configuration


def candidates(directory):
    with sqlite3.connect(directory / "run.db") as db:
        return db.execute("SELECT COUNT(*) FROM candidates").fetchone()[0]


def refused(config, directory, error, message):
    with pytest.raises(error, match=message):
        run.evolve(load_config(config), directory, quiet=True)
    assert not directory.exists() or candidates(directory) == 0


def test_what_the_export_would_refuse_is_refused_before_the_search(world, tmp_path):
    _, configuration = world
    missing = {"model": "./base", "token": "drei"}
    refused(
        configuration(genome={"tokenizer": {"tokens": {"zwei": {"source": {"kind": "model_token", **missing}}}}}),
        tmp_path / "run",
        RecipeError,
        "has no 'drei'",
    )
    # the folder is free for the mended configuration
    result = run.evolve(load_config(configuration()), tmp_path / "run", quiet=True)
    assert result["candidates"] == 6


def test_an_expert_of_another_depth_is_named_before_the_search(world, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, configuration = world
    model = AutoModelForCausalLM.from_pretrained(folder / "english")
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.config.num_hidden_layers += 1
    model.save_pretrained(folder / "deep")
    shutil.copy(folder / "base" / "tokenizer.json", folder / "deep")
    refused(
        configuration(genome={"models": ["deep", "english"]}),
        tmp_path / "run",
        ConfigError,
        "deep has 5 layers, the base 4",
    )


def test_a_heldout_item_that_cannot_be_asked_is_named_before_the_search(world, tmp_path):
    folder, configuration = world
    lines = (folder / "english.jsonl").read_text().splitlines()
    for position in range(len(lines)):  # whichever items are held out, one of them is too long
        item = json.loads(lines[position])
        text = "\n".join(lines[:position] + [json.dumps(item | {"prompt": "one " * 500})] + lines[position + 1 :])
        (folder / "english.jsonl").write_text(text + "\n")
        if item["id"] in {i.id for i in load_questions(load_config(configuration())).heldout}:
            break
    refused(configuration(), tmp_path / "run", ItemsError, rf"{item['id']}.*tokens")


SETTINGS = {
    "num_fewshot": (dict(num_fewshot=3), "num_fewshot: 3: items of a file bring their worked examples in the prompt"),
    "multiturn": (dict(fewshot_as_multiturn=True), "fewshot_as_multiturn: True: items of a file bring"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_would_change_nothing_are_refused_by_name(world, case):
    _, configuration = world
    change, message = SETTINGS[case]
    with pytest.raises(ConfigError, match=message):
        load_config(configuration(**change))
    load_config(configuration(num_fewshot=0, fewshot_as_multiturn=False))


def test_limit_and_shuffle_take_effect(world):
    _, configuration = world
    asked = lambda **changes: load_questions(load_config(configuration(**changes))).subset
    everything, first, mixed = asked(), asked(limit=5), asked(limit=5, shuffle=True)
    assert len(first) == len(mixed) == 10 and {i.id for i in first} != {i.id for i in mixed}
    assert mixed == asked(limit=5, shuffle=True)
    tasks = [{"items": "./english.jsonl", "limit": 3}, {"items": "./translation.jsonl"}]
    own = asked(tasks=tasks)
    assert len(own) == 3 + len([i for i in everything if i.task == "translation"])


def test_a_base_called_base_is_found_beside_the_configuration(world, tmp_path, monkeypatch):
    folder, configuration = world
    monkeypatch.chdir(tmp_path)
    config = load_config(configuration())
    assert config.genome.base_model == str(folder / "base")


def test_a_run_whose_folder_was_moved_resumes_to_the_same_bits(world, tmp_path):
    folder, configuration = world
    few = {"extract": {"method": "random", "size": 4}, "optimizer": {"budget": 12, "population": 6, "seed": 3}}
    configuration(**few)

    class Stop:
        """True from the seventh candidate on."""

        def __init__(self):
            self.asked = 0

        def __call__(self):
            self.asked += 1
            return self.asked >= 7

    from merge3.engine import LocalEngine
    from merge3.search.journal import Journal
    from merge3.search.questions import load_questions
    from merge3.search.run import run as whole_run

    def search(directory, config, stop=lambda: False, resume=False):
        engine = LocalEngine(run.open_pool(config.models, quiet=True))
        with closing(Journal(directory)) as journal:
            outcome = whole_run(config, load_questions(config), engine, journal, resume, stop=stop)
            rows = [(c.genome.tobytes(), c.responses.tobytes(), c.value) for c in journal.candidates()]
        return outcome, rows

    undisturbed, expected = search(tmp_path / "undisturbed", load_config(folder / "evolve.yaml"))
    assert search(folder / "run", load_config(folder / "evolve.yaml"), Stop())[0] is None
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    folder.rename(moved)
    outcome, rows = search(moved / "run", load_config(moved / "evolve.yaml"), resume=True)
    assert rows == expected and outcome.heldout == undisturbed.heldout
    best = Recipe.from_yaml(moved / "run" / "best.yaml")
    assert all(str(m).startswith(str(moved)) for m in best.models())


def test_no_export_announces_no_model(world, tmp_path):
    folder, configuration = world
    done = client("evolve", configuration(), "--run-dir", tmp_path / "run", "--no-export")
    assert done.returncode == 0, done.stderr
    said = "".join(done.stdout.split())  # the terminal's width breaks lines anywhere
    assert "best.yaml" in said and "run/model" not in said and not (tmp_path / "run" / "model").exists()


def test_default_merges_that_these_models_do_not_allow_are_left_out_aloud(world, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, configuration = world
    model = AutoModelForCausalLM.from_pretrained(folder / "english")
    model.resize_token_embeddings(model.config.vocab_size + 2)
    model.save_pretrained(folder / "wide")
    shutil.copy(folder / "base" / "tokenizer.json", folder / "wide")
    with pytest.warns(UserWarning, match=r"baseline uniform_linear is left out: .*embed_tokens\.weight.: shape"):
        result = run.evolve(
            load_config(configuration(genome={"models": ["wide", "italian"]})),
            tmp_path / "run",
            quiet=True,
            export=False,
        )
    assert "uniform_linear" not in result["baselines"] and {"ties", "wide"} <= set(result["baselines"])


def test_version():
    from merge3 import __version__

    done = client("--version")
    assert done.returncode == 0 and done.stdout == f"merge3-client {__version__}\n"


def test_a_missing_item_file_is_bad_input(world):
    _, configuration = world
    with pytest.raises(BadInput, match="none.jsonl"):
        load_questions(load_config(configuration(tasks=[{"items": "./none.jsonl"}])))


def test_a_baseline_without_logits_is_left_out_aloud(world, tmp_path, monkeypatch):
    """One broken endpoint does not take a finished search its winner."""
    from merge3.engine import LocalEngine
    from merge3.tasks import LogitsError

    _, configuration = world
    asked = LocalEngine.evaluate

    def evaluate(self, registration, subjects):
        for subject, evaluation in zip(subjects, asked(self, registration, subjects)):
            if isinstance(subject, str) and subject.endswith("italian"):
                evaluation = replace(evaluation, error=LogitsError("italian: item 'q'", "the model's logits are NaN"))
            yield evaluation

    monkeypatch.setattr(LocalEngine, "evaluate", evaluate)
    with pytest.warns(UserWarning, match="baseline italian is left out: italian: item"):
        result = run.evolve(load_config(configuration()), tmp_path / "run", quiet=True, export=False)
    assert "italian" not in result["baselines"] and "english" in result["baselines"]
