"""A model whose logits are NaN or infinite where it is scored has no answer: that is said, and not scored as wrong."""

import copy
import json
import re
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from merge3.client import cli, run
from merge3.engine import LocalEngine
from merge3.errors import ConfigError, ItemsError
from merge3.pool import Pool
from merge3.registration import Registration
from merge3.search.config_files import load_config
from merge3.search.journal import Journal
from merge3.space import Space, SpaceDefinition
from merge3.tasks import Item, LogitsError, Scorer
from merge3.tasks.forward import likeliest
from merge3.tasks.kinds import KINDS
from merge3.tasks.likelihoods import PlainRows, SharedRows
from merge3.tasks.prompts import Reader
from merge3.tasks.requests import share_prefix
from tests.asking import answers


def text(count, first=0):
    return " ".join(f"w{(first + i) % 60}" for i in range(count))


def choices(prefix=0, count=4):
    return [
        Item(
            f"c{i}",
            "c",
            "choice",
            f"{text(prefix)} w{i} w{2 * i + 1}".strip(),
            i % 2,
            (text(1, i + 30), text(2, i + 40)),
            "acc",
        )
        for i in range(count)
    ]


def generates(prefix=0, count=3):
    return [
        Item(f"g{i}", "g", "generate", f"{text(prefix)} w{i} w3".strip(), ("w1",), metric="exact", max_tokens=3)
        for i in range(count)
    ]


def rows(items, tokenizer, kind):
    """The items' question as one kind of rows asks it."""
    prefix, rest = share_prefix([KINDS[item.kind].request(item, Reader(tokenizer)) for item in items])
    return (SharedRows if kind == "shared" else PlainRows)(prefix, rest, "cpu", torch.float32, 4096)


