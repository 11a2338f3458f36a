"""A new item kind is one row: read, fitted, sent to a daemon and scored, and no module knows of it."""

import json

import pytest
import torch

from merge3.errors import ItemsError
from merge3.rpc import convert
from merge3.tasks import Scorer, read_items
from merge3.tasks.fit import fit_items
from merge3.tasks.kinds import KINDS, Kind
from merge3.tasks.requests import Start

# -- the kind's file


def answer(given, choices, metric, where):
    if isinstance(given, str) and given:
        return given
    raise ItemsError(where, f"answer is {given!r}", "a word")


def request(item, reader):
    _, tokens = reader.prompt(item)
    return Start(tokens, 1)


def right(item, found):
    return float(found.text == item.answer)


def length(item, found):
    """Half a point for any word of two letters: responses need not be 0 or 1."""
    return 0.5 * (len(found.text) == 2)


# -- and its row

ROW = Kind((), {"right": right, "length": length}, answer, request, "generate")


@pytest.fixture
def first_token(monkeypatch):
    monkeypatch.setitem(KINDS, "first_token", ROW)


def write(path, *rows):
    path.write_text("".join(json.dumps({"kind": "first_token"} | row) + "\n" for row in rows))
    return path


def test_a_row_is_a_kind(world, tmp_path, first_token):
    folder, tokenizer, models = world
    prompts = [f"w{i} w{2 * i + 1} w{i + 30}" for i in range(12)]
    found = []
    for prompt in prompts:  # what the model writes, by a plain forward
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        found.append(tokenizer.decode(models["llama"](ids).logits[0, -1].argmax(), skip_special_tokens=True))
    rows = [{"prompt": p, "answer": word or "w0"} for p, word in zip(prompts, found)]
    rows[1]["answer"] += "x"  # a wrong one
    rows += [{"prompt": prompts[2], "answer": "w1", "metric": "length"}]
    rows += [{"kind": "choice", "prompt": prompts[0], "choices": ["w1", "w2 w3"], "answer": 0}]
    items = read_items(write(tmp_path / "t.jsonl", *rows))
    assert items[0].metric == "right" and items[0].answer == rows[0]["answer"]
    responses = Scorer(items, models["llama"], folder).score(models["llama"])
    expected = [float(word != "") for word in found]
    expected[1] = 0.0
    assert sum(expected) > 6 and responses[:12].tolist() == expected
    assert responses[12] == 0.5 * (len(found[2]) == 2) and responses[13] in (0.0, 1.0)
    alone = Scorer(items[13:], models["llama"], folder).score(models["llama"])
    assert responses[13] == alone[0]


def test_a_row_checks_and_names_its_own(world, tmp_path, first_token):
    folder, tokenizer, models = world
    good = {"prompt": "w1 w2", "answer": "w3"}
    for row, message in (
        ({"answer": 3}, "line 1: answer is 3; expected a word"),
        ({"metric": "exact"}, "line 1: metric is 'exact'; expected right, length"),
        ({"kind": "last_token"}, "'last_token'; expected choice, generate, classify, rank, forced, first_token"),
    ):
        with pytest.raises(ItemsError, match=message):
            read_items(write(tmp_path / "t.jsonl", good | row))
    items = read_items(write(tmp_path / "t.jsonl", good, good | {"prompt": " ".join(["w1"] * 128)}))
    with pytest.raises(ItemsError, match=r"line 2: .*prompt of 128 tokens \+ max_tokens 1 = 129; expected at most 128"):
        Scorer(items, models["llama"], folder)
    fitted = fit_items(items, tokenizer, 128, "skip")
    assert fitted.items == items[:1] and fitted.skipped == {"t": 1}
    message = convert.item_to(items[0])
    assert convert.item_from(message, "item 0") == items[0]
    pictures = read_items(write(tmp_path / "u.jsonl", good | {"image": "x.npy"}))
    with pytest.raises(ItemsError, match="line 1: .*an image, and kind 'first_token'; expected a kind that reads im"):
        Scorer(pictures, models["llama"], folder)


def test_a_new_kind_for_a_head_is_refused_for_a_language_model(world, tmp_path, monkeypatch):
    folder, _, models = world
    monkeypatch.setitem(KINDS, "first_token", Kind((), {"right": right}, answer, request, "logits"))
    items = read_items(write(tmp_path / "t.jsonl", {"prompt": "w1 w2", "answer": "w3"}))
    expected = "classify or first_token for classification heads, choice or generate or forced for language models"
    with pytest.raises(ItemsError, match=f"kind 'first_token' for a LlamaForCausalLM; expected {expected}"):
        Scorer(items, models["llama"], folder)
