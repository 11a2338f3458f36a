"""merge3-client compare: recipes, or every method's merge, asked the same items; merge3-client methods."""

import json
import math

import numpy as np
import pytest
import yaml

from merge3 import LocalEngine, Pool, Recipe, Registration, read_items
from merge3.client.compare_table import standings
from merge3.methods import LEARNED, METHODS, VARIANTS, ZIPPED
from merge3.methods.base import CHECKPOINT, DERIVED, LABELLED, NOTHING, PER_TASK, RECIPE, UNLABELLED
from merge3.tasks import Item
from tests.adapters.harness import make_models, make_tasks
from tests.classifiers import save_with_own_heads
from tests.commands import client

EXPERTS = ("english", "italian", "sorting")


def write(world, name, method="ties", experts=EXPERTS[:2], weight=0.5, **keys):
    data = {"merge_method": method, "base_model": "./base", "dtype": "float32"} | keys
    own = {"parameters": {"weight": weight}} if weight else {}
    data["models"] = [{"model": f"./{task}"} | own for task in experts]
    (world / name).write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}))
    return world / name


def compared(*arguments):
    done = client("compare", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(*arguments):
    """The one line."""
    done = client("compare", *arguments)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_rows_are_what_each_subject_alone_answers(solving_world, tmp_path):
    """Accuracies, errors and paired differences, computed here from what an engine of its own is told."""
    files = [solving_world / f"{task}.jsonl" for task in ("english", "sorting")]
    base, *experts = (solving_world / name for name in ("base", *EXPERTS[:2]))
    found = compared(
        "--base", base, "--models", *experts, "--items", *files, "--limit", 20, "--responses", tmp_path / "r.jsonl"
    )
    rows = {row["name"]: row for row in found["rows"]}
    assert {"base", "english", "italian", "uniform_linear", "ties", "breadcrumbs", "karcher", "nuslerp"} <= rows.keys()
    values = [row["accuracy"] for row in found["rows"]]
    assert values == sorted(values, reverse=True) and len(set(values)) > 3 and found["items"] == 40
    items = [item for file in files for item in read_items(file)[:20]]
    engine = LocalEngine(Pool.open(str(base), [str(expert) for expert in experts]))
    best, first = found["best_baseline"], found["rows"][0]["name"]
    answers = {}
    for name, row in rows.items():
        subject = Recipe.parse(row["recipe"]) if row["kind"] == "merge" else str(solving_world / name)
        (evaluation,) = engine.evaluate(Registration(tuple(items)), [subject])
        answers[name] = evaluation.answers()
        assert ("seconds" in row) == (row["kind"] == "merge")
    for name, row in rows.items():
        own, beside, ahead = (answers[key].reshape(2, 20) for key in (name, best, first))
        assert row["tasks"] == pytest.approx({"english": own[0].mean(), "sorting": own[1].mean()})
        assert row["difference"] == pytest.approx((own - beside).mean())
        error = math.sqrt(sum((own - beside)[i].var() / 20 for i in range(2))) / 2
        assert row["difference_stderr"] == pytest.approx(error)
        behind = math.sqrt(sum((ahead - own)[i].var() / 20 for i in range(2))) / 2
        assert row["level"] == ((ahead - own).mean() <= 2 * behind)
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    written = {name: np.array([line["score"] for line in lines if line["model"] == name]) for name in rows}
    assert all((written[name] == answers[name]).all() for name in rows)


def test_a_paired_error_is_smaller_than_that_of_either():
    items = [Item(str(i), "t", "generate", "p", ("a",)) for i in range(100)]
    easy = np.arange(100) < 60
    answers = {"base": easy * 1.0, "ties": easy * 1.0, "sum": np.zeros(100)}
    answers["ties"][60:64] = 1  # right where the base is, and four times more
    rows = [{"name": n, "kind": "model" if n == "base" else "merge", "accuracy": a.mean()} for n, a in answers.items()]
    found = standings(rows, answers, items)
    assert [row["name"] for row in found["rows"]] == ["ties", "base", "sum"] and found["best_baseline"] == "base"
    assert found["rows"][0]["difference"] == pytest.approx(0.04)
    assert found["rows"][0]["difference_stderr"] == pytest.approx(math.sqrt(0.04 * 0.96 / 100))
    assert [row["level"] for row in found["rows"]] == [True, False, False]


def test_methods_that_do_not_apply_are_listed_with_the_reason(tiny_world):
    arguments = ["--models", *(tiny_world / name for name in EXPERTS), "--items", tiny_world / "english.jsonl"]
    found = compared(*arguments, "--limit", 4, "--base", tiny_world / "base")
    names = {row["name"] for row in found["rows"]}
    assert found["items"] == 4 and names.isdisjoint(found["skipped"])
    assert found["skipped"]["slerp"] == "3 models beside the base; expected 1 for slerp"
    assert found["skipped"]["nuslerp"] == "3 models beside the base; expected 2 for nuslerp"
    assert {name: found["skipped"][name] for name in LEARNED} == {n: f"needs {r.needs}" for n, r in LEARNED.items()}
    for name, method in METHODS.items():  # nobody is forgotten
        assert {name, *method.by_hand} & (names | found["skipped"].keys()), name
    without = compared(*arguments, "--limit", 4)
    assert without["skipped"]["ties"] == "needs a base"
    assert {"uniform_linear", "karcher", "english"} <= {row["name"] for row in without["rows"]}


def test_methods_with_a_model_for_each_task_stand_beside(own_world):
    base, *experts = (own_world / name for name in ("base", *EXPERTS[:2]))
    own = [own_world / f"{task}.jsonl" for task in EXPERTS[:2]]
    found = compared("--base", base, "--models", *experts, "--items", *own, "--limit", 4)
    rows = {row["name"]: row for row in found["rows"]}
    assert {"emr, by task", "onebit, by task", "byom_fft, by task"} <= rows.keys()
    assert rows["emr, by task"]["kind"] == "merge" and rows["emr, by task"]["recipe"]["merge_method"] == "emr"
    assert "a LoRA adapter" in found["skipped"]["byom_lora, by task"]
    other = own_world / f"{EXPERTS[2]}.jsonl"  # nobody's task
    found = compared("--base", base, "--models", *experts, "--items", other, "--limit", 4)
    assert f"none for task '{EXPERTS[2]}'" in found["skipped"]["emr, by task"]
    recipe = write(own_world, "emr.yaml", "emr", weight=None)
    assert f"emr.yaml: tasks: none for task '{EXPERTS[2]}'" in refused(recipe, "--items", other)


def test_recipes_share_one_table(tiny_world, own_world):
    first = write(own_world, "first.yaml", experts=EXPERTS)
    second = write(own_world, "second.yaml", "linear", base_model=None)
    done = client("compare", first, second, "--items", own_world / "english.jsonl", own_world / "sorting.jsonl")
    assert done.returncode == 0, done.stderr
    for shown in ("accuracy on 80 items", "first", "second", "base", "italian", "over ", "≈: level with the first"):
        assert shown in done.stdout, shown
    assert "1/6  base: " in done.stderr and "6/6  second: " in done.stderr


def test_what_cannot_stand_in_one_table_is_refused_by_its_file(own_world):
    items = ["--items", own_world / "english.jsonl"]
    good = write(own_world, "good.yaml")
    cases = {
        "alone.yaml": ({"base_model": None}, "alone.yaml: slices[0]: base_model: missing"),
        "arc.yaml": (
            {"method": "model_stock", "experts": EXPERTS[:1], "weight": None},
            "arc.yaml: slices[0]: 1 models",
        ),
        "what.yaml": ({"method": "tyes"}, "what.yaml: merge_method: unknown method 'tyes'"),
        "fit.yaml": ({"method": "supermerge"}, "fit.yaml: merge_method"),
        "half.yaml": ({"dtype": "bfloat16"}, "half.yaml: dtype: found bfloat16,"),
        "words.yaml": ({"tokenizer_source": "union"}, "words.yaml: tokenizer: found tokenizer_source union,"),
        "tower.yaml": ({"tower": {"model.": "language_model."}}, "tower.yaml: tower"),
        "gone.yaml": ({"experts": ("english", "nowhere")}, "nowhere"),
    }
    for name, (keys, said) in cases.items():
        assert said in refused(good, write(own_world, name, **keys), *items), name
    assert "given twice" in refused(good, good, *items)
    assert "neither --items nor --task" in refused(good)
    assert "nowhere.jsonl" in refused(good, f"--items={own_world / 'english.jsonl'}", own_world / "nowhere.jsonl")
    assert "neither recipes nor --models" in refused(*items)
    assert "one of them" in refused(good, *items, "--models", own_world / "english")
    assert "each model once" in refused(*items, "--base", own_world / "base", "--models", own_world / "base")
    assert "bad.jsonl" in refused(good, "--items", own_world / "bad.jsonl")
    assert "is in another file too" in refused(good, *items, own_world / "english.jsonl")


def test_own_heads_answer_the_tasks_that_are_named_as_their_models(tmp_path):
    """Which questions a head answers nobody says, and no merge has it."""
    save_with_own_heads(tmp_path, {"base": 2, "colour": 3, "shape": 2})
    for task, labels in (("colour", 3), ("shape", 2), ("size", 2)):
        lines = [
            {"id": str(i), "kind": "classify", "prompt": f"w{i}", "answer": f"{task}-{i % labels}"} for i in range(12)
        ]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(line | {"task": task}) + "\n" for line in lines))
    models = ["--base", tmp_path / "base", "--models", tmp_path / "colour", tmp_path / "shape"]
    found = compared(*models, "--items", tmp_path / "colour.jsonl", tmp_path / "shape.jsonl")
    assert {row["name"] for row in found["rows"]} >= {"base", "colour", "uniform_linear"}
    assert all("error" not in row for row in found["rows"])
    assert "task 'size': no model of this name" in refused(*models, "--items", tmp_path / "size.jsonl")