class Changed(torch.nn.Module):
    """A model whose logits go through a function."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change
        self.config, self.generation_config = model.config, model.generation_config

    def forward(self, *args, logits_to_keep=0, **kwargs):
        out = self.model(*args, logits_to_keep=logits_to_keep, **kwargs)
        out.logits = self.change(out.logits.clone())
        return out


def put(value, *tokens):
    """A function that puts a value at these tokens of every row (all: no tokens given)."""

    def change(logits):
        logits[..., list(tokens) if tokens else slice(None)] = value
        return logits

    return change


LEAST = "item '[cg]0' of task '[cg]': the model's logits are NaN or infinite here; expected numbers"


@pytest.mark.parametrize("where", ["mlp", "head"])
@pytest.mark.parametrize(
    "items",
    [choices(), choices(20), generates(), generates(20)],
    ids=["choice", "prefix", "generate", "prefix generate"],
)
def test_finite_weights_with_infinite_logits(world, overflow, items, where):
    folder, _, models = world
    model = copy.deepcopy(models["llama"])
    scorer = Scorer(items, model, folder)
    assert np.isfinite(scorer.score(model)).all()
    overflow(model, where)
    with pytest.raises(LogitsError, match=LEAST):
        scorer.score(model)


@pytest.mark.parametrize("prefix", [0, 20])
def test_no_warning_of_masks_and_no_verdict_from_broken_weights(world, overflow, prefix):
    folder, _, models = world
    broken = copy.deepcopy(models["llama"])
    overflow(broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer = Scorer(choices(prefix), broken, folder)
        with pytest.raises(LogitsError, match=LEAST):
            scorer.score(broken)
        # With other weights in its place the same scorer answers, and new ones find out that masks are honoured.
        broken.load_state_dict(models["llama"].state_dict())
        expected = Scorer(choices(prefix), models["llama"], folder).score(models["llama"])
        assert np.array_equal(scorer.score(broken), expected)
        assert type(Scorer(choices(prefix), broken, folder).asked[0].question) is SharedRows


BROKEN = {
    "nan elsewhere": put(torch.nan, 5),
    "infinity elsewhere": put(torch.inf, 5),
    "all nan": put(torch.nan),
    "nothing possible": put(-torch.inf),
    "all infinite": put(torch.inf),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("kind", ["shared", "plain", "generate"])
def test_every_way_to_have_no_answer(world, case, kind):
    folder, tokenizer, models = world
    model = Changed(models["llama"], BROKEN[case])
    scorer = Scorer(generates() if kind == "generate" else choices(), models["llama"], folder)
    if kind == "plain":
        scorer.asked = [replace(scorer.asked[0], question=rows(choices(), tokenizer, kind))]
    with pytest.raises(LogitsError, match=LEAST):
        scorer.score(model)
    assert {result for _, result in scorer.asked[0].question(model)} == {None}


@pytest.mark.parametrize("kind", ["shared", "plain"])
def test_excluded_words_are_legal(world, kind):
    _, tokenizer, models = world
    items = choices(count=2)
    question = rows(items, tokenizer, kind)
    asked = [KINDS["choice"].request(item, Reader(tokenizer)).choices for item in items]
    used = {token for texts in asked for choice in texts for token in choice}
    others = [token for token in range(62) if token not in used]
    plain = dict(question(models["llama"]))
    for index, masked in question(Changed(models["llama"], put(-torch.inf, *others))):
        assert (masked.sums > plain[index].sums).all() and masked.sums.isfinite().all()
    # One choice excluded: the other is the likelier. Both excluded: none is.
    first, second = (choice[0] for choice in asked[0])

    def score(*tokens):
        found = dict(question(Changed(models["llama"], put(-torch.inf, *tokens))))
        return KINDS["choice"].response(items[0], found[0])

    assert items[0].answer == 0 and (score(first), score(second), score(first, second)) == (0.0, 1.0, 0.0)


def test_generation_never_writes_excluded_words(world):
    folder, tokenizer, models = world
    scorer = Scorer(generates(), models["llama"], folder)
    model = Changed(models["llama"], put(-torch.inf, *(t for t in range(62) if t != 9)))
    texts = {written.text for _, written in scorer.asked[0].question(model)}
    assert texts == {" ".join([tokenizer.decode([9])] * 3)}


def test_generation_that_breaks_later(world):
    """Only rows that are still asked count: here the second token's logits of all that go on."""
    folder, _, models = world
    calls = []

    def second(logits):
        calls.append(len(logits))
        return put(torch.nan)(logits) if len(calls) == 2 else logits

    items = [
        Item(f"g{i}", "g", "generate", f"w{i} w3", ("w1",), metric="exact", max_tokens=1 + 2 * i) for i in range(2)
    ]
    with pytest.raises(LogitsError, match="item 'g1' of task 'g'"):
        Scorer(items, models["llama"], folder).score(Changed(models["llama"], second))
    assert calls == [2, 1]


def test_classification(world, tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification, ViTConfig, ViTForImageClassification

    folder, *_ = world
    config = LlamaConfig(
        vocab_size=62,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        num_labels=3,
    )
    texts = LlamaForSequenceClassification(config).eval()
    scorer = Scorer([Item(f"k{i}", "k", "classify", text(3, i), i % 3) for i in range(4)], texts, folder)
    texts.score.weight.data[1, 0] = torch.nan
    with pytest.raises(LogitsError, match="item 'k0' of task 'k': the model's logits are NaN"):
        scorer.score(texts)
    np.save(tmp_path / "0.npy", np.ones((3, 8, 8), np.float32))
    images = ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            num_labels=4,
        )
    ).eval()
    scorer = Scorer([Item("i0", "i", "classify", "", 1, image=str(tmp_path / "0.npy"))], images, tmp_path)
    images.classifier.bias.data[2] = torch.inf
    with pytest.raises(LogitsError, match="item 'i0' of task 'i': the model's logits are NaN or infinite"):
        scorer.score(images)
    images.classifier.bias.data[2] = -torch.inf  # a label that is excluded
    assert scorer.score(images)[0] in (0.0, 1.0)


def test_likeliest_is_argmax_where_there_is_one():
    inf, nan = torch.inf, torch.nan
    rows = torch.tensor([[1, 3, 3.0], [-inf, 2, -inf], [nan, 1, 2], [inf, 1, 2], [-inf] * 3, [inf, nan, 0]])
    assert likeliest(rows).tolist() == [1, 1, -1, -1, -1, -1]
    assert likeliest(rows.half()).tolist() == likeliest(rows.bfloat16()).tolist() == [1, 1, -1, -1, -1, -1]
    assert likeliest(rows[0]).item() == 1


