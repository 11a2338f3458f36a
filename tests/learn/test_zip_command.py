"""merge3-client fit and merge of two models that share no ancestor: what is written, what is told, what is refused."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from merge3.errors import ItemsError
from merge3.learn.settings import ZipSettings, read_zip
from merge3.learn.zip_file import FILE
from merge3.learn.zip_items import shown
from merge3.methods.zipped import ZIPPED
from merge3.tasks import Item
from merge3.tasks.prompts import load_tokenizer
from merge3.world.strangers import TASKS, make_strangers
from tests.commands import client
from tests.worlds import shared

FIT = {"items": ["low.jsonl", "high.jsonl"], "per_task": 100}


@pytest.fixture(scope="module")
def strangers():
    """The pair that benchmarks/zip.py begins with."""
    yield from shared(make_strangers, family="resnet", seed=0)


@pytest.fixture(scope="module")
def world(strangers, tmp_path_factory):
    return shutil.copytree(strangers, tmp_path_factory.mktemp("zip") / "world")


def write(world, name="zip.yaml", method="zipit", models=tuple(TASKS), **sections):
    entry = lambda model: {"model": model if model[0] == "/" else f"./{model}"}
    data = {"merge_method": method, "models": [m if isinstance(m, dict) else entry(m) for m in models]}
    (world / name).write_text(yaml.safe_dump(data | {"fit": FIT} | sections))
    return world / name


def fitted(world, run, **fit):
    done = client("fit", write(world, f"{run}.yaml", fit={**FIT, **fit}), "--run-dir", world / run, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(world, *arguments, **sections):
    """The line that a recipe is refused with; nothing is written."""
    done = client(*arguments[:1], write(world, "bad.yaml", **sections), *arguments[1:])
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def whole(world):
    return fitted(world, "whole", beta=1.0)


@pytest.fixture(scope="module")
def third(world):
    return fitted(world, "third", beta=1.0, depth=0.34)


def test_one_model_comes_out(world, whole):
    model = AutoModelForImageClassification.from_pretrained(world / "whole" / "model")
    assert sorted(model.config.label2id) == [f"digit-{digit}" for digit in range(10)]
    told = json.loads((world / "whole" / "model" / FILE).read_text())
    assert told["results"] == {"low": ".", "high": "."} and told["layers"] == told["of"] == 3
    assert json.loads((world / "whole" / "result.json").read_text()) == whole
    assert whole["zip"]["one"] and set(whole["zip"]["correlation"]) == {
        "stem", "stage 1", "stage 2", *(f"layer {layer} inner 0" for layer in range(3))
    }  # fmt: skip
    for before, after in whole["zip"]["correlation"].values():
        assert after > before + 0.1


def test_it_is_measured_beside_what_one_would_do_otherwise(whole, third):
    assert set(whole["baselines"]) == {"low", "high", "permute", "average"}
    assert whole["baselines_detail"]["low"]["tasks"]["low"] > 0.9
    assert whole["heldout_items"] == third["heldout_items"] and whole["heldout_name"] == third["heldout_name"]
    assert whole["baselines"]["average"] < whole["baselines"]["permute"] < whole["heldout"] < third["heldout"]


def test_trunk_and_two_ends(world, third):
    """Two ordinary checkpoints whose first layers are the same bytes."""
    folder = world / "third" / "model"
    told = json.loads((folder / FILE).read_text())
    assert told["results"] == {"low": "low", "high": "high"} and told["layers"] == 1 and not third["zip"]["one"]
    low, high = (load_file(folder / task / "model.safetensors") for task in TASKS)
    same = {name for name in low if torch.equal(low[name], high[name])}
    assert set(told["shared"]) <= same and all("stages.0." in name or "embedder" in name for name in told["shared"])
    assert not any("stages.1" in name and name.endswith("convolution.weight") for name in same)
    for task in TASKS:
        assert AutoModelForImageClassification.from_pretrained(folder / task).config.num_labels == 10
    size = told["bytes"]
    assert size["together"] == size["shared"] + sum(size["own"]) < size["apart"]
    shape = {name: tensor.numel() * tensor.itemsize for name, tensor in low.items()}
    assert size["shared"] == sum(shape[name] for name in told["shared"])


def test_a_person_reads_a_table(world):
    done = client("fit", write(world, "table.yaml"), "--run-dir", world / "table", "--quiet", "--no-export")
    assert done.returncode == 0, done.stderr
    for word in ("zipit", "permute", "average", "low", "high", "3 of 3 layers, 6 spaces", "200 unlabelled items"):
        assert word in done.stdout.replace("\n", " "), word
    assert not (world / "table" / "model").exists()


def test_the_same_bytes_again(world, whole):
    """Also from `merge`, which measures nothing."""
    recipe = write(world, "again.yaml", fit={**FIT, "beta": 1.0})
    (world / "disk").mkdir()
    (world / "merged").symlink_to(world / "disk")
    done = client("merge", recipe, world / "merged", "--quiet")
    assert done.returncode == 0 and "3 of 3 layers are one" in done.stdout, done.stderr
    written = [world / folder / "model.safetensors" for folder in ("merged", "whole/model")]
    assert written[0].read_bytes() == written[1].read_bytes()
    again = client("merge", recipe, world / "merged", "--quiet")
    assert again.returncode == 2 and "not empty" in again.stderr


def test_labels_are_never_read(world, third):
    """Answers of the items that are learned from do not matter."""
    for task in TASKS:
        lines = [json.loads(line) for line in (world / f"{task}.jsonl").read_text().splitlines()]
        wrong = [json.dumps(line | {"answer": "digit-3"}) for line in lines]
        (world / f"wrong-{task}.jsonl").write_text("\n".join(wrong) + "\n")
    items = [{"items": f"wrong-{task}.jsonl", "name": task, "model": task} for task in TASKS]
    fitted(world, "wrong", beta=1.0, depth=0.34, items=items)
    for task in TASKS:
        one, other = (world / run / "model" / task / "model.safetensors" for run in ("third", "wrong"))
        assert one.read_bytes() == other.read_bytes()


def test_a_run_goes_on_and_another_does_not(world, whole):
    again = client("fit", world / "whole.yaml", "--run-dir", world / "whole", "--json", "--quiet", "--resume")
    assert again.returncode == 0 and json.loads(again.stdout)["heldout"] == whole["heldout"], again.stderr
    done = client("fit", write(world, "whole.yaml", fit={**FIT, "beta": 0.5}), "--run-dir", world / "whole", "--resume")
    assert done.returncode == 2 and "settings" in done.stderr


def test_models_with_labels_of_their_own(world):
    """A trunk alone is one, however deep: each task's head reads it with its own U."""
    other = shutil.copytree(world / "high", world / "renamed")
    config = json.loads((other / "config.json").read_text())
    labels = {str(digit): f"figure-{digit}" for digit in range(10)}
    config |= {"id2label": labels, "label2id": {label: int(digit) for digit, label in labels.items()}}
    (other / "config.json").write_text(json.dumps(config))
    text = (world / "high.jsonl").read_text().replace("digit-", "figure-")
    (world / "figures.jsonl").write_text(text)
    files = {"items": ["low.jsonl", "figures.jsonl"], "per_task": 40}
    recipe = write(world, "labels.yaml", models=("low", "renamed"), fit=files)
    done = client("fit", recipe, "--run-dir", world / "labels", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert not result["zip"]["one"] and result["zip"]["layers"] == 3
    assert set(result["baselines_detail"]["low"]["tasks"]) == {"low"}
    told = json.loads((world / "labels" / "model" / FILE).read_text())
    low, high = (load_file(world / "labels" / "model" / name / "model.safetensors") for name in ("low", "renamed"))
    own = {name for name in low if not torch.equal(low[name], high[name])}
    assert own <= {"classifier.1.weight", "classifier.1.bias"} and set(told["shared"]) == set(low) - {
        *own,
        "classifier.1.bias",
    }
    (world / "both.jsonl").write_text((world / "low.jsonl").read_text())
    line = refused(world, "fit", "--run-dir", world / "none", models=("low", "renamed"), fit={"items": ["both.jsonl"]})
    assert "no model for task 'low', and each has labels of its own" in line


def test_language_models(tiny_world, tmp_path):
    """Of one initialisation here, and none the less models that transformers loads, with their tokenizer."""
    for name in ("english", "italian"):
        shutil.copytree(tiny_world / name, tmp_path / name)
        shutil.copy(tiny_world / f"{name}.jsonl", tmp_path)
    items = {"items": ["english.jsonl", "italian.jsonl"], "per_task": 8}
    recipe = write(tmp_path, models=("english", "italian"), fit=items, dtype="bfloat16")
    done = client("merge", recipe, tmp_path / "merged", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.bfloat16 and model.config.dtype == torch.bfloat16
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert client("evaluate", tmp_path / "merged", tmp_path / "english.jsonl", "--json").returncode == 0
    words = tmp_path / "italian" / "tokenizer.json"
    data = json.loads(words.read_text())
    known = data["model"]["vocab"]
    known["one"], known["two"] = known["two"], known["one"]
    words.write_text(json.dumps(data))
    line = refused(tmp_path, "merge", tmp_path / "other", models=("english", "italian"), fit=items)
    assert "4 tokens that the two tokenizers do not have alike" in line and not (tmp_path / "other").exists()


def test_what_models_are_shown(tiny_world):
    """Prompts, each once, and of choices the first one, whichever is right."""
    folder = tiny_world / "english"
    model, words = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    items = [
        Item("1", "a", "generate", "one plus two is", ("three",)),
        Item("2", "a", "generate", "one plus two is", ("four",)),
        Item("3", "a", "choice", "two plus two is", 1, ("three", "four")),
    ]
    (batch,) = shown(items, (model, model), (folder, folder))
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch.inputs["input_ids"], batch.mask)]
    assert rows == [words("one plus two is").input_ids, words("two plus two is three").input_ids]
    assert batch.inputs["attention_mask"] is batch.mask and len(batch) == 2
    long = Item("4", "a", "generate", " ".join(["one"] * 40), ("two",))
    with pytest.raises(ItemsError, match=r"at most 32, the model's positions"):
        shown([long], (model, model), (folder, folder))


