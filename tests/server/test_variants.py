"""A daemon and methods with a model for each task: Evaluate, Generate and Export as in this process, with `task`."""

import contextlib
import json
import os
import shutil

import numpy as np
import pytest

from merge3 import LocalEngine, Pool, Recipe, Registration, merge_to_disk, read_items
from merge3.client.remote import RemoteEngine
from merge3.engine import Varied
from merge3.errors import BadInput, Merge3Error, RecipeError, Unavailable
from merge3.export_task import merge_task
from merge3.rpc import merge3_pb2 as pb
from tests.server.calling import refused
from tests.server.conftest import registering
from tests.variants.making import recipe_of, same, stored, with_adapter

TASKS = ("english", "italian")


@pytest.fixture(scope="module")
def served(solving_world, tmp_path_factory):
    """(folder of the models and of what was packed, names of the models, the recipe)"""
    world = shutil.copytree(solving_world, tmp_path_factory.mktemp("variants") / "world")
    names = [str(world / name) for name in ("base", *TASKS)]
    recipe = recipe_of(names[0], names[1:], "emr", dtype="float32")
    merge_to_disk(recipe, world / "packed")
    return world, names, recipe


@pytest.fixture(scope="module")
def engines(served):
    """(the daemon's, this process's) over base, experts and the packed folder."""
    from tests.server.daemons import Thread

    world, names, _ = served
    names = [*names, str(world / "packed")]
    daemon = Thread(world)
    with contextlib.closing(RemoteEngine(daemon.address, names)) as remote:
        yield remote, LocalEngine(Pool.open(names[0], names[1:])), daemon
    daemon.kill()


def items(world, tasks=TASKS, count=8):
    return tuple(item for task in tasks for item in read_items(world / f"{task}.jsonl")[:count])


def test_a_daemon_answers_as_this_process_does(served, engines):
    world, names, recipe = served
    remote, local, _ = engines
    packed, asked = str(world / "packed"), Registration(items(world))
    largest = recipe_of(names[0], names[1:], "byom_fft", {"share": 0.05})
    of_one = lambda subject, task: Varied(subject, (task,) * 16)
    subjects = [recipe, Varied(recipe), of_one(recipe, "english"), of_one(packed, "italian"), packed, names[1], largest]
    subjects += [of_one(packed, "english"), of_one(recipe, "italian"), recipe]
    here, there = ({e.index: e for e in engine.evaluate(asked, subjects)} for engine in (local, remote))
    for index in range(len(subjects)):
        assert here[index].error is None, here[index].error
        assert here[index].answers().tolist() == there[index].answers().tolist(), index
        assert here[index].recipe_hash == there[index].recipe_hash and here[index].value == there[index].value
    found = [here[index].answers().tolist() for index in range(len(subjects))]
    assert found[0] == found[1] == found[9]  # whatever was there before
    assert found[0] == found[7][:8] + found[3][8:] and found[2] == found[7] and found[3] == found[8]
    assert found[2] != found[3]


def test_what_is_wrong_with_one_subject_is_its_own(served, engines):
    """The others of a stream are evaluated; and the same is said here and there."""
    world, names, recipe = served
    packed, asked = str(world / "packed"), Registration(items(world))
    remote, local, _ = engines
    broken = recipe_of(names[0], names[1:], "emr", {"rescale": "nonsense"})
    alone = recipe_of(names[0], names[1:2], "emr")
    for engine in (local, remote):
        subjects = [broken, recipe, alone, Varied(names[1], ("x",) * 16)]
        evaluations = {e.index: e for e in engine.evaluate(asked, subjects)}
        assert isinstance(evaluations[0].error, RecipeError)
        assert "rescale: found 'nonsense'" in str(evaluations[0].error)
        assert evaluations[1].error is None and len(evaluations[1].answers()) == 16
        assert "1 beside the base" in str(evaluations[2].error)
        assert "no variants.json" in str(evaluations[3].error)
        assert all(np.isnan(evaluations[at].values).all() for at in (0, 2, 3))
        assert evaluations[0].recipe_hash == broken.hash()
    other = Registration(items(world, ("english", "sorting")))
    for engine, subject in ((local, recipe), (remote, recipe), (local, Varied(packed))):
        (found,) = engine.evaluate(other, [subject])
        assert "no variant 'sorting'; expected english, italian" in str(found.error)
    for tasks in (("english",), ("english",) * 17, ()):
        (found,) = local.evaluate(asked, [Varied(recipe, tasks)])
        assert f"tasks: {len(tasks)} for 16 items; expected one for each item" in str(found.error)
    with pytest.raises(Unavailable, match="one task for all items, or a recipe"):
        list(remote.evaluate(asked, [Varied(packed)]))