def test_tasks_of_lm_evals_stand_beside_items(tmp_path):
    """With the accuracy that evaluate has for a model alone."""
    pytest.importorskip("lm_eval")
    make_models(tmp_path)
    make_tasks(tmp_path)
    lines = [{"id": str(i), "task": "own", "kind": "generate", "prompt": "red cat", "answer": "near"} for i in range(3)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["--task", "h_choice", "--task-path", tmp_path, "--limit", 8]
    models = ["--base", tmp_path / "base", "--models", tmp_path / "e0", tmp_path / "e1"]
    found = compared(*models, "--items", tmp_path / "own.jsonl", *asked)
    done = client("evaluate", tmp_path / "e0", *asked, "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["e0"]["tasks"]["h_choice"] == json.loads(done.stdout)["tasks"]["h_choice"]["accuracy"]
    assert rows["ties"]["tasks"].keys() == {"own", "h_choice"} and found["items"] == 11


# -- merge3-client methods


def test_every_row_says_what_it_needs_and_what_it_ends_in():
    found = json.loads(client("methods", "--json").stdout)
    text = client("methods").stdout
    for name, row in (METHODS | LEARNED | VARIANTS | ZIPPED).items():
        told = found[name]
        assert (told["summary"], told["source"]) == (row.summary, row.reference)
        assert told["needs"] in (NOTHING, UNLABELLED, LABELLED)
        assert told["result"] in (RECIPE, DERIVED, PER_TASK, CHECKPOINT)
        assert f"needs: {told['needs']}; result: {told['result']}" in text and f"{name}: {row.summary}" in text
    assert found["linear"]["needs"] == NOTHING and found["supermerge"]["needs"] == LABELLED
    assert found["adamerging"]["needs"] == UNLABELLED and found["adamerging++"]["result"] == DERIVED


def test_a_method_that_derives_says_so():
    for name, method in METHODS.items():
        assert (method.derive is not None) == (method.result == DERIVED), name