def test_what_is_refused(world, tmp_path, family):
    out = tmp_path / "out"
    for sections, said in (
        ({"models": ("low",)}, "1 of them; expected two: zipit merges pairs"),
        ({"models": ("low", "low")}, "a model twice; expected two"),
        ({"models": ("low", "high", "low/../high")}, "3 of them; expected two"),
        ({"models": ({"model": "./low", "layer_range": [0, 1]}, "high")}, "layer_range: [0, 1] under `models`, and "),
        ({"base_model": "./low"}, "base_model: found"),
        ({"parameters": {"alpha": 0.3}}, "parameters: alpha: given with zipit; expected settings of `fit:`"),
        ({"surgery": FIT}, "surgery: found with zipit"),
        ({"tokenizer_source": "union"}, "tokenizer: found with zipit"),
        ({"fit": {}}, "fit.items: none"),
        ({"fit": FIT | {"alpha": 2}}, "fit.alpha"),
        ({"fit": FIT | {"beta": True}}, "beta: found true, expected a number"),
        ({"fit": FIT | {"gamma": 1}}, "fit.gamma: unknown key"),
        ({"fit": FIT | {"depth": 0.5, "layers": 1}}, "expected one of depth and layers"),
        ({"fit": FIT | {"layers": 4}}, "depth: 4 layers; expected at most the models' 3"),
        ({"fit": FIT | {"items": ["nowhere.jsonl"]}}, "nowhere.jsonl"),
        ({"models": ("low", str(family / "base"))}, "a ResNetForImageClassification and a LlamaForCausalLM"),
    ):
        for arguments in (("merge", out), ("fit", "--run-dir", out)):
            line = refused(world, *arguments, **sections)
            assert said in line and len(line.strip().splitlines()) == 1, line
            assert not out.exists()
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"kind": "generate", "prompt": "one", "answer": "two"}) + "\n")
    line = refused(world, "merge", out, fit={"items": [str(texts)] * 2, "heldout": 0})
    assert "is in another file too" in line
    line = refused(world, "merge", out, fit={"items": [str(texts)], "heldout": 0})
    assert "kind 'generate' for a ResNetForImageClassification" in line and not out.exists()
    line = refused(world, "fit", "--run-dir", out, "--memory-budget", "1GiB")
    assert "--memory-budget: given with zipit" in line
    assert "fit.heldout: found 0" in refused(world, "fit", "--run-dir", out, fit=FIT | {"heldout": 0})
    for command in (("fit", "--run-dir", out), ("merge", out)):
        assert "learns nothing" in refused(world, *command, method="linear")


