"""A search on a daemon is the search in this process, also when the daemon dies in the middle of it."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import yaml

from merge3.client import run
from merge3.client.channel import Target
from merge3.client.remote import RemoteEngine
from merge3.engine import LocalEngine
from merge3.errors import BadInput, Merge3Error, NotFound, RecipeError, ResumeMismatch, Unavailable
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.search.config_files import load_config
from merge3.search.questions import load_questions
from tests.asking import answers
from tests.commands import client


def journal(directory):
    with sqlite3.connect(directory / "run.db") as db:
        rows = "SELECT generation, position, genome, recipe_hash, responses, error FROM candidates ORDER BY 1, 2"
        others = ("SELECT * FROM estimates ORDER BY 1, 2, 3", "SELECT * FROM answers ORDER BY 1, 2")
        return [db.execute(query).fetchall() for query in (rows, *others)]


def variant(tiny_world, name, **changes):
    data = yaml.safe_load((tiny_world / "evolve.yaml").read_text())
    for key, value in changes.items():
        data[key] = data.get(key, {}) | value if isinstance(value, dict) else value
    (tiny_world / f"{name}.yaml").write_text(yaml.safe_dump(data))
    return tiny_world / f"{name}.yaml"


VARIANTS = {
    "all-items": {},
    "random-renewed": {
        "extract": {"method": "random", "size": 8},
        "optimizer": {"budget": 18, "population": 6, "seed": 1},
    },
    "calibrated": {
        "extract": {"method": "irt", "size": 8},
        "estimate": {"models": 8, "check_every": 1},
        "optimizer": {"budget": 18, "population": 6, "seed": 1},
    },
    # what the recipe comes to is found here, with the layout that the daemon tells
    "started": {
        "genome": {"start": "hand.yaml"},
        "extract": {"method": "irt", "size": 8},
        "estimate": {"models": 4},
        "optimizer": {"budget": 6, "population": 6, "seed": 1},
    },
    # what is learned first is learned there, and every tensor has a weight of its own
    "fitted": {
        "genome": {"merge_method": "task_arithmetic"},
        "fit": {"steps": 3, "per_task": 4, "batch": 2},
        "extract": {"method": "random", "size": 8},
        "optimizer": {"budget": 12, "population": 6, "seed": 1},
    },
    # DELLA refuses some densities: failed candidates fail with the same words
    "failing": {
        "genome": {"merge_method": "della", "genes": ["weight", "density"]},
        "optimizer": {"budget": 12, "population": 6, "seed": 2},
    },
    # what was written crosses, too: of candidates, checks, the race and held-out items
    "two-objectives": {
        "objectives": ["english", "length"],
        "extract": {"method": "irt", "size": 8},
        "estimate": {"models": 4, "check_every": 1},
        "race": {"share": 1.0},
        "optimizer": {"name": "nsga2", "budget": 12, "population": 6, "seed": 1},
    },
    "random-keeps": {
        "genome": {"merge_method": "dare_ties", "dtype": "bfloat16"},
        "optimizer": {"budget": 6, "population": 6, "seed": 9},
    },
}


@pytest.fixture(scope="module")
def embedded(tiny_world, tmp_path_factory):
    """name -> (configuration, directory, result) of the run in this process, made once."""
    made = {}
    weights = [{"filter": "mlp", "value": 0.25}, {"value": [0.75, 0.5]}]
    models = [{"model": f"./{m}", "parameters": {"weight": weights}} for m in ("english", "italian", "translation")]
    hand = {"merge_method": "ties", "base_model": "./base", "models": models, "parameters": {"density": 0.5}}
    (tiny_world / "hand.yaml").write_text(yaml.safe_dump(hand))

    def run_once(name):
        if name not in made:
            config, directory = (
                load_config(variant(tiny_world, name, **VARIANTS[name])),
                tmp_path_factory.mktemp(name) / "run",
            )
            made[name] = config, directory, run.evolve(config, directory, quiet=True)
        return made[name]

    return run_once


@pytest.mark.parametrize("name", VARIANTS)
def test_remote_and_embedded_journals_are_identical(daemon, embedded, tmp_path, name):
    config, directory, local = embedded(name)
    remote = run.evolve(config, tmp_path / "remote", quiet=True, target=Target(daemon.address))
    assert journal(directory) == journal(tmp_path / "remote")
    for file in ("best.yaml", "model/model.safetensors", "model/config.json", "model/tokenizer.json"):
        assert (directory / file).read_bytes() == (tmp_path / "remote" / file).read_bytes(), file
    timeless = lambda result: {k: v for k, v in result.items() if k not in ("seconds", "swap_share")}
    assert timeless(local) == timeless(remote)
    assert (tmp_path / "remote" / "report.html").exists()
    if name == "failing":
        assert local["failed"] > 0


def test_the_command_with_server_and_a_resume_across(daemon, embedded, tiny_world, tmp_path):
    """Begun on a daemon, stopped, continued embedded: the journal of neither alone."""
    _, whole, _ = embedded("all-items")
    config = tiny_world / "all-items.yaml"
    arguments = ["evolve", str(config), "--run-dir", str(tmp_path / "run"), "--json"]
    command = [sys.executable, "-m", "merge3.client", *arguments, "--server", daemon.address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("{") and json.loads(line)["done"] >= 8 and json.loads(line)["stage"] == "search":
            process.send_signal(signal.SIGINT)
            break
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in said
    done = client(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert journal(whole) == journal(tmp_path / "run")


@pytest.mark.parametrize("port", [pytest.param("tcp", marks=pytest.mark.heavy), "unix"])
def test_kill_9_of_the_daemon_in_mid_generation(embedded, tiny_world, tmp_path, start_process, free_port, port):
    address = f"127.0.0.1:{free_port}" if port == "tcp" else f"unix:{tmp_path}/merge3.sock"
    options = ("--root", tiny_world, "--listen", address)
    config, undisturbed, _ = embedded("calibrated" if port == "tcp" else "random-renewed")
    daemons, killed = [start_process(*options)], []
    kills = (3, 9, 14) if port == "tcp" else (8,)  # inside the first, second and third generation of six

    def kill_and_restart():
        store = tmp_path / "run" / "run.db"
        for after in kills:
            while not store.exists() or count(store) < after:
                time.sleep(0.002)
            daemons[-1].kill()
            killed.append(count(store))
            daemons.append(start_process(*options))

    def count(store):
        try:
            with sqlite3.connect(store) as db:
                return db.execute("SELECT COUNT(*) FROM candidates").fetchone()[0]
        except sqlite3.OperationalError:
            return 0

    killer = threading.Thread(target=kill_and_restart, daemon=True)
    killer.start()
    run.evolve(config, tmp_path / "run", quiet=True, target=Target(address))
    killer.join(120)
    assert len(killed) == len(kills)
    assert journal(undisturbed) == journal(tmp_path / "run")
    assert (undisturbed / "best.yaml").read_bytes() == (tmp_path / "run" / "best.yaml").read_bytes()


def test_a_wrong_address_is_told_at_once_and_patience_ends(tiny_world, start, free_port):
    config = load_config(tiny_world / "evolve.yaml")
    with pytest.raises(
        Unavailable, match=f"daemon 127.0.0.1:{free_port}: does not answer; expected merge3-server serve"
    ):
        RemoteEngine(f"127.0.0.1:{free_port}", config.models)
    daemon, notes = start(tiny_world, listen=f"127.0.0.1:{free_port}"), []
    engine = RemoteEngine(daemon.address, config.models, patience=1.5, note=notes.append)
    items = load_questions(config).subset[:4]
    assert len(answers(engine, config.models[0], items)) == 4
    daemon.kill()
    began = time.monotonic()
    with pytest.raises(Unavailable):
        answers(engine, config.models[0], items)
    assert 1.4 < time.monotonic() - began < 10
    assert len(notes) == 1 and "is away" in notes[0]


def test_the_pool_that_comes_back_must_be_the_same(tiny_world, tmp_path, start, free_port):
    shutil.copytree(tiny_world / "base", tmp_path / "base")
    shutil.copytree(tiny_world / "english", tmp_path / "expert")
    daemon = start(tmp_path, listen=f"127.0.0.1:{free_port}")
    engine = RemoteEngine(daemon.address, ["base", "expert"], note=lambda text: None)
    items = load_questions(load_config(tiny_world / "evolve.yaml")).subset[:4]
    answers(engine, "expert", items)
    daemon.kill()
    (tmp_path / "expert" / "model.safetensors").unlink()  # the daemon that ended has mapped it
    shutil.copy(tiny_world / "italian" / "model.safetensors", tmp_path / "expert")
    start(tmp_path, listen=f"127.0.0.1:{free_port}")
    with pytest.raises(ResumeMismatch, match="expert has other weights than before"):
        answers(engine, "expert", items)


def test_a_base_that_comes_back_is_read_as_it_was(tiny_world, tmp_path, start, free_port):
    shutil.copytree(tiny_world / "base", tmp_path / "base")
    daemon = start(tmp_path, listen=f"127.0.0.1:{free_port}")
    engine = RemoteEngine(daemon.address, ["base"], note=lambda text: None)
    assert engine.info().files == LocalEngine(Pool.open(str(tmp_path / "base"), [])).info().files
    assert "the base's tokenizer.json" in engine.info().files
    daemon.kill()
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    start(tmp_path, listen=f"127.0.0.1:{free_port}")
    with pytest.raises(ResumeMismatch, match=r"the base's config\.json has changed; expected the files the run began"):
        answers(engine, "base", load_questions(load_config(tiny_world / "evolve.yaml")).subset[:1])


def test_errors_are_the_same_class_and_words_on_both_sides(daemon, tiny_world, tmp_path):
    config = load_config(tiny_world / "evolve.yaml")
    items = load_questions(config).subset[:4]
    local = LocalEngine(Pool.open(config.models[0], config.models[1:]))
    remote = RemoteEngine(daemon.address, config.models)
    bad = {
        "merge_method": "ties",
        "base_model": config.models[0],
        "models": [{"model": config.models[1], "parameters": {"density": 7}}],
    }
    unknown = bad | {"models": [{"model": "/nowhere", "parameters": {"weight": 1.0}}]}
    seen = []
    for what in (Recipe.parse(bad), Recipe.parse(unknown)):
        both = []
        for engine in (local, remote):
            with pytest.raises(Merge3Error) as caught:
                answers(engine, what, items)
            both.append((type(caught.value), str(caught.value)))
        assert both[0] == both[1]
        seen.append(both[0][0])
    assert RecipeError in seen
    with pytest.raises(Merge3Error) as caught:
        answers(remote, config.models[1], [items[0].__class__("x", "t", "classify", "p", 0, metric="acc")])
    assert "classify" in str(caught.value)
    with pytest.raises(NotFound, match="no such directory below the daemon's roots"):
        RemoteEngine(daemon.address, ["base", "nowhere"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(BadInput, match="exists and is not empty"):
        remote.export(Recipe.parse(bad), tmp_path / "full")
    with pytest.raises(RecipeError, match="density"):
        remote.export(Recipe.parse(bad), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_prompts_and_item_banks_cross_once(daemon, tiny_world, tmp_path, monkeypatch):
    """What is registered again, or as a part of what is known, crosses as hashes."""
    from merge3.client.register import Registrar

    sizes = []
    original = Registrar._requests

    def counted(self, *arguments):
        requests = list(original(self, *arguments))
        sizes.append(sum(r.ByteSize() for r in requests))
        return iter(requests)

    monkeypatch.setattr(Registrar, "_requests", counted)
    config = load_config(variant(tiny_world, "once", **VARIANTS["calibrated"]))
    engine = RemoteEngine(daemon.address, config.models)
    questions = load_questions(config)
    answers(engine, config.models[0], questions.search)
    whole = sizes[-1]
    answers(engine, config.models[1], questions.search)
    answers(engine, config.models[1], questions.search[::2])
    assert sizes[-2] < whole / 2 and sizes[-1] < whole / 4
    assert sizes[-2] < 40 * len(questions.search) + 200


def test_a_generation_is_one_stream_and_a_driver_may_leave_in_the_middle(daemon, tiny_world):
    config = load_config(tiny_world / "evolve.yaml")
    engine = RemoteEngine(daemon.address, config.models)
    local = LocalEngine(Pool.open(config.models[0], config.models[1:]))
    from merge3.space import Space

    space, items = Space(config.genome.definition(), engine.info().layout), load_questions(config).subset[:10]
    rng = np.random.default_rng(0)
    genomes = [np.clip(space.initial() + rng.normal(size=space.size) * 0.1, *space.bounds()) for _ in range(5)]
    asked = Registration(tuple(items), space.definition)
    found = {e.index: e for e in engine.evaluate(asked, genomes)}
    for mine in local.evaluate(asked, genomes):
        assert np.array_equal(mine.responses, found[mine.index].responses) and mine.value == found[mine.index].value
    assert next(engine.evaluate(asked, genomes)).index in range(5)
    again = {e.index: e.value for e in engine.evaluate(asked, genomes)}
    assert again == {i: e.value for i, e in found.items()}


def test_objectives_and_failures_cross_as_they_are(daemon, tiny_world):
    """Vectors with names, and a subject's failure in its evaluation, of the same class and words."""
    config = load_config(tiny_world / "evolve.yaml")
    engines = LocalEngine(Pool.open(config.models[0], config.models[1:])), RemoteEngine(daemon.address, config.models)
    items = tuple(load_questions(config).subset)
    asked = Registration(items, config.genome.definition(), objectives=("translation", "accuracy"))
    start = engines[0].space(asked.space).initial()
    bad = Recipe.parse(
        {
            "merge_method": "ties",
            "base_model": config.models[0],
            "models": [{"model": config.models[1], "parameters": {"weight": 1.0, "density": 7}}],
        }
    )
    found = [
        sorted(engine.evaluate(asked, [start, bad, config.models[1]]), key=lambda e: e.index) for engine in engines
    ]
    for local, remote in zip(*found):
        assert local.objectives == remote.objectives == ("translation", "accuracy")
        assert np.array_equal(local.values, remote.values, equal_nan=True) and local.recipe_hash == remote.recipe_hash
        assert np.array_equal(local.stderrs, remote.stderrs, equal_nan=True)
        assert (type(local.error), str(local.error)) == (type(remote.error), str(remote.error))
    assert [type(e.error) for e in found[0]] == [type(None), RecipeError, type(None)]
    own = found[0][0].responses[[item.task == "translation" for item in items]]
    assert found[0][0].value == own.mean()
    for engine in engines:
        with pytest.raises(
            BadInput, match="objectives: found 'speed'; expected accuracy, length, cost, english, translation"
        ):
            engine.prepare(Registration(items, objectives=("speed",)))
