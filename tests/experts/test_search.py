"""A search over compacted experts: what it says of them, what its result is of, and that it is no other run's."""

import json
import shutil
import warnings

import numpy as np
import pytest
import yaml

from merge3.client import run
from merge3.engine import LocalEngine
from merge3.errors import ConfigError, Merge3Warning, ResumeMismatch
from merge3.pool import Pool
from merge3.search import compaction
from merge3.search.config_files import load_config
from merge3.search.questions import load_questions
from merge3.tasks import Item
from tests.asking import answers
from tests.commands import client


def variant(world, name, **changes):
    data = yaml.safe_load((world / "evolve.yaml").read_text())
    data["optimizer"] |= {"budget": 6, "population": 6}
    (world / f"{name}.yaml").write_text(yaml.safe_dump(data | changes))
    return world / f"{name}.yaml"


def alone(folder, items):
    """What a checkpoint answers by itself."""
    return answers(LocalEngine(Pool.open(str(folder), [])), str(folder), items)


@pytest.fixture(scope="module")
def world(solving_world, tmp_path_factory):
    return shutil.copytree(solving_world, tmp_path_factory.mktemp("held") / "world")


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """(its directory, its result)"""
    directory = tmp_path_factory.mktemp("run") / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Merge3Warning)
        result = run.evolve(load_config(variant(world, "held", experts="residual:0.1")), directory, quiet=True)
    return directory, result


def test_the_result_says_what_was_held_and_what_was_lost(finished, world):
    directory, result = finished
    said = result["experts"]
    assert said["option"] == "residual:0.1" and [loss["model"] for loss in said["loss"]] == list(result["models"])[1:]
    assert all(0.09 < loss["kept"] < 0.11 and 0.1 < loss["energy"] < 0.9 for loss in said["loss"])
    assert all(loss["error"] == pytest.approx((1 - loss["energy"]) ** 0.5) for loss in said["loss"])
    tasks = {"english", "translation"}
    assert all(check["task"] in tasks and check["items"] == 28 for check in said["endpoints"])
    assert said["answers"] == (1 + 2 * 3) * 56  # the base, and every expert both ways; beside the ledger
    assert json.loads((directory / "result.json").read_text())["experts"] == said
    page = (directory / "report.html").read_text()
    assert "searched with experts as residual:0.1" in page and "relative error" in page
    assert "# searched with experts held as residual:0.1" in (directory / "best.yaml").read_text()
    assert "experts: residual:0.1" in (directory / "config.yaml").read_text()


def test_held_out_accuracy_is_of_the_exported_model(finished, world):
    """The table has what the checkpoint answers; what was searched is another merge, and stands beside it."""
    directory, result = finished
    held = load_questions(load_config(world / "held.yaml")).heldout
    own = alone(directory / "model", held)
    assert result["heldout_detail"]["tasks"] == pytest.approx(
        {task: np.mean([a for a, i in zip(own, held) if i.task == task]) for task in ("english", "translation")}
    )
    english = alone(world / "english", held)  # an endpoint is what its folder has, too
    found = result["baselines_detail"]["english"]["tasks"]["english"]
    assert found == pytest.approx(np.mean([a for a, i in zip(english, held) if i.task == "english"]))
    assert set(result["experts"]["searched_heldout"]) == {"accuracy", "stderr", "tasks"}


def test_another_option_is_another_run(finished, world):
    directory, _ = finished
    for asked, said in (("int8", "int8"), ("full", "full")):
        config = load_config(variant(world, "other", experts=asked))
        message = f"experts is {said}, was residual:0.1 when the run began; expected the same"
        with pytest.raises(ResumeMismatch, match=message):
            run.evolve(config, directory, resume=True, quiet=True)
    with pytest.raises(ResumeMismatch, match="experts is full, was residual:0.1"):
        run.evolve(load_config(variant(world, "plain")), directory, resume=True, quiet=True)


def test_a_resumed_run_asks_no_expert_again(finished, world, monkeypatch):
    directory, result = finished
    asked = []
    search_answers = compaction.Search.answers
    monkeypatch.setattr(
        compaction.Search,
        "answers",
        lambda self, subject, items: asked.append(subject) or search_answers(self, subject, items),
    )
    again = run.evolve(load_config(world / "held.yaml"), directory, resume=True, quiet=True)
    assert again["experts"] == result["experts"]
    assert not [s for s in asked if getattr(s, "stored", None) is False]