def test_two_checkpoints_in_one_folder_are_refused(world, tmp_path):
    """transformers would read the other one than everything else here."""
    both = shutil.copytree(world / "low", tmp_path / "both")
    shutil.copyfile(both / "model.safetensors", both / "model-1.safetensors")
    index = {"weight_map": {name: "model-1.safetensors" for name in load_file(both / "model.safetensors")}}
    (both / "model.safetensors.index.json").write_text(json.dumps(index))
    line = refused(world, "merge", tmp_path / "out", models=(str(both), "high"))
    assert "model.safetensors.index.json and model.safetensors, which it does not name" in line


def test_a_task_that_is_nobodys(world):
    """Two results, and one file of all items: matched all the same, and not measured."""
    lines = (world / "low.jsonl").read_text() + (world / "high.jsonl").read_text()
    (world / "all.jsonl").write_text(lines.replace('"low"', '"all"').replace('"high"', '"all"'))
    recipe = write(world, "nobody.yaml", fit={"items": ["all.jsonl"], "layers": 1})
    done = client("fit", recipe, "--run-dir", world / "nobody", "--json", "--quiet", "--no-export")
    assert done.returncode == 0, done.stderr
    assert "heldout" not in json.loads(done.stdout)
    assert "task all is not measured: no model for it, and two results" in done.stderr


