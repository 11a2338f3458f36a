"""merge, evaluate, evolve and methods, of methods with a model for each task."""

import json
import shutil

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.classifiers import make_classifier
from tests.commands import client
from tests.learn.test_router import PROMPTS
from tests.variants.making import same, stored

TASKS = ("english", "italian", "sorting")


@pytest.fixture(scope="module")
def world(solving_world, tmp_path_factory):
    return shutil.copytree(solving_world, tmp_path_factory.mktemp("variants") / "world")


def write(world, name="emr.yaml", method="emr", tasks=TASKS, **more):
    data = {"merge_method": method, "base_model": "./base", "models": [{"model": f"./{task}"} for task in tasks]}
    (world / name).write_text(yaml.safe_dump(data | {"dtype": "float32"} | more))
    return world / name


@pytest.fixture(scope="module")
def packed(world):
    """A folder with a router, and what was told of it."""
    router = {"items": [f"{task}.jsonl" for task in TASKS], "per_task": 10}
    (world / "disk").mkdir()
    (world / "packed").symlink_to(world / "disk")  # where whoever has a small disk lets it lie
    done = client("merge", write(world, router=router), world / "packed", "--quiet")
    assert done.returncode == 0, done.stderr
    return world / "packed", done


def evaluated(world, what, *options, tasks=TASKS, name="responses.jsonl"):
    """(the table as JSON, responses by item, what is said beside)"""
    files = [world / f"{task}.jsonl" for task in tasks]
    done = client("evaluate", what, *files, "--json", "--responses", world / name, "--limit", 12, *options)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (world / name).read_text().splitlines()]
    return json.loads(done.stdout), {(row["task"], row["item"]): row["score"] for row in rows}, done.stderr


def refused(*arguments):
    """The one line."""
    done = client(*arguments)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning")]
    assert done.returncode == 2 and len(lines) == 1 and done.stdout == "", (done.returncode, done.stdout, done.stderr)
    return lines[0]


# -- merge


def test_merge_tells_what_it_takes(world, packed):
    folder, done = packed
    lines = done.stdout.splitlines()
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert lines[0].startswith("the merge that all tasks have in common: ") and lines[-1] == str(folder)
    assert [line.split(":")[0] for line in lines[1:4]] == list(TASKS)
    assert lines[4].startswith(f"{total:,} bytes in all: ") and " of the base" in lines[4]
    assert "times what the 3 experts take" in lines[5]
    assert {"variants.json", "variants.safetensors", "router.safetensors"} < {file.name for file in folder.iterdir()}
    assert not list(world.glob(".*"))


def test_one_task_of_a_recipe_and_of_a_folder(world, packed, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "direct").symlink_to(tmp_path / "disk")
    for what, name in ((world / "emr.yaml", "direct"), (packed[0], "out")):
        done = client("merge", what, tmp_path / name, "--task", "italian", "--quiet")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].endswith(f"merged parameters: {tmp_path / name}")
    assert same(stored(tmp_path / "direct"), stored(tmp_path / "out")) == []
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in names and not any("variants" in name or "router" in name for name in names)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["direct", "disk", "out"]
    told = json.loads(client("merge", packed[0], tmp_path / "json", "--task", "italian", "--json").stdout)
    assert told["path"] == str(tmp_path / "json") and told["tensors"] == len(stored(tmp_path / "json"))


def test_what_merge_refuses(world, packed, tmp_path):
    out = tmp_path / "out"
    assert "a folder, not a recipe; expected --task" in refused("merge", packed[0], out)
    assert "no variant 'itallian'; expected english, italian, sorting (did you mean 'italian'?)" in refused(
        "merge", packed[0], out, "--task", "itallian"
    )
    assert "no variant 'itallian'" in refused("merge", world / "emr.yaml", out, "--task", "itallian")
    assert "no variants.json" in refused("merge", world / "english", out, "--task", "english")
    plain = write(world, "ties.yaml", "ties", parameters={"weight": 1.0, "density": 0.5})
    assert "ties, which makes one model for all tasks" in refused("merge", plain, out, "--task", "english")
    wrong = write(world, "wrong.yaml", "byom_fft", parameters={"shar": 0.5})
    assert "parameters.shar: byom_fft has no such parameter" in refused("merge", wrong, out)
    wrong = write(world, "wrong.yaml", "ermm")
    assert "unknown method 'ermm'" in refused("merge", wrong, out)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    for what in (packed[0], world / "emr.yaml"):
        assert "exists and is not empty" in refused("merge", what, tmp_path / "taken", "--task", "italian")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["taken"]


