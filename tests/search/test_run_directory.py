"""What lies in a run directory: nothing of the user's is taken for a run's or lost, and one process works there."""

import json
import os
import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from merge3.client import run
from merge3.client.run_directory import is_export
from merge3.engine import LocalEngine
from merge3.errors import BadInput, ResourceError, ResumeMismatch
from merge3.files import Held
from merge3.recipe import ModelRef, Recipe
from merge3.search.config_files import load_config
from merge3.search.identity import beside, versions
from merge3.tasks import Item
from tests.commands import client

FEW = {"optimizer": {"budget": 4, "population": 4, "seed": 3}, "limit": 4, "heldout": {"fraction": 0.2}}
SEVERAL = {"objectives": ["english", "length"], "optimizer": FEW["optimizer"] | {"name": "nsga2"}}


def configured(folder, name="few.yaml", **changes):
    data = yaml.safe_load((folder / "evolve.yaml").read_text()) | FEW | changes
    (folder / name).write_text(yaml.safe_dump(data))
    return folder / name


@pytest.fixture(scope="module")
def world(tiny_world, tmp_path_factory):
    return shutil.copytree(tiny_world, tmp_path_factory.mktemp("directories") / "world")


@pytest.fixture(scope="module")
def finished(world):
    """(configuration, directory, result) of a run that has ended."""
    config = load_config(configured(world))
    return config, world / "run", run.evolve(config, world / "run", quiet=True)


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "run")


class Killed(BaseException):
    """kill -9, as far as what is on disk goes."""


@pytest.fixture
def asked(monkeypatch):
    """A list of every subject that is asked; what is put in its `.after` is done once so many have been."""
    evaluate = LocalEngine.evaluate

    class Asked(list):
        after = {}

    found = Asked()

    def counting(self, registration, subjects):
        for subject, evaluation in zip(subjects, evaluate(self, registration, subjects)):
            found.append(subject)
            if len(found) in found.after:
                found.after[len(found)]()
            yield evaluation

    monkeypatch.setattr(LocalEngine, "evaluate", counting)
    return found


def journal(directory):
    with closing(sqlite3.connect(directory / "run.db")) as db:
        tables = "SELECT genome, responses FROM candidates ORDER BY arrived", "SELECT * FROM answers ORDER BY 1, 2"
        return [db.execute(table).fetchall() for table in tables]


# -- what was there before


@pytest.mark.parametrize("name", ["model/config.json", "front/1.yaml", "elites/a", "parameters/a", "config.yaml"])
def test_what_a_new_run_would_take_or_replace_is_refused_before_it_begins(finished, tmp_path, name):
    config, *_ = finished
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    message = rf"holds {file.relative_to(tmp_path).parts[0]}, and no run that has begun; expected a new directory"
    with pytest.raises(ResumeMismatch, match=message):
        run.evolve(config, tmp_path, quiet=True)
    assert file.read_text() == "mine" and not (tmp_path / "run.db").exists()


def test_a_finished_run_without_its_journal_is_not_begun_anew_in_its_place(finished, copied):
    config, *_ = finished
    (copied / "run.db").unlink()
    with pytest.raises(ResumeMismatch, match=r"holds model, best\.yaml, result\.json, config\.yaml, report\.html"):
        run.evolve(config, copied, quiet=True)


def test_other_files_of_the_users_may_lie_there(own_world):
    """The configuration, its items and its models among them."""
    config = configured(own_world)
    before = {file: file.read_bytes() for file in own_world.rglob("*") if file.is_file()}
    run.evolve(load_config(config), own_world, quiet=True, export=False)
    assert all(file.read_bytes() == content for file, content in before.items())


def test_a_model_that_is_not_the_runs_is_neither_taken_nor_deleted(finished, copied):
    config, _, result = finished
    recipe = yaml.safe_load((copied / "model" / "mergekit_config.yml").read_text())
    recipe["slices"][0]["sources"][0]["parameters"] = {"weight": 0.125}
    (copied / "model" / "mergekit_config.yml").write_text(yaml.safe_dump(recipe))
    (copied / "result.json").unlink()
    with pytest.raises(ResumeMismatch, match=r"run/model: there, and no merge of this run; .*move it away"):
        run.evolve(config, copied, resume=True, quiet=True)
    told = json.loads((copied / "result.json").read_text())
    assert told["heldout_detail"] == result["heldout_detail"]  # nothing is lost for it
    done = client("evolve", config_file(finished), "--run-dir", copied, "--resume", "--no-export")
    said = "".join(done.stdout.split())
    assert done.returncode == 0 and "best.yaml" in said and "run/model" not in said, done.stderr
    (copied / "model" / "mergekit_config.yml").unlink()
    with pytest.raises(ResumeMismatch, match="no merge of this run"):
        run.evolve(config, copied, resume=True, quiet=True)
    assert (copied / "model" / "model.safetensors").exists()


