"""merge3-client study: the grid, what is tuned, what is killed, what the numbers say."""

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml

from merge3 import LocalEngine, Pool, Recipe, Registration, read_items
from merge3.client.study_cells import Questions
from merge3.client.study_config import StudyConfig, StudyMethod, World, read_study, recipe_of, subsets_of
from merge3.client.study_findings import FINDINGS, findings, interval, verdict
from merge3.client.study_journal import packed, unpacked
from merge3.client.study_numbers import DRAWS, Numbers, item_weights, subset_weights
from merge3.files import Held
from merge3.search.seeds import seed_of
from merge3.tasks import Item, split_heldout
from tests.classifiers import make_classifier, save_with_own_heads, save_words
from tests.commands import client

TASKS, OUTSIDE = ("a", "b", "c", "d"), "e"


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Two bases, four experts of each that differ by noise, twenty questions for each and for a task of nobody."""
    root = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    for place, world in enumerate(("one", "two")):
        model = make_classifier(2, seed=place, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
        start = {name: value.clone() for name, value in model.state_dict().items()}
        for number, name in enumerate(("base", *TASKS)):
            g = torch.Generator().manual_seed(10 * place + number)
            with torch.no_grad():
                for key, value in model.named_parameters():
                    value.copy_(start[key] + (0.01 * torch.randn(value.shape, generator=g) if number else 0))
            model.save_pretrained(root / world / name)
        save_words(*(root / world / name for name in ("base", *TASKS)))
    (root / "items").mkdir()
    for task in (*TASKS, OUTSIDE):
        lines = []
        for i in range(20):
            prompt = " ".join(f"w{w}" for w in rng.integers(20, size=3))
            lines.append({"id": str(i), "task": task, "kind": "classify", "prompt": prompt,
                          "answer": str(rng.choice(["no", "yes"]))})  # fmt: skip
        (root / "items" / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def content(worlds=("one", "two"), **keys):
    data = {"methods": ["linear", {"merge_method": "ties", "parameters": {"weight": 1.0, "density": 0.5}}]}
    data |= {"experts": [2, 3], "subsets": 2, "seed": 3, "worlds": []}
    for width, world in enumerate(worlds, 1):
        experts = {task: f"{world}/{task}" for task in TASKS}
        data["worlds"].append({"name": world, "width": width, "quality": "plain", "base": f"{world}/base",
                               "experts": experts, "items": "items"})  # fmt: skip
    return data | keys


def write(root, data, name="study.yaml"):
    (root / name).write_text(yaml.safe_dump(data))
    return root / name


def ran(root, data, run, *options):
    done = client("study", write(root, data), "--run-dir", run, "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def finished(worlds):
    """(result, what was said, the run's directory) of a study with something to tune."""
    return *ran(worlds, content(tune={"lambda": [0.3, 1.0]}), worlds / "run"), worlds / "run"


def test_every_cell_is_what_its_merge_answers(finished, worlds):
    """By an engine of its own: the value that is best on the items to tune by, then the others; shares of experts."""
    result, _, _ = finished
    assert len(result["cells"]) == 2 * 2 * 2 * 2
    files = [worlds / "items" / f"{task}.jsonl" for task in (*TASKS, OUTSIDE)]
    items = [item for file in files for item in read_items(file)]
    measured, tuning = split_heldout(items, 0.3, seed_of("held-out", 3))
    assert len(measured) == 70 and len(tuning) == 30
    world = "two"
    engine = LocalEngine(Pool.open(str(worlds / world / "base"), [str(worlds / world / task) for task in TASKS]))

    def accuracy(subject, task, asked=measured):
        own = [item for item in asked if item.task == task]
        return next(engine.evaluate(Registration(tuple(own), seed=3), [subject])).value

    def merge(subset, method, **parameters):
        data = {"merge_method": method, "models": [{"model": str(worlds / world / task)} for task in subset]}
        data |= {"parameters": parameters} | (
            {} if method == "linear" else {"base_model": str(worlds / world / "base")}
        )
        return Recipe.parse(data)

    seen = set()
    for cell in (cell for cell in result["cells"] if cell["world"] == world):
        subset = cell["subset"]
        tried = [merge(subset, "linear", weight=1.0)]
        if cell["method"] == "ties":
            tried = [merge(subset, "ties", weight=1.0, density=0.5, **{"lambda": value}) for value in (0.3, 1.0)]
        values = [np.mean([accuracy(recipe, task, tuning) for task in subset]) for recipe in tried]
        recipe = tried[int(np.argmax(values))]
        assert cell["parameters"] == recipe.to_dict()["parameters"]
        seen.add(cell["parameters"].get("lambda"))
        of_base = accuracy(str(worlds / world / "base"), OUTSIDE)
        shares = [accuracy(recipe, task) / accuracy(str(worlds / world / task), task) for task in subset]
        assert cell["heldin"] == pytest.approx(np.mean(shares))
        assert cell["heldout"] == pytest.approx(accuracy(recipe, OUTSIDE) / of_base)
    assert None in seen and len(seen) > 1
    ratios = [accuracy(str(worlds / world / "base"), t) / accuracy(str(worlds / world / t), t) for t in TASKS]
    assert result["worlds"][1]["base_share"]["value"] == pytest.approx(np.mean(ratios))
    means = {(mean["method"], mean["experts"]): mean for mean in result["means"] if mean["world"] == world}
    own = [c["heldin"] for c in result["cells"] if (c["world"], c["method"], len(c["subset"])) == (world, "ties", 2)]
    told = means["ties", 2]["heldin"]
    assert told["value"] == pytest.approx(np.mean(own)) and told["low"] < told["value"] < told["high"]


def test_what_a_study_leaves(finished):
    result, said, run = finished
    assert {path.name for path in run.iterdir()} == {
        "study.jsonl", "result.json", "report.html", "cells.csv", "means.csv",
    }  # fmt: skip
    assert json.loads((run / "result.json").read_text()) == result
    lines = said.splitlines()
    assert lines[-1].startswith("16/16  two, ties, 3 experts (") and lines[-1].endswith("0:00 left")
    report = (run / "report.html").read_text()
    assert report.count("<svg") == 2 and report.count('class="grid"') == 2 * 2 * 5
    for shown in ("does not show", "linear", "two", "Other tasks", "95 %"):
        assert shown in report, shown
    with open(run / "means.csv") as file:
        rows = list(csv.DictReader(file))
    found = {(row["world"], row["method"], int(row["experts"])) for row in rows}
    assert len(rows) == 8 and found == set(itertools.product(("one", "two"), ("linear", "ties"), (2, 3)))
    assert all(float(row["heldin low"]) <= float(row["heldin"]) <= float(row["heldin high"]) for row in rows)
    with open(run / "cells.csv") as file:
        assert sum(1 for _ in csv.DictReader(file)) == 16
    asked = {found["finding"]: found["verdict"] for found in result["findings"]}
    assert list(asked) == list(FINDINGS) and list(asked.values()).count("not asked") == 1  # one quality alone


def without_seconds(result):
    cells = [{key: value for key, value in cell.items() if key != "seconds"} for cell in result["cells"]]
    return result | {"cells": cells}


@pytest.mark.heavy
def test_a_killed_study_goes_on_to_the_same_result(worlds, tmp_path):
    """kill -9, a line that is half written, and again from there."""
    data = content(methods=["linear", "ties", {"merge_method": "dare_ties", "name": "dare"}, "breadcrumbs"])
    data["experts"] = [2, 3, 4]
    whole, _ = ran(worlds, data, tmp_path / "whole", "--quiet")
    file, run = write(worlds, data, "killed.yaml"), tmp_path / "killed"
    command = [sys.executable, "-m", "merge3.client", "study", str(file), "--run-dir", str(run), "--quiet"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    journal = run / "study.jsonl"
    deadline = time.monotonic() + 240
    while not journal.exists() or journal.read_bytes().count(b"\n") < 12:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) < 50 and not (run / "result.json").exists()
    kept = [json.loads(line) for line in lines if line.endswith(b"\n")]
    with open(journal, "ab") as handle:
        handle.write(b'{"world": "one", "meth')
    result, said = ran(worlds, data, run, "--resume")
    assert without_seconds(result) == without_seconds(whole)
    cells = [line for line in kept if "method" in line]
    assert said.splitlines()[1].startswith(f"{len(cells) + 1}/40  ")
    again = [json.loads(line) for line in journal.read_text().splitlines()]
    assert again[: len(kept)] == kept and len(again) == 1 + 2 * (1 + 5) + 40  # nothing was answered twice


def refused(root, data, run, *options, name="bad.yaml"):
    """What is said besides notes."""
    done = client("study", write(root, data, name), "--run-dir", run, *options)
    assert done.returncode == 2, done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    return last


def test_a_run_is_continued_by_the_same_study_alone(worlds, tmp_path):
    root = shutil.copytree(worlds, tmp_path / "worlds")
    data = content(("one",), methods=["linear"], experts=[2], subsets=1)
    run = tmp_path / "run"
    assert "no study.jsonl" in refused(root, data, run, "--resume")
    ran(root, data, run)
    assert "not empty; expected a new directory, or --resume" in refused(root, data, run)
    assert "study: found" in refused(root, data | {"subsets": 2}, run, "--resume")
    moved = shutil.copytree(root, tmp_path / "moved")  # by place, not by path
    ran(moved, data, run, "--resume")
    with Held(run):
        assert "run: in use by another process" in refused(moved, data, run, "--resume")
    journal = (run / "study.jsonl").read_text()
    (run / "study.jsonl").write_text(journal.replace('"model": "b"', '"model: "b"'))
    assert "damaged" in refused(root, data, run, "--resume")
    *lines, last = journal.splitlines(keepends=True)
    (run / "study.jsonl").write_text("".join(lines))
    shutil.copy(root / "one" / "b" / "model.safetensors", root / "one" / "a" / "model.safetensors")
    assert "its checkpoints have changed" in refused(root, data, run, "--resume")
    with open(root / "items" / "a.jsonl", "a") as file:
        line = {"id": "new", "task": "a", "kind": "classify", "prompt": "w1", "answer": "yes"}
        file.write(json.dumps(line) + "\n")
    assert "items of one: found" in refused(root, data, run, "--resume")


def test_fewer_subsets_than_asked_are_all_there_are_and_said(worlds, tmp_path):
    result, said = ran(worlds, content(("one",), experts=[3, 4], subsets=9, methods=["linear"]), tmp_path / "run")
    assert "3 of 4 experts: 4 subsets, not the 9 asked: all of them" in said
    assert "4 of 4 experts: 1 subset, not the 9 asked: all of them" in said
    assert [cell["subset"] for cell in result["cells"]] == [*map(list, itertools.combinations(TASKS, 3)), list(TASKS)]


def test_subsets_are_drawn_by_the_seed_alone():
    names = [f"t{i}" for i in range(8)]
    drawn = subsets_of(names, 4, 6, seed=1)
    assert len(set(drawn)) == 6 and all(len(set(subset)) == 4 for subset in drawn)
    assert drawn == subsets_of(names[::-1], 4, 6, seed=1) != subsets_of(names, 4, 6, seed=2)
    assert drawn[:3] == subsets_of(names, 4, 3, seed=1)  # more of them keep those


def test_a_merge_without_answers_is_told_and_counts_for_nothing(worlds, tmp_path):
    """Never as a wrong answer."""
    huge = {"merge_method": "task_arithmetic", "name": "huge", "parameters": {"weight": 3e38, "lambda": 1e6}}
    data = content(("one",), methods=["linear", huge], experts=[2, 3])
    result, said = ran(worlds, data, tmp_path / "run")
    cells = [cell for cell in result["cells"] if cell["method"] == "huge"]
    assert len(cells) == 4 and all("error" in cell and "heldin" not in cell for cell in cells)
    assert "no answers" in said and "Without answers" in (tmp_path / "run" / "report.html").read_text()
    for mean in result["means"]:
        assert (mean["heldin"]["value"] is None) == (mean["method"] == "huge")
    found = {line["finding"]: line for line in result["findings"]}
    told = found["the more experts, the less of each is kept"]
    assert told["value"] is not None and told["of"].endswith("; without huge")


def test_without_tasks_of_nobody_those_that_are_left_out_count(worlds, tmp_path):
    data = content(("one",), methods=["linear"], experts=[3, 4], subsets=1)
    data["worlds"][0]["heldout"] = []
    result, _ = ran(worlds, data, tmp_path / "run")
    first, last = result["cells"]
    (left,) = set(TASKS) - set(first["subset"])
    experts = result["worlds"][0]["experts"]
    assert first["heldout"] == pytest.approx(first["tasks"][left] / experts[left])
    assert last["heldout"] is None and OUTSIDE not in last["tasks"]


def test_where_every_model_has_its_own_head_a_task_says_whose(tmp_path):
    save_with_own_heads(tmp_path, {"base": 2, "a": 2, "b": 3})
    for task, head, labels in (("a", "a", 2), ("b", "b", 3), ("e", "a", 2)):
        lines = []
        for i in range(20):
            line = {"id": str(i), "task": task, "kind": "classify", "prompt": f"w{i}", "answer": f"{head}-{i % labels}"}
            lines.append(json.dumps(line) + "\n")
        (tmp_path / f"{task}.jsonl").write_text("".join(lines))
    world = {"name": "own", "base": "base", "experts": {"a": "a", "b": "b"}, "items": ["a.jsonl", "b.jsonl", "e.jsonl"]}
    data = {"methods": ["linear"], "experts": [2], "worlds": [world]}
    assert "heads: none for task 'e'" in refused(tmp_path, data, tmp_path / "refused")
    data["worlds"][0]["heads"] = {"e": "a"}
    result, _ = ran(tmp_path, data, tmp_path / "run")
    (cell,) = result["cells"]
    engine = LocalEngine(Pool.open(str(tmp_path / "base"), [str(tmp_path / "a"), str(tmp_path / "b")]))
    merge = {"merge_method": "linear", "parameters": {"weight": 1.0}}
    merge["models"] = [{"model": str(tmp_path / task)} for task in ("a", "b")]
    for task, head in (("a", "a"), ("b", "b"), ("e", "a")):
        asked = Registration(tuple(read_items(tmp_path / f"{task}.jsonl")), heads={task: str(tmp_path / head)})
        assert cell["tasks"][task] == next(engine.evaluate(asked, [Recipe.parse(merge)])).value


BAD = {
    "unknown method": ({"methods": ["tyes"]}, "methods: tyes: unknown method 'tyes'"),
    "a learned method": ({"methods": ["supermerge"]}, "which learns its weights from items"),
    "a method of one expert": ({"methods": ["slerp"]}, "methods: slerp: 2 experts; expected 1"),
    "a method twice": ({"methods": ["ties", "ties"]}, "methods: 'ties' twice; expected different ones"),
    "no such parameter": ({"methods": [{"merge_method": "ties", "parameters": {"densty": 1}}]}, "did you mean"),
    "not a number": (
        {"methods": [{"merge_method": "ties", "parameters": {"weight": float("nan")}}]},
        "ties.weight: found nan; expected a number",
    ),
    "more experts than there are": ({"experts": [2, 5]}, "experts: found 5; expected 1 to 4"),
    "no experts": ({"experts": [0]}, "experts: found 0; expected 1 to 4"),
    "experts twice": ({"experts": [2, 2]}, "experts: 2 twice"),
    "half an expert": ({"experts": [2.5]}, "experts.0: found 2.5"),
    "NaN experts": ({"experts": [float("nan")]}, "experts.0: found nan"),
    "no subsets": ({"subsets": 0}, "subsets: found 0"),
    "a world twice": ({"worlds": content(("one", "one"))["worlds"]}, "worlds: 'one' twice"),
    "no worlds": ({"worlds": []}, "worlds: found []"),
    "an unknown key": ({"wrlds": []}, "wrlds: unknown key"),
    "NaN to tune": ({"tune": {"lambda": [float("nan")]}}, "tune.lambda: found nan"),
    "nothing to tune": ({"tune": {"lambda": []}}, "tune.lambda: no values"),
    "an equal value": ({"tune": {"lambda": [1, 1.0]}}, "tune.lambda: 1.0 twice"),
    "nobody's parameter": ({"tune": {"lamda": [1.0]}}, "tune.lamda: no method has it"),
    "tuned and given": ({"tune": {"density": [0.5]}}, "ties.density: given, and tuned"),
    "too small a share": ({"tune": {"lambda": [1, 2]}, "tune_share": 0.01}, "20 items, of which a held-out fraction"),
    "a dtype": ({"dtype": "float12"}, "dtype: found 'float12'"),
}  # fmt: skip
BAD_WORLD = {
    "an unknown key": ({"itms": "items"}, "worlds.0.itms: unknown key"),
    "NaN width": ({"width": float("nan")}, "worlds.0.width: found nan"),
    "no such items": ({"items": "nowhere"}, "nowhere"),
    "no items in the folder": ({"items": "one"}, "no .jsonl in "),
    "no items of a task": ({"items": ["items/a.jsonl", "items/b.jsonl"]}, "experts.c: no items of this task"),
    "items twice": ({"items": ["items", "items/a.jsonl"]}, "is in another file too"),
    "no such expert": ({"experts": {"a": "one/a", "b": "one/b", "c": "one/nobody"}}, "nobody"),
    "an expert twice": ({"experts": {"a": "one/a", "b": "one/a", "c": "one/c"}}, "twice; expected different ones"),
    "the base among them": ({"experts": {"a": "one/a", "b": "one/b", "c": "one/base"}}, "is an expert too"),
    "no such task": ({"heldout": ["z"]}, "heldout: no items of task 'z'"),
    "a task of an expert": ({"heldout": ["a"]}, "heldout: 'a' has an expert"),
}  # fmt: skip


@pytest.mark.parametrize("change, said", BAD.values(), ids=BAD)
def test_what_is_wrong_with_a_study_is_one_line_before_anything_is_made(worlds, tmp_path, change, said):
    assert said in refused(worlds, content(("one",)) | change, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change, said", BAD_WORLD.values(), ids=BAD_WORLD)
def test_what_is_wrong_with_a_world_is_one_line_before_the_first_cell(worlds, tmp_path, change, said):
    data = content(("one",))
    data["worlds"][0] |= change
    assert said in refused(worlds, data, tmp_path / "run")
    journal = tmp_path / "run" / "study.jsonl"
    assert not journal.exists() or journal.read_text().count("\n") == 1


@pytest.mark.parametrize("text", ["", "[]", "methods: [", "methods: {a: 1}", "worlds: 3", "experts: all"])
def test_a_file_that_is_no_study(worlds, tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    done = client("study", tmp_path / "bad.yaml", "--run-dir", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


# -- numbers


def test_intervals_are_as_wide_as_items_and_subsets_make_them():
    """Of one task's mean over n items sqrt(p(1 - p) / n); of a mean over k subsets their spread over sqrt(k)."""
    items = tuple(Item(str(i), "t", "generate", "p", ("a",)) for i in range(400))
    weights = np.stack(list(item_weights({"w": Questions((), items, ())}, seed=0).values()))
    right = (np.arange(400) < 100) * 1.0
    means = right @ (weights / weights.sum(0))
    assert means[0] == pytest.approx(0.25) and means[1:].std() == pytest.approx((0.25 * 0.75 / 400) ** 0.5, rel=0.1)
    values = np.array([0.1, 0.2, 0.6])
    drawn = subset_weights([("a", "b"), ("a", "c"), ("b", "c")], True, seed=0)
    means = values @ (drawn / drawn.sum(0))
    assert means[0] == pytest.approx(0.3) and means[1:].std() == pytest.approx(values.std(ddof=1) / 3**0.5, rel=0.1)
    assert (subset_weights([("a", "b"), ("a", "c")], False, seed=0) == 1).all()  # all there are


def invented(share):
    """Numbers of two widths and qualities, three methods, two numbers of experts, from a function of these."""
    worlds = []
    for width, quality in itertools.product((32, 64), ("weak", "strong")):
        paths = {"base": "x", "experts": {t: t for t in TASKS}, "items": "i"}
        worlds.append(World(name=f"{width} {quality}", width=width, quality=quality, **paths))
    methods = [StudyMethod(merge_method=name) for name in ("linear", "ties", "ram")]
    config = StudyConfig(methods=methods, experts=(2, 4), worlds=worlds)
    rng, grid = np.random.default_rng(0), {}
    noise = lambda: np.append(0, 0.01 * rng.standard_normal(DRAWS))
    for world, (place, method), count in itertools.product(worlds, enumerate(methods), (2, 4)):
        values = share(world.width, world.quality, place, count)
        grid[world.name, method.label, count] = {key: value + noise() for key, value in values.items()}
    base = {world.name: np.full(1 + DRAWS, 0.4 if world.quality == "weak" else 0.6) for world in worlds}
    return Numbers(config, grid, base)


def test_findings_are_shown_where_they_are_so_and_nowhere_else():
    def like_the_paper(width, quality, place, count):
        spread = 0.1 if width == 32 else 0.02
        share = 0.8 + 0.1 * (quality == "strong") + 0.05 * (width == 64) - 0.05 * count + spread * (place - 1)
        return {"heldin": share, "heldout": 0.9 + 0.04 * count}

    found = findings(invented(like_the_paper))
    assert [line["verdict"] for line in found] == ["shows"] * 5
    assert [line["value"] for line in found] == pytest.approx([0.1, 0.05, 0.1, 0.08, 0.16])

    def against_it(width, quality, place, count):
        spread = 0.1 if width == 64 else 0.02
        share = 0.8 - 0.1 * (quality == "strong") - 0.05 * (width == 64) + 0.05 * count + spread * (place - 1)
        return {"heldin": share, "heldout": 0.9 - 0.04 * count}

    assert [line["verdict"] for line in findings(invented(against_it))] == ["shows the opposite"] * 5
    alike = findings(invented(lambda *_: {"heldin": 0.8, "heldout": 0.9}))
    assert [line["verdict"] for line in alike] == ["does not show"] * 5


def test_a_verdict_needs_an_interval_on_one_side():
    assert verdict({"low": 0.01, "high": 0.2}) == "shows"
    assert verdict({"low": -0.01, "high": 0.2}) == "does not show" == verdict({"low": 0.0, "high": 0.2})
    assert verdict({"low": -0.2, "high": -0.01}) == "shows the opposite"
    assert interval(np.full(1 + DRAWS, np.nan)) == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize("responses", [[0.0, 1.0, 1.0], [0.25, 1.0, 1 / 3]])
def test_responses_come_back_from_a_line_as_they_were(responses):
    line = json.loads(json.dumps(packed(np.array(responses))))
    assert unpacked(line).tolist() == responses


def test_a_plain_name_has_the_parameters_that_one_would_pick_by_hand(worlds):
    config = read_study(write(worlds, content(methods=["dare_ties", "sce", "breadcrumbs"], experts=[4])))
    world = config.worlds[0]
    found = {}
    for method in config.methods:
        (parameters,) = config.settings(method, 4)
        found[method.label] = recipe_of(config, method, world, TASKS, parameters).to_dict()["parameters"]
    assert found == {
        "dare_ties": {"weight": 0.25, "density": 0.5},
        "sce": {"select_topk": 1.0},
        "breadcrumbs": {"weight": 0.25, "density": 0.5},
    }