@pytest.mark.parametrize("items, line", [
    ([f"{task}.jsonl" for task in TASKS[:2]], "router.items: no prompts of task 'sorting'"),
    ([f"{task}.jsonl" for task in (*TASKS, "translation")], "router.items[3]: task 'translation' has no variant"),
    (["nowhere.jsonl"], "nowhere.jsonl"),
    ([], "router.items"),
])  # fmt: skip
def test_routers_that_cannot_be(world, tmp_path, items, line):
    recipe = write(world, "router.yaml", router={"items": items})
    assert line in refused("merge", recipe, tmp_path / "out")
    assert line in refused("evaluate", recipe, world / "english.jsonl", "--route")
    assert not list(tmp_path.iterdir())


def test_prompts_of_a_router_that_are_too_long(world, tmp_path):
    """Nothing of the merge is left, which was made before anybody could ask its model."""
    row = json.loads((world / "english.jsonl").read_text().splitlines()[0])
    (world / "long.jsonl").write_text(json.dumps(row | {"prompt": "one plus " * 200}))
    recipe = write(world, "router.yaml", router={"items": ["long.jsonl", "italian.jsonl", "sorting.jsonl"]})
    done = client("merge", recipe, tmp_path / "out", "--quiet")
    assert done.returncode == 2 and "long.jsonl, line 1" in done.stderr.splitlines()[-1]
    assert "the model's positions" in done.stderr and not list(tmp_path.iterdir())