def test_folders_named_for_no_folder(world, monkeypatch):
    monkeypatch.chdir(world / "low")
    recipe = write(world, "dots.yaml", models=("low", "high"), fit=FIT | {"layers": 1})
    recipe.write_text(recipe.read_text().replace("./low", ".").replace("./high", "../high"))
    done = client("merge", recipe, world / "dots", "--json", "--quiet")
    assert done.returncode == 0 and json.loads(done.stdout)["results"] == {"first": "first", "second": "second"}


def test_other_commands_say_what_it_is(world):
    from merge3 import Recipe
    from merge3.errors import RecipeError
    from merge3.export import merge_to_disk

    with pytest.raises(RecipeError, match="'zipit', which matches units on items and makes a checkpoint"):
        merge_to_disk(Recipe.from_yaml(write(world)), world / "never")
    assert all(f"{name}: {row.summary}" in client("methods").stdout for name, row in ZIPPED.items())


def test_settings_say_their_own_mind():
    assert read_zip({"items": ["a"]}, "fit").reach == 1.0 and isinstance(read_zip({"depth": 1}, "fit").reach, float)
    assert read_zip({"layers": 1}, "fit").reach == 1 and isinstance(read_zip({"layers": 1}, "fit").reach, int)
    assert (ZipSettings().alpha, ZipSettings().beta, ZipSettings().per_task) == (0.3, 0.125, 64)