# -- engine and command


def items_file(path):
    rows = [
        {"id": i.id, "kind": "choice", "prompt": i.prompt, "choices": i.choices, "answer": i.answer} for i in choices()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_endpoint_is_named_and_a_candidate_fails(checkpoints):
    base, broken, other = (str(checkpoints / name) for name in ("base", "nanlogits", "e0"))
    engine = LocalEngine(Pool.open(base, [broken, other], "cpu"))
    with pytest.raises(LogitsError, match=rf"{broken}: item 'c0' of task 'c': the model's logits are NaN or infinite"):
        answers(engine, broken, choices())
    assert np.isfinite(answers(engine, base, choices())).all()
    space = Space(SpaceDefinition((broken, other), "linear", None), engine.info().layout)
    asked = Registration(tuple(choices()), space.definition)
    found = list(engine.evaluate(asked, [space.initial(), space.initial()]))
    assert all(e.responses is None and np.isnan(e.value) for e in found)
    assert all("the model's logits are NaN or infinite" in str(e.error) for e in found)
    with pytest.raises(ItemsError, match="^item 'c0' of task 'c': the model's logits"):
        answers(engine, space.recipe(space.initial()), choices())


def test_a_base_without_logits_is_named_when_first_asked(checkpoints):
    broken, other = (str(checkpoints / name) for name in ("nanlogits", "e0"))
    engine = LocalEngine(Pool.open(broken, [other], "cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.prepare(Registration(tuple(choices())))
        with pytest.raises(LogitsError, match="nanlogits: item 'c0'"):
            answers(engine, broken, choices())
        assert np.isfinite(answers(engine, other, choices())).all()


def test_evaluate_says_so_in_one_line(checkpoints, tmp_path, monkeypatch, capsys):
    file = items_file(tmp_path / "q.jsonl")
    monkeypatch.setattr(sys, "argv", ["merge3-client", "evaluate", str(checkpoints / "nanlogits"), str(file)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, error = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and error.count("\n") == 1
    expected = f"{file}, line 1: item 'c0' of task 'q': the model's logits are NaN or infinite"
    assert error.startswith(f"error: {checkpoints / 'nanlogits'}: {expected}")


def search(checkpoints, folder, **more):
    """A configuration whose first expert has no logits."""
    rows = [
        {"id": i.id, "kind": "generate", "prompt": i.prompt, "answer": "w1", "max_tokens": 2}
        for i in generates(count=20)
    ]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "genome": {
            "models": [str(checkpoints / m) for m in ("nanlogits", "e0")],
            "base_model": str(checkpoints / "base"),
            "merge_method": "task_arithmetic",
        },
        "tasks": [{"items": "t.jsonl"}],
        "optimizer": {"budget": 4, "population": 2},
        "extract": {"method": "all"},
    }
    (folder / "evolve.yaml").write_text(yaml.safe_dump(data | more))
    return load_config(folder / "evolve.yaml")


def test_a_candidate_is_journalled_as_failed(checkpoints, tmp_path):
    with pytest.raises(
        ConfigError, match="generation 0: every candidate failed .*the model's logits are NaN or infinite"
    ):
        run.evolve(search(checkpoints, tmp_path), tmp_path / "run", quiet=True, export=False)
    candidates = Journal(tmp_path / "run").candidates()
    assert len(candidates) == 2
    for candidate in candidates:
        assert candidate.responses is None and np.isnan(candidate.value)
        assert re.search(
            r"t.jsonl, line \d+: item 'g\d+' of task 't': the model's logits are NaN or infinite", candidate.error
        )


def test_calibration_names_the_endpoint(checkpoints, tmp_path):
    asked = search(checkpoints, tmp_path, extract={"method": "irt", "size": 5}, estimate={"models": 3})
    with pytest.raises(
        LogitsError, match=r"nanlogits: .*t.jsonl, line \d+: item .*the model's logits are NaN or infinite"
    ):
        run.evolve(asked, tmp_path / "run", quiet=True, export=False)