def config_file(finished):
    return finished[1].parent / "few.yaml"


def test_the_runs_own_model_stays(finished, copied):
    config, *_ = finished
    (copied / "model" / "mine.txt").write_text("a note")
    done = client("evolve", config_file(finished), "--run-dir", copied, "--resume")
    assert done.returncode == 0 and "run/model" in "".join(done.stdout.split()), done.stderr
    assert (copied / "model" / "mine.txt").read_text() == "a note"


def test_an_export_is_known_by_its_recipe_where_models_have_moved(finished):
    _, directory, _ = finished
    model, recipe = directory / "model", Recipe.from_yaml(directory / "best.yaml")
    assert is_export(model, recipe)
    moved = recipe.renamed(lambda ref: ModelRef(ref.path.replace("/world/", "/elsewhere/")))
    assert moved != recipe and is_export(model, moved)
    first, second, *_ = recipe.models()[1:]
    swapped = recipe.renamed(lambda ref: {first: second, second: first}.get(ref, ref))
    other = recipe.renamed(lambda ref: ModelRef(f"{ref.path}-2"))
    assert not is_export(model, swapped) and not is_export(model, other) and not is_export(directory, recipe)


def test_another_pick_takes_the_place_of_a_member_and_of_nothing_else(world, tmp_path):
    config = load_config(configured(world, "several.yaml", **SEVERAL))
    result = run.evolve(config, tmp_path / "run", quiet=True, export=False)
    model, members = tmp_path / "run" / "model", len(result["front"]["members"])
    model.mkdir()
    (model / "mine.txt").write_text("mine")
    (tmp_path / "run" / "front" / "mine.txt").write_text("mine")
    with pytest.raises(ResumeMismatch, match="run/model: there, and no merge of this run"):
        run.evolve(config, tmp_path / "run", resume=True, quiet=True, pick=str(members))
    assert (model / "mine.txt").read_text() == "mine"
    shutil.rmtree(model)
    (tmp_path / "disk").mkdir()
    model.symlink_to(tmp_path / "disk")  # where there is more room
    run.evolve(config, tmp_path / "run", resume=True, quiet=True)
    run.evolve(config, tmp_path / "run", resume=True, quiet=True, pick=str(members))
    assert is_export(tmp_path / "disk", Recipe.from_yaml(tmp_path / "run" / "front" / f"{members:02}.yaml"))
    assert model.is_symlink() and not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    assert (tmp_path / "run" / "front" / "mine.txt").exists()


# -- one process


def test_a_second_process_is_refused_before_it_reads_a_model(finished, copied, monkeypatch):
    config, *_ = finished
    monkeypatch.setattr(run, "open_engine", None)
    before = journal(copied)
    with Held(copied), pytest.raises(ResourceError, match="run: in use by another process; expected one at a time"):
        run.evolve(config, copied, resume=True, quiet=True)
    assert journal(copied) == before


def test_a_run_holds_its_directory_until_it_ends(finished, tmp_path, asked):
    config, *_ = finished

    def other():
        with pytest.raises(ResourceError, match="in use"):
            Held(tmp_path / "run")

    asked.after = {1: other, 8: other}
    run.evolve(config, tmp_path / "run", quiet=True, export=False)
    assert len(asked) > 8
    Held(tmp_path / "run").close()


def test_a_process_that_is_killed_holds_nothing(tmp_path):
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        held = Held(tmp_path)
        os.write(tell, b"x")
        signal.pause()
        held.close()
    os.read(ready, 1)
    with pytest.raises(ResourceError, match="in use"):
        Held(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    Held(tmp_path).close()


# -- what a journal is continued with


def changed(file, **keys):
    """A change that every reader would take, and that says something else."""
    data = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(data | keys, indent=1))


def test_a_base_that_is_read_otherwise_is_not_the_runs_any_more(own_world, tmp_path):
    config = load_config(configured(own_world))
    base, directory = own_world / "base", own_world / "run"
    run.evolve(config, directory, quiet=True, export=False)
    again = lambda: run.evolve(config, directory, resume=True, quiet=True, export=False)
    changed(base / "config.json", transformers_version="0.0", _name_or_path="elsewhere")  # who wrote it, no more
    again()
    for name, keys in (
        ("config.json", {"rope_theta": 7.0}),
        ("generation_config.json", {"temperature": 0.5}),
        ("tokenizer_config.json", {"model_max_length": 77}),
        ("chat_template.json", {"chat_template": "{{ messages }}"}),
    ):
        before = (base / name).read_bytes() if (base / name).exists() else None
        changed(base / name, **keys)
        with pytest.raises(ResumeMismatch, match=rf"the base's {name} is .*, was .* when the run began; expected"):
            again()
        (base / name).write_bytes(before) if before is not None else (base / name).unlink()
    again()