def test_settings_of_a_router_that_are_misspelt(world, tmp_path):
    items = [f"{task}.jsonl" for task in TASKS]
    for router, line in (
        ({"items": items, "per_taks": 3}, "router.per_taks: unknown key"),
        ({"items": items, "per_task": 0}, "router.per_task"),
        ({"items": items, "system_instruction": "x"}, "router.system_instruction: without apply_chat_template"),
    ):
        assert line in refused("merge", write(world, "router.yaml", router=router), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -- evaluate


def test_every_item_is_answered_by_its_own_tasks_model(world, packed, tmp_path):
    table, responses, _ = evaluated(world, packed[0])
    _, of_recipe, _ = evaluated(world, world / "emr.yaml")
    common, alone, _ = evaluated(world, packed[0], "--no-variants")
    assert responses == of_recipe and responses != alone
    assert 0 < sum(responses.values()) < len(responses) == 36
    for task in TASKS:
        assert client("merge", packed[0], tmp_path / task, "--task", task, "--quiet").returncode == 0
        _, expected, _ = evaluated(world, tmp_path / task, tasks=[task])
        assert expected == {key: value for key, value in responses.items() if key[0] == task}
    unified = write(world, "unified.yaml", "emr_unified")
    assert evaluated(world, unified)[1] == alone
    assert table["tasks"].keys() == common["tasks"].keys() == set(TASKS)


def test_the_router_answers_whatever_the_items_task_is(world, packed):
    """What it sends to its own task is answered as that task; every item to somebody, told beside the table."""
    table, routed, _ = evaluated(world, packed[0], "--route")
    _, of_recipe, _ = evaluated(world, world / "emr.yaml", "--route")
    _, own, _ = evaluated(world, packed[0])
    assert routed == of_recipe
    assert sum(table["routes"]["sent"].values()) == 36 and set(table["routes"]["sent"]) <= set(TASKS)
    assert table["routes"]["of_own_task"] >= 0.9  # english, italian and sorting share no words
    assert sum(routed[key] != own[key] for key in own) <= 4
    done = client("evaluate", packed[0], world / "italian.jsonl", world / "translation.jsonl", "--route", "--limit", 4)
    assert done.returncode == 0 and "the router sent " in done.stdout.splitlines()[-1]


def test_what_evaluate_refuses(world, packed, tmp_path):
    folder, english = packed[0], world / "english.jsonl"
    asked = lambda *more: refused("evaluate", *more)
    line = asked(folder, english, world / "translation.jsonl")
    assert "task: no variant 'translation'; expected english, italian, sorting" in line
    assert "no variant 'translation'" in asked(world / "emr.yaml", world / "translation.jsonl")
    assert "--no-variants: given with a recipe of emr" in asked(world / "emr.yaml", english, "--no-variants")
    assert "--route: given with --no-variants" in asked(folder, english, "--route", "--no-variants")
    assert "no router.safetensors" in asked(world / "english", english, "--route")
    plain = write(world, "ties.yaml", "ties", parameters={"weight": 1.0, "density": 0.5})
    assert "--route: given with" in asked(plain, english, "--route")
    assert "router: none; expected" in asked(write(world, "bare.yaml"), english, "--route")
    one = write(world, "one.yaml", tasks=("english",))
    assert "models: 1 beside the base; expected 2 or more for emr" in asked(one, english)


def test_folders_that_were_changed(world, packed, tmp_path):
    english = world / "english.jsonl"
    for name, edit, line in (
        ("lost", lambda f: (f / "variants.json").unlink(), "no variants.json"),
        ("cut", lambda f: (f / "variants.safetensors").write_bytes(b"12345678"), "not a safetensors file"),
        ("edited", trained, "another model than variants.safetensors was written for"),
    ):
        folder = shutil.copytree(packed[0], tmp_path / name)
        edit(folder)
        assert line in refused("evaluate", folder, english)
        assert line in refused("merge", folder, tmp_path / "out", "--task", "english")
        assert client("evaluate", folder, english, "--no-variants", "--limit", 2).returncode == 0
    folder = shutil.copytree(packed[0], tmp_path / "router")
    (folder / "router.safetensors").write_bytes(b"12345678")
    assert "router.safetensors: not a safetensors file" in refused("evaluate", folder, english, "--route")


def trained(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def test_heads_and_labels_of_each_task(tmp_path):
    """Experts with other questions and other numbers of labels: each task is answered by its expert's head, from a
    recipe, a folder, and as a model of its own."""
    from merge3.world.tokenizer import make_tokenizer

    tokenizer, rng = make_tokenizer(), np.random.default_rng(0)
    for name, labels, seed in (("base", 3, 0), ("three", 3, 1), ("five", 5, 2)):
        model = make_classifier(labels, seed, len(tokenizer), id2label={i: f"{name}{i}" for i in range(labels)})
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    files = []
    for name, labels in (("three", 3), ("five", 5)):
        rows = [
            {"id": str(i), "task": name, "kind": "classify", "prompt": PROMPTS[i], "answer": int(rng.integers(labels))}
            for i in range(len(PROMPTS))
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        files.append(tmp_path / f"{name}.jsonl")
    found = {}
    for method in ("emr", "onebit", "byom_fft"):
        recipe = write(tmp_path, f"{method}.yaml", method, ("three", "five"))
        assert client("merge", recipe, tmp_path / f"{method}-packed", "--quiet").returncode == 0
        whats = [recipe, tmp_path / f"{method}-packed"]
        for what in whats:
            done = client("evaluate", what, *files, "--responses", tmp_path / "r.jsonl", "--json")
            assert done.returncode == 0, done.stderr
            found.setdefault(method, []).append((tmp_path / "r.jsonl").read_text().replace(str(what), ""))
        assert found[method][0] == found[method][1]
        rows = [json.loads(line) for line in found[method][0].splitlines()]
        for name, file in zip(("three", "five"), files):
            out = tmp_path / f"{method}-{name}"
            assert client("merge", whats[1], out, "--task", name, "--quiet").returncode == 0
            assert len(json.loads((out / "config.json").read_text())["id2label"]) == {"three": 3, "five": 5}[name]
            done = client("evaluate", out, file, "--responses", tmp_path / "r.jsonl", "--json")
            assert done.returncode == 0, done.stderr
            alone = [json.loads(line)["score"] for line in (tmp_path / "r.jsonl").read_text().splitlines()]
            assert alone == [row["score"] for row in rows if row["task"] == name]


# -- other commands


def test_the_list_of_methods():
    done = client("methods")
    found = json.loads(client("methods", "--json").stdout)
    own = {"emr": "rescale", "onebit": "binary", "byom_fft": "share", "byom_lora": "rank"}
    for name, parameter in own.items():
        assert f"\n{name}: " in done.stdout and parameter in found[name]["parameters"]
        assert f"\n    {parameter} " in done.stdout


def test_a_search_is_of_one_model(world, tmp_path):
    data = yaml.safe_load((world / "evolve.yaml").read_text())
    data["genome"]["merge_method"] = "emr"
    (world / "search.yaml").write_text(yaml.safe_dump(data))
    line = refused("evolve", world / "search.yaml", "--run-dir", tmp_path / "run")
    assert "emr" in line and "a model for each task" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("section", ["fit", "surgery"])
def test_nothing_is_fitted_on_many_models(world, tmp_path, section):
    recipe = write(world, "fitted.yaml", **{section: {"items": ["english.jsonl", "italian.jsonl"], "steps": 2}})
    line = refused("fit", recipe, "--run-dir", tmp_path / "run", "--quiet")
    assert "emr" in line and not list(tmp_path.glob("run/*"))
