"""`merge3-client fit` as a person meets it: run directories, stops, what is refused before a model is opened."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from merge3.errors import RecipeError
from merge3.files import Held
from tests.commands import client

EXPERTS = ("english", "italian", "translation", "sorting")


def write_recipe(world, file, method="supermerge", experts=EXPERTS, **settings):
    data = {"merge_method": method, "base_model": str(world / "base"), "dtype": "float32"}
    data["models"] = [{"model": str(world / name)} for name in experts]
    data["fit"] = {"items": [str(world / f"{name}.jsonl") for name in experts], "steps": 4, "per_task": 6}
    data["fit"] |= {"heldout": 0.02} | settings
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return file


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_run_from_a_recipe_to_a_page(tiny_world, tmp_path):
    recipe = write_recipe(tiny_world, tmp_path / "recipe.yaml", check_every=2)
    done = client("fit", recipe, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "step 4/4  loss" in done.stderr and "held-out accuracy" in done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["passes"] == {"merges": 4, "forward": 4 * 24, "backward": 4 * 24}
    assert result["learned_items"] == 24 and len(result["losses"]) == 4 and result["labels"] is True
    assert set(EXPERTS) < set(result["baselines"]) and "uniform_linear" in result["baselines"]
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert ["heldout" in line for line in history] == [False, True, False, True]
    assert history[-1]["heldout"]["accuracy"] == result["heldout"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg") == 3 + len(EXPERTS) and "supermerge" in page
    merged = client("merge", tmp_path / "run" / "fitted.yaml", tmp_path / "again")
    assert merged.returncode == 0, merged.stderr
    here, there = weights(tmp_path / "run" / "model"), weights(tmp_path / "again")
    assert all(torch.equal(here[name], there[name]) for name in here | there)
    at_once = client("merge", recipe, tmp_path / "at-once", "--quiet")
    assert at_once.returncode == 0, at_once.stderr
    assert all(torch.equal(here[name], tensor) for name, tensor in weights(tmp_path / "at-once").items())
    written = yaml.safe_load((tmp_path / "at-once" / "mergekit_config.yml").read_text())
    assert written["merge_method"] == "task_arithmetic"
    compared = client("fit", recipe, "--run-dir", tmp_path / "second", "--compare", tmp_path / "run", "--no-export")
    assert str(tmp_path / "run") in json.loads((tmp_path / "second" / "result.json").read_text())["others"]
    assert compared.returncode == 0 and not (tmp_path / "second" / "model").exists()


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tiny_world, tmp_path):
    recipe = write_recipe(tiny_world, tmp_path / "recipe.yaml", steps=15, check_every=1)
    whole = client("fit", recipe, "--run-dir", tmp_path / "whole", "--quiet", "--no-export")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "merge3.client", "fit", recipe, "--run-dir", tmp_path / "killed", "--quiet"]
    process = subprocess.Popen([*map(str, command), "--no-export"], env=os.environ | {"OMP_NUM_THREADS": "1"})
    state = tmp_path / "killed" / "state.safetensors"
    try:
        deadline = time.monotonic() + 120
        while not state.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    from safetensors.torch import load_file

    assert 1 <= int(load_file(state)["step"]) < 15
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "killed", moved)
    again = client("fit", recipe, "--run-dir", moved, "--resume", "--quiet", "--no-export")
    assert again.returncode == 0, again.stderr
    for name in ("history.jsonl", "fitted.yaml", "state.safetensors"):
        assert (moved / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    done = client("fit", recipe, "--run-dir", moved, "--resume", "--quiet", "--no-export")
    assert done.returncode == 0
    assert (moved / "fitted.yaml").read_bytes() == (tmp_path / "whole" / "fitted.yaml").read_bytes()


def test_another_run_is_not_continued(tiny_world, tmp_path):
    recipe = write_recipe(tiny_world, tmp_path / "recipe.yaml", steps=1)
    assert client("fit", recipe, "--run-dir", tmp_path / "run", "--quiet", "--no-export").returncode == 0
    done = client("fit", recipe, "--run-dir", tmp_path / "run", "--quiet")
    assert done.returncode == 2 and "not empty; expected a new directory, or --resume" in done.stderr
    other = write_recipe(tiny_world, tmp_path / "other.yaml", steps=2)
    done = client("fit", other, "--run-dir", tmp_path / "run", "--resume", "--quiet")
    assert done.returncode == 2 and "run: recipe: found" in done.stderr
    done = client("fit", recipe, "--run-dir", tmp_path / "none", "--resume", "--quiet")
    assert done.returncode == 2 and "no fit.json" in done.stderr and not (tmp_path / "none").exists()
    with Held(tmp_path / "run"):
        done = client("fit", recipe, "--run-dir", tmp_path / "run", "--resume", "--quiet")
    assert done.returncode == 2 and "run: in use by another process" in done.stderr


@pytest.mark.heavy
def test_groups_hold_a_base_and_one_group_at_once(tiny_world, tmp_path, monkeypatch):
    """Copies are counted as tensors that are alive, whoever holds them, in bytes of their storages."""
    from merge3.learn.weighted import Weighted

    alive, write = [], Weighted.write

    def storages():
        found = {}
        for thing in gc.get_objects():
            if torch.is_tensor(thing) and thing.is_floating_point() and thing.numel() > 1000:
                found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        return found

    def counting(self, weights):
        write(self, weights)
        alive.append(sum(size for place, size in storages().items() if place not in before))

    monkeypatch.setattr(Weighted, "write", counting)
    one = sum(tensor.nbytes for tensor in weights(tiny_world / "base").values())
    most = {}
    for name, settings in (("flat", {}), ("groups", {"groups": {"size": 2}})):
        gc.collect()
        alive.clear()
        before = storages()  # of tests that came before
        recipe = write_recipe(tiny_world, tmp_path / f"{name}.yaml", steps=2, check_every=0, **settings)
        done = client("fit", recipe, "--run-dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
        most[name] = max(alive) / one
    # The live model, and T + 1 or g + 1 copies.
    assert most["flat"] == pytest.approx(1 + 5, abs=0.2)
    assert most["groups"] == pytest.approx(1 + 3, abs=0.2)
    result = json.loads((tmp_path / "groups" / "result.json").read_text())
    assert result["passes"]["merges"] == 3 * 2 and result["passes"]["forward"] == 2 * 2 * 24
    fitted = yaml.safe_load((tmp_path / "groups" / "fitted.yaml").read_text())
    assert [source["model"] for source in fitted["models"]] == [str(tiny_world / name) for name in EXPERTS]
    again = client("fit", tmp_path / "groups.yaml", "--run-dir", tmp_path / "groups", "--resume")
    assert again.returncode == 0, again.stderr
    assert yaml.safe_load((tmp_path / "groups" / "fitted.yaml").read_text()) == fitted


def test_survivors_are_experts_of_their_own(tiny_world, tmp_path):
    recipe = write_recipe(tiny_world, tmp_path / "recipe.yaml", "adamerging++", steps=2)
    done = client("fit", recipe, "--run-dir", tmp_path / "run", "--quiet")
    assert done.returncode == 0, done.stderr
    fitted = yaml.safe_load((tmp_path / "run" / "fitted.yaml").read_text())
    assert [source["model"] for source in fitted["models"]] == [
        str(tmp_path / "run" / "survivors" / name) for name in EXPERTS
    ]
    assert client("merge", tmp_path / "run" / "fitted.yaml", tmp_path / "again").returncode == 0
    here, there = weights(tmp_path / "run" / "model"), weights(tmp_path / "again")
    assert all(torch.equal(here[name], there[name]) for name in here)
    refused = client("merge", recipe, tmp_path / "once")
    assert refused.returncode == 2 and "adamerging++ makes experts of its own; expected" in refused.stderr
    assert not (tmp_path / "once").exists()


def test_tasks_find_their_own_experts(tiny_world, tmp_path):
    """Exports of this tool all lie in folders called `model`."""
    from merge3 import Recipe
    from merge3.client.fit_items import load_items
    from merge3.learn.settings import read_fit

    for name in ("english", "italian"):
        shutil.copytree(tiny_world / name, tmp_path / name / "model")
    models = [str(tmp_path / name / "model") for name in ("english", "italian")]
    data = {"merge_method": "expert_kl", "base_model": str(tiny_world / "base")}
    data["models"] = [{"model": model} for model in models]
    files = [{"items": str(tiny_world / f"{name}.jsonl"), "model": model} for name, model in zip(EXPERTS, models)]

    def experts(files):
        recipe = Recipe.parse(data | {"fit": {"items": files}})
        return load_items(recipe, read_fit(recipe.fit, "fit"), "fit").experts

    assert experts(files) == dict(zip(EXPERTS, models))
    with pytest.raises(RecipeError, match=r"items\[0\].model: found 'model'; expected one of .*, of which 2 end so"):
        experts([files[0] | {"model": "model"}, files[1]])
    with pytest.raises(RecipeError, match="found '/nowhere/english'"):
        experts([files[0] | {"model": "/nowhere/english"}, files[1]])


def test_the_same_models_for_other_tasks_are_another_run(tiny_world, tmp_path):
    def files(*names):
        pairs = zip(("english", "italian"), names)
        return [{"items": str(tiny_world / f"{task}.jsonl"), "model": str(tiny_world / name)} for task, name in pairs]

    options = {"method": "expert_kl", "experts": ("english", "italian"), "steps": 1}
    recipe = write_recipe(tiny_world, tmp_path / "recipe.yaml", items=files("english", "italian"), **options)
    assert client("fit", recipe, "--run-dir", tmp_path / "run", "--quiet", "--no-export").returncode == 0
    write_recipe(tiny_world, recipe, items=files("italian", "english"), **options)
    done = client("fit", recipe, "--run-dir", tmp_path / "run", "--resume", "--quiet")
    assert done.returncode == 2 and "run: experts: found" in done.stderr


def test_a_run_that_ended_before_its_first_state_begins_anew(tiny_world, tmp_path):
    recipe = write_recipe(tiny_world, tmp_path / "recipe.yaml", steps=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "fit.json").write_text('{"recipe": "another"}')
    (tmp_path / "run" / ".fit.json.partial-1").write_text("")
    assert client("fit", recipe, "--run-dir", tmp_path / "run", "--quiet", "--no-export").returncode == 0


@pytest.mark.parametrize("name", ["state.safetensors", "fit.json", "history.jsonl"])
def test_a_damaged_file_of_a_run_is_one_line(tiny_world, tmp_path, name):
    recipe = write_recipe(tiny_world, tmp_path / "recipe.yaml", steps=1)
    assert client("fit", recipe, "--run-dir", tmp_path / "run", "--quiet", "--no-export").returncode == 0
    (tmp_path / "run" / name).write_bytes(b"{nothing")
    done = client("fit", recipe, "--run-dir", tmp_path / "run", "--resume", "--quiet")
    assert done.returncode == 2 and f"{name}: damaged" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_file_is_no_run_directory(tiny_world, tmp_path):
    recipe = write_recipe(tiny_world, tmp_path / "recipe.yaml", steps=1)
    done = client("fit", recipe, "--run-dir", recipe, "--quiet")
    assert done.returncode == 2 and "Not a directory" in done.stderr and done.stderr.count("\n") == 1


def test_a_finished_run_goes_on_wherever_its_models_lie(tiny_world, tmp_path):
    shutil.copytree(tiny_world, tmp_path / "here")
    recipe = write_recipe(tmp_path / "here", tmp_path / "recipe.yaml", steps=1)
    assert client("fit", recipe, "--run-dir", tmp_path / "run", "--quiet", "--no-export").returncode == 0
    before = yaml.safe_load((tmp_path / "run" / "fitted.yaml").read_text())
    shutil.move(tmp_path / "here", tmp_path / "there")
    write_recipe(tmp_path / "there", recipe, steps=1)
    done = client("fit", recipe, "--run-dir", tmp_path / "run", "--resume", "--quiet", "--no-export")
    assert done.returncode == 0, done.stderr
    after = yaml.safe_load((tmp_path / "run" / "fitted.yaml").read_text())
    assert [m["parameters"] for m in after["models"]] == [m["parameters"] for m in before["models"]]
    assert [m["model"] for m in after["models"]] == [str(tmp_path / "there" / name) for name in EXPERTS]


def test_runs_on_other_items_stand_in_no_table(tiny_world, tmp_path):
    recipe = write_recipe(tiny_world, tmp_path / "recipe.yaml", steps=1)
    assert client("fit", recipe, "--run-dir", tmp_path / "run", "--quiet", "--no-export").returncode == 0
    other = write_recipe(tiny_world, tmp_path / "other.yaml", steps=1, seed=4)
    done = client("fit", other, "--run-dir", tmp_path / "second", "--quiet", "--compare", tmp_path / "run")
    assert done.returncode == 2 and "was measured on other items; expected one of the same files" in done.stderr
    assert not (tmp_path / "second").exists()


def test_an_item_that_only_the_end_would_ask_is_refused_at_the_start(tiny_world, tmp_path):
    lines = (tiny_world / "english.jsonl").read_text().splitlines()
    long = [json.dumps(json.loads(line) | {"prompt": "one plus " * 40}) for line in lines]
    (tmp_path / "english.jsonl").write_text("\n".join(long))
    recipe = write_recipe(tiny_world, tmp_path / "recipe.yaml", experts=("english",), per_task=1)
    data = yaml.safe_load(recipe.read_text())
    data["fit"]["items"] = ["english.jsonl"]
    recipe.write_text(yaml.safe_dump(data))
    done = client("fit", recipe, "--run-dir", tmp_path / "run", "--quiet")
    assert done.returncode == 2 and "at most 32, the model's positions" in done.stderr
    assert not (tmp_path / "run" / "state.safetensors").exists()


@pytest.mark.parametrize(
    "method, settings, message",
    [
        ("adamerging++", {"groups": {"size": 2}}, "fit.groups: with adamerging++; expected adamerging, or no groups"),
        ("supermerge", {"groups": [["english", "italian"], []]}, "an empty group"),
        ("supermerge", {"heldout": 0}, "fit.heldout: found 0, and nothing would say what the fit is worth"),
        ("supermerge", {"steps": "yes"}, "fit: steps: found true, expected a number"),
        ("supermerge", {"steps": "0x1" + "0" * 4000}, "fit.steps: found a number of 4001 hexadecimal digits"),
    ],
)
def test_more_that_is_refused(tiny_world, tmp_path, method, settings, message):
    written = {key: value for key, value in settings.items() if key != "steps"}
    file = write_recipe(tiny_world, tmp_path / "recipe.yaml", method, **written)
    file.write_text(file.read_text().replace("steps: 4", f"steps: {settings.get('steps', 4)}"))
    done = client("fit", file, "--run-dir", tmp_path / "run", "--quiet")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_models_are_not_made_where_no_recipe_could_name_them(tiny_world, tmp_path):
    recipe = write_recipe(tiny_world, tmp_path / "recipe.yaml", "adamerging++", steps=2)
    done = client("fit", recipe, "--run-dir", tmp_path / "adamerging++")
    assert done.returncode == 2
    assert "recipes read + and @ in a path as more than that; expected a path without them" in done.stderr
    assert not (tmp_path / "adamerging++").exists()


def test_one_expert_is_enough(tiny_world, tmp_path):
    recipe = write_recipe(tiny_world, tmp_path / "recipe.yaml", experts=("english",), steps=2)
    done = client("fit", recipe, "--run-dir", tmp_path / "run", "--quiet", "--no-export")
    assert done.returncode == 0, done.stderr
    (source,) = yaml.safe_load((tmp_path / "run" / "fitted.yaml").read_text())["models"]
    weights = [entry["value"] for entry in source["parameters"]["weight"] if entry["filter"] != "*"]
    assert len(weights) == 39 and all(0.001 < abs(weight - 0.3) < 0.05 for weight in weights)  # Adam's first steps


def test_prompts_have_the_template_of_the_recipe(tiny_world, tmp_path):
    """The base has none: endpoints are asked with the recipe's as well."""
    recipe = write_recipe(tiny_world, tmp_path / "recipe.yaml", experts=("english",), steps=1, apply_chat_template=True)
    done = client("fit", recipe, "--run-dir", tmp_path / "refused", "--quiet")
    assert done.returncode == 2 and "the tokenizer has no chat template" in done.stderr
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ ' equals' if add_generation_prompt }}"
    recipe.write_text(recipe.read_text() + yaml.safe_dump({"chat_template": template}))
    done = client("fit", recipe, "--run-dir", tmp_path / "run", "--quiet", "--no-export")
    assert done.returncode == 0, done.stderr
    assert {"base", "english"} < set(json.loads((tmp_path / "run" / "result.json").read_text())["baselines"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fit": {"items": ["none.jsonl"]}}, "none.jsonl: No such file or directory"),
        ({"fit": {"items": []}}, "recipe.yaml: fit.items: none; expected files of items"),
        ({"fit": None}, "recipe.yaml: fit: found nothing; expected a mapping"),
        ({"merge_method": "supermerg"}, "'supermerg' learns nothing, and there is `fit:`"),
        ({"merge_method": "ties"}, "'ties' learns nothing, and there is `fit:`; expected supermerge or adamerging"),
        ({"fit": {"learning_rate": 0}}, "fit.learning_rate: found 0"),
        ({"fit": {"steps": 0}}, "fit.steps: found 0"),
        ({"merge_method": "expert_kl", "fit": {"items": ["english.jsonl"]}}, "no model for task english; expected the"),
        ({"merge_method": "expert_kl", "fit": {"groups": {"size": 2}}}, "groups: with expert_kl, which asks every"),
        ({"fit": {"items": [{"items": "english.jsonl", "model": "inglese"}]}}, "items[0].model: found 'inglese'"),
        ({"fit": {"system_instruction": "Be brief."}}, "system_instruction: without apply_chat_template"),
        ({"slices": 1}, "both `models` and `slices`"),
    ],
)
def test_what_is_refused_before_a_model_is_opened(tiny_world, tmp_path, monkeypatch, change, message):
    file = write_recipe(tiny_world, tmp_path / "recipe.yaml")
    data = yaml.safe_load(file.read_text())
    for key, value in change.items():
        data[key] = data[key] | value if key == "fit" and value is not None else value
    for name in EXPERTS:
        shutil.copy(tiny_world / f"{name}.jsonl", tmp_path)
    file.write_text(yaml.safe_dump(data))
    monkeypatch.setattr("merge3.pool.Pool.open", lambda *a, **k: pytest.fail("a model was opened"))
    done = client("fit", file, "--run-dir", tmp_path / "run")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_groups_that_are_not_the_experts(tiny_world, tmp_path):
    recipe = write_recipe(tiny_world, tmp_path / "recipe.yaml", groups=[["english", "italian"]])
    done = client("fit", recipe, "--run-dir", tmp_path / "run", "--quiet")
    assert done.returncode == 2 and "is not in exactly one group; expected every model in one group" in done.stderr