def test_a_loss_beyond_chance_is_a_warning_and_strict_an_error(world, tmp_path):
    """A thousandth of what they change is too little for these experts."""
    config = variant(world, "little", experts="residual:0.001")
    with pytest.warns(
        Merge3Warning, match=r"english as residual:0.001: .*more than two standard errors; a higher density"
    ):
        result = run.evolve(load_config(config), tmp_path / "run", quiet=True, export=False)
    (english,) = [check for check in result["experts"]["endpoints"] if check["model"].endswith("english")]
    assert english["loss"] > 2 * english["stderr"] and english["stored"] > english["held"]
    done = client("evolve", config, "--run-dir", tmp_path / "strict", "--strict", "--quiet", "--no-export")
    assert done.returncode == 2 and "more than two standard errors" in done.stderr and "Traceback" not in done.stderr


def test_nothing_is_asked_where_nothing_is_lost(world, tmp_path):
    config = load_config(variant(world, "all", experts="residual:1"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Merge3Warning)
        result = run.evolve(config, tmp_path / "run", quiet=True, export=False)
    plain = run.evolve(load_config(variant(world, "plain")), tmp_path / "plain", quiet=True, export=False)
    assert result["experts"]["endpoints"] == [] and result["experts"]["searched_heldout"] is None
    assert "experts" not in plain
    for key in ("recipe_hash", "search_value", "heldout_detail", "baselines_detail"):
        assert result[key] == plain[key], key


def test_an_expert_is_compared_on_the_task_it_gains_most_on():
    items = [Item(id=str(i), kind="choice", task=task, prompt="p", answer=0) for task in ("a", "b") for i in range(4)]
    base, stored = np.array([1, 0, 1, 0, 0, 0, 0, 0.0]), np.array([1, 1, 1, 0, 1, 1, 1, 0.0])
    found = compaction._held("m", items, base, stored, np.array([0, 0, 0, 0, 1, 0, 0, 0.0]))
    assert (found.task, found.items, found.stored, found.held, found.loss) == ("b", 4, 0.75, 0.25, 0.5)
    assert found.stderr == pytest.approx(np.std([0, 1, 1, 0], ddof=1) / 2) and not found.loses
    assert compaction._held("m", items, base, stored, base * 0).loses


def test_bad_input_is_one_line(world, tmp_path):
    items = world / "english.jsonl"
    recipe = tmp_path / "ties.yaml"
    sources = [{"model": str(world / name), "parameters": {"weight": 0.5}} for name in ("english", "italian")]
    recipe.write_text(yaml.safe_dump({"merge_method": "ties", "base_model": str(world / "base"), "models": sources}))
    config = variant(world, "held2")
    cases = {
        ("evolve", config, "--run-dir", tmp_path / "run", "--experts", "residual:0"): "--experts: found 'residual:0'",
        (
            "evolve",
            config,
            "--run-dir",
            tmp_path / "run",
            "--experts",
            "half",
        ): "--experts: found 'half'; expected full, int8",
        ("evaluate", recipe, items, "--experts", "int9"): "--experts: found 'int9'",
        ("evaluate", world / "english", items, "--experts", "int8"): "which is one model; expected a recipe",
    }
    for words, said in cases.items():
        done = client(*words)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done
    stages = load_config(variant(world, "stages", experts="int8", stages=["parameters", "path"]))
    with pytest.raises(ConfigError, match="stages: stages with experts held as int8; expected full"):
        run.evolve(stages, tmp_path / "stages", quiet=True)
    with pytest.raises(ConfigError, match=r"experts.*residual:7.*expected full, int8"):
        load_config(variant(world, "bad", experts="residual:7"))


def test_a_recipe_is_evaluated_as_it_is_held(world, tmp_path):
    recipe = tmp_path / "ties.yaml"
    sources = [{"model": str(world / name), "parameters": {"weight": 0.5}} for name in ("english", "italian")]
    recipe.write_text(yaml.safe_dump({"merge_method": "ties", "base_model": str(world / "base"), "models": sources}))
    done = client("evaluate", recipe, world / "english.jsonl", "--limit", 10, "--experts", "residual", "--json")
    assert done.returncode == 0 and "english as residual:0.1: 10 % of parameters kept" in done.stderr
    assert json.loads(done.stdout)["experts"]["option"] == "residual:0.1"
    alone = client("evaluate", recipe, world / "english.jsonl", "--limit", 10, "--experts", "int8", "--json")
    how = "--items", world / "english.jsonl", "--limit", 10, "--experts", "int8", "--json"
    done = client("compare", recipe, *how)
    assert done.returncode == 0, done.stderr
    compared, (row,) = json.loads(done.stdout), [r for r in json.loads(done.stdout)["rows"] if r["kind"] == "merge"]
    assert compared["experts"]["option"] == "int8" and row["accuracy"] == json.loads(alone.stdout)["accuracy"]