def test_a_run_that_an_earlier_version_began_goes_on(finished, copied):
    config, _, expected = finished
    with closing(sqlite3.connect(copied / "run.db")) as db:
        db.execute("DELETE FROM run WHERE key IN ('files', 'images', 'documents', 'torch', 'transformers')")
        db.execute("DELETE FROM answers")
        db.commit()
    assert run.evolve(config, copied, resume=True, quiet=True) == expected


def test_images_count_by_what_is_in_them(tmp_path):
    items = [Item(f"{i}", "dots", "classify", "", 0, image=str(tmp_path / f"{i}.png")) for i in range(3)]
    for number, item in enumerate(items):
        Path(item.image).write_bytes(bytes([number]))
    questions = SimpleNamespace(search=items[:2], heldout=items[2:], judged={"sums": "d"})
    info = SimpleNamespace(host="local", files={"the base's config.json": "a"})
    search = SimpleNamespace(questions=questions, engine=SimpleNamespace(info=lambda: info))
    first = beside(search)
    assert first["files"] == info.files and set(first["images"]) == {"the images of task 'dots'"}
    assert beside(search) == first
    Path(items[2].image).write_bytes(b"other")
    assert beside(search)["images"] != first["images"]
    info.host = "elsewhere:50051"  # where the images lie, too
    assert not beside(search)["images"] and set(versions(search)) == set()


# -- held-out answers are kept


def test_a_run_killed_while_it_measures_asks_on_from_there(finished, tmp_path, asked):
    config, directory, expected = finished

    def die():
        raise Killed

    asked.after = {4 + 3: die}  # candidates, and three that are measured
    with pytest.raises(Killed):
        run.evolve(config, tmp_path / "run", quiet=True, export=False)
    asked.after = {}
    before = len(asked)
    result = run.evolve(config, tmp_path / "run", resume=True, quiet=True, export=False)
    assert len(asked) - before == len(expected["baselines"]) + 1 - 2
    assert {k: v for k, v in result.items() if "second" not in k and k != "swap_share"} == {
        k: v for k, v in expected.items() if "second" not in k and k != "swap_share"
    }
    assert journal(tmp_path / "run") == journal(directory)


def test_a_finished_run_that_is_resumed_asks_nothing(finished, copied, asked):
    config, _, expected = finished
    assert run.evolve(config, copied, resume=True, quiet=True) == expected and not asked


def test_one_interrupt_stops_the_measuring(finished, tmp_path, asked):
    config, _, expected = finished
    asked.after = {4 + 3: lambda: os.kill(os.getpid(), signal.SIGINT)}
    assert run.evolve(config, tmp_path / "run", quiet=True, export=False) is None
    assert len(asked) == 4 + 3 and not (tmp_path / "run" / "result.json").exists()
    asked.after = {}
    result = run.evolve(config, tmp_path / "run", resume=True, quiet=True, export=False)
    assert result["baselines_detail"] == expected["baselines_detail"]
    assert len(asked) == 4 + len(expected["baselines"]) + 1


def test_what_was_measured_is_there_when_the_export_fails(finished, tmp_path, monkeypatch):
    config, _, expected = finished

    def full(self, *arguments):
        raise ResourceError("model", "the disk is full")

    monkeypatch.setattr(LocalEngine, "export", full)
    with pytest.raises(ResourceError, match="full"):
        run.evolve(config, tmp_path / "run", quiet=True)
    told = json.loads((tmp_path / "run" / "result.json").read_text())
    assert told["baselines"] == expected["baselines"] and told["heldout"] == expected["heldout"]


def test_a_member_that_cannot_be_picked_is_refused_before_anything_is_measured(world, tmp_path, asked):
    config = load_config(configured(world, "several.yaml", **SEVERAL))
    with pytest.raises(BadInput, match=r"--pick: found '0'; expected a member's number"):
        run.evolve(config, tmp_path / "run", quiet=True, pick="0")
    assert not asked
    with pytest.raises(BadInput, match=r"--pick: found 77; expected 1 to \d, the front's members"):
        run.evolve(config, tmp_path / "run", quiet=True, pick="77")
    assert len(asked) == 4
    run.evolve(config, tmp_path / "run", resume=True, quiet=True, export=False, pick="1")
    count = len(asked)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch, pytest.raises(BadInput, match=r"--pick: found 78; expected 1 to \d"):
        patch.setattr(run, "open_engine", None)  # result.json tells the front: no model is opened
        run.evolve(config, tmp_path / "run", resume=True, quiet=True, pick="78")
    assert len(asked) == count