def test_more_experts_than_one_merge_takes_are_refused_before_any_group_is(family, tmp_path):
    experts = []
    for number in range(9):
        shutil.copytree(family / f"e{number % 3}", tmp_path / f"x{number}")
        experts.append(f"x{number}")
        item = {"task": f"t{number}", "kind": "generate", "prompt": "a", "answer": "b"}
        lines = [json.dumps(item | {"id": str(place)}) for place in range(4)]
        (tmp_path / f"x{number}.jsonl").write_text("\n".join(lines))
    shutil.copytree(family / "base", tmp_path / "base")
    groups = {"size": 3, "by": "order"}
    recipe = write_recipe(tmp_path, tmp_path / "recipe.yaml", experts=experts, groups=groups, heldout=0.5)
    done = client("fit", recipe, "--run-dir", tmp_path / "run", "--quiet")
    assert done.returncode == 2 and "9 models beside the base; expected 1 to 8 for task_arithmetic" in done.stderr
    assert not (tmp_path / "run" / "groups").exists()


def test_a_learned_recipe_is_no_candidate(tiny_world, tmp_path):
    recipe = write_recipe(tiny_world, tmp_path / "recipe.yaml")
    done = client("evaluate", recipe, tiny_world / "english.jsonl", "--limit", 2)
    assert done.returncode == 2 and "which learns its weights from items" in done.stderr