def test_bad_tasks(served, engines):
    world, names, recipe = served
    _, _, daemon = engines
    stub, models = daemon.stub(), [*names, str(world / "packed")]
    pool = stub.OpenPool(pb.OpenPoolRequest(models=models)).pool_id
    items_id = stub.RegisterItems(iter(registering(pool, list(items(world))))).items_id
    plain = recipe_of(names[0], names[1:], "ties", {"weight": 1.0, "density": 0.5}).to_yaml()
    emr, packed = recipe.to_yaml(), models[-1]
    fine = dict(pool_id=pool, items_id=items_id)
    for fields, words in (
        (dict(recipe=emr, task="englsh"), "did you mean 'english'?"),
        (dict(recipe=plain, task="english"), "one model for all tasks"),
        (dict(genome=pb.Genome(values=[1.0]), task="english"), ""),
    ):
        refused(lambda f=fields: stub.Evaluate(pb.EvaluateRequest(**fine, **f)), "INVALID_ARGUMENT", words)
    for fields, words in (
        (dict(endpoint=packed, task="englsh"), "no variant 'englsh'"),
        (dict(endpoint=names[1], task="english"), "no variants.json"),
    ):
        found = stub.Evaluate(pb.EvaluateRequest(**fine, **fields))
        assert words in found.error.found
    for fields, words in (
        (dict(recipe=emr, task="englsh"), "no variant 'englsh'"),
        (dict(recipe=plain, task="english"), "one model for all tasks"),
        (dict(endpoint=packed, task="englsh"), "no variant 'englsh'"),
        (dict(endpoint="/etc", task="english"), "endpoint: found '/etc'"),
    ):
        request = pb.GenerateRequest(pool_id=pool, prompt="one plus one equals", **fields)
        refused(lambda r=request: list(stub.Generate(r)), "INVALID_ARGUMENT", words)
    request = pb.GenerateRequest(pool_id=pool, prompt="one plus one equals", endpoint=names[1], task="english")
    refused(lambda: list(stub.Generate(request)), "FAILED_PRECONDITION", "no variants.json", reason="checkpoint")
    for fields, words in (
        (dict(recipe=emr, task="englsh"), "no variant 'englsh'"),
        (dict(recipe=plain, task="english"), "one model for all tasks"),
    ):
        for dry in (False, True):
            request = pb.ExportRequest(pool_id=pool, dry_run=dry, **fields)
            refused(lambda r=request: list(stub.Export(r)), "INVALID_ARGUMENT", words)
    stub.ClosePool(pb.ClosePoolRequest(pool_id=pool))


def test_text_of_a_tasks_model(served, engines):
    world, names, recipe = served
    _, _, daemon = engines
    stub, models = daemon.stub(), [*names, str(world / "packed")]
    pool = stub.OpenPool(pb.OpenPoolRequest(models=models)).pool_id
    texts = [json.loads(line)["prompt"] for task in TASKS for line in open(world / f"{task}.jsonl")][::8]
    asked = lambda text, fields: pb.GenerateRequest(pool_id=pool, prompt=text, max_tokens=4, **fields)
    say = lambda **fields: ["".join(p.text for p in stub.Generate(asked(text, fields))) for text in texts]
    by_recipe = {task: say(recipe=recipe.to_yaml(), task=task) for task in ("italian", "english")}
    common = say(recipe=recipe.to_yaml())
    assert {task: say(endpoint=models[-1], task=task) for task in ("english", "italian")} == by_recipe
    assert say(endpoint=models[-1]) == common
    assert by_recipe["italian"] != by_recipe["english"]
    stub.ClosePool(pb.ClosePoolRequest(pool_id=pool))


def test_exports(served, engines, tmp_path):
    world, names, recipe = served
    remote, local, _ = engines
    merge_task(recipe, "italian", tmp_path / "expected")
    for name, engine in (("there", remote), ("here", local)):
        told = engine.export(recipe, tmp_path / name, task="italian")
        assert told["path"] == str(tmp_path / name)
        assert same(stored(tmp_path / name), stored(tmp_path / "expected")) == []
        with pytest.raises(BadInput, match="no variant 'sorting'"):
            engine.export(recipe, tmp_path / "never", task="sorting")
        engine.export(recipe, tmp_path / f"{name}-packed")
        for file in ("model.safetensors", "variants.safetensors"):
            assert (tmp_path / f"{name}-packed" / file).read_bytes() == (world / "packed" / file).read_bytes()
        with pytest.raises(RecipeError, match="router"):
            engine.export(Recipe.parse(recipe.to_dict() | {"router": {"items": ["x.jsonl"]}}), tmp_path / "never")
    assert not (tmp_path / "never").exists() and not list(tmp_path.glob(".*"))


def test_adapters_lie_where_the_daemon_knows_them(served, start, tmp_path, monkeypatch):
    """Named below its root, as models are."""
    world = shutil.copytree(served[0] / "base", tmp_path / "root" / "base").parent
    for seed, name in enumerate(("a", "b")):
        with_adapter(world / name, world / "base", rank=4, seed=seed)
    models = ["base+a", "base+b"]
    recipe = recipe_of("base", models, "byom_lora", {"rank": 2})
    lying = [f"{world / 'base'}+{world / name}" for name in ("a", "b")]
    merge_task(recipe_of(world / "base", lying, "byom_lora", {"rank": 2}), "a", tmp_path / "expected")
    daemon = start(world)
    monkeypatch.chdir(tmp_path)
    assert not os.path.exists("a")
    with contextlib.closing(RemoteEngine(daemon.address, ["base", *models])) as remote:
        remote.check(recipe)
        remote.export(recipe, tmp_path / "out", task="a")
    assert same(stored(tmp_path / "out"), stored(tmp_path / "expected")) == []


def test_nothing_of_these_is_a_traceback(served, engines):
    """Odd subjects of this process's engine raise what a person can read."""
    world, names, recipe = served
    _, local, _ = engines
    for call in (
        lambda: local.show(names[1], "english"),
        lambda: local.show("nowhere", "english"),
        lambda: local.show(str(world / "packed"), "nobody"),
        lambda: local.export(recipe, world / "packed", task="english"),
    ):
        with pytest.raises(Merge3Error) as found:
            call()
        assert "\n" not in str(found.value)
