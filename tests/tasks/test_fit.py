"""Items that a model has no positions for: named, left out or cut, once and for every stage."""

import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from merge3.client import calibrate, cli, run
from merge3.client.channel import Target
from merge3.client.evaluate import Asked, evaluate_files
from merge3.client.register import Registrar
from merge3.errors import ConfigError, ItemsError
from merge3.registration import Registration
from merge3.search.config_files import load_config
from merge3.search.questions import load_questions
from merge3.tasks import Item, Scorer, read_items
from merge3.tasks.fit import fit_items, fit_to_model
from merge3.tasks.items import place
from merge3.tasks.kinds import KINDS
from merge3.tasks.prompts import Reader, positions


def request(item, tokenizer, chat=False):
    return KINDS[item.kind].request(item, Reader(tokenizer, chat))


def text(count, first=0):
    return " ".join(f"w{(first + i) % 60}" for i in range(count))


def choice(name, prompt=3, longest=2, **more):
    return {
        "id": name,
        "kind": "choice",
        "prompt": text(prompt),
        "choices": [text(1, 7), text(longest, 20)],
        "answer": 0,
    } | more


def generate(name, prompt=3, max_tokens=4, **more):
    return {"id": name, "kind": "generate", "prompt": text(prompt), "answer": "w1", "max_tokens": max_tokens} | more


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TOO_LONG = {
    "prompt": (choice("q", 127), "prompt of 127 tokens + longest choice of 2 = 129"),
    "choice": (choice("q", 3, 200), "prompt of 3 tokens + longest choice of 200 = 203"),
    "generate": (generate("q", 125), "prompt of 125 tokens + max_tokens 4 = 129"),
    "max_tokens": (generate("q", 3, 500), "prompt of 3 tokens + max_tokens 500 = 503"),
}


@pytest.mark.parametrize("case", TOO_LONG)
def test_an_error_names_file_line_and_what_is_long(world, tmp_path, case):
    folder, _, models = world
    row, what = TOO_LONG[case]
    file = write(
        tmp_path / "items.jsonl", row | {"id": "fits", "prompt": "w1", "choices": ["w1", "w2"], "max_tokens": 2}, row
    )
    with pytest.raises(ItemsError) as error:
        Scorer(read_items(file), models["llama"], folder)
    expected = f"{what}; expected at most 128, the model's positions (--skip-too-long"
    assert str(error.value).startswith(f"{file}, line 2: item 'q' of task 'items': {expected}")


def test_what_just_fits_is_asked(world, tmp_path):
    folder, _, models = world
    items = read_items(write(tmp_path / "items.jsonl", choice("a", 126), generate("b", 124), choice("c", 1, 127)))
    assert len(Scorer(items, models["llama"], folder).score(models["llama"])) == 3


def test_skipping_counts_and_names_the_first(make_tokenizer, tmp_path):
    file = write(
        tmp_path / "t.jsonl",
        choice("a"),
        choice("b", 300),
        generate("c", 2),
        generate("d", 2, 200),
        choice("e", 5, task="u"),
    )
    fitted = fit_items(read_items(file), make_tokenizer(), 128, "skip")
    assert [i.id for i in fitted.items] == ["a", "c", "e"] and fitted.skipped == {"t": 2} and fitted.truncated == {}
    assert fitted.notes == [
        f"task 't': 2 of 4 items skipped, too long for 128 positions; the first: {file}, line 2: item 'b' of task 't': "
        "prompt of 300 tokens + longest choice of 2 = 302"
    ]
    assert fit_items(read_items(file), make_tokenizer(), None, "skip").items == read_items(file)  # no limit is known
    with pytest.raises(
        ItemsError, match="task 't': all of its 1 items are too long, the first: .*line 1: item 'b'.*at most 128 tokens"
    ):
        fit_items(read_items(write(tmp_path / "t.jsonl", choice("b", 300))), make_tokenizer(), 128, "skip")
    with pytest.raises(ItemsError, match="too_long: found 'cut'; expected error, skip, truncate_left"):
        fit_items([], make_tokenizer(), 128, "cut")


@pytest.mark.parametrize(
    "row", [choice("q", 300), generate("q", 300), {"id": "q", "kind": "classify", "prompt": text(300), "answer": 0}]
)
def test_cutting_from_the_left_keeps_the_first_token_and_the_end(make_tokenizer, tmp_path, row):
    tokenizer = make_tokenizer(bos=True)
    items = read_items(write(tmp_path / "t.jsonl", generate("short"), row))
    fitted = fit_items(items, tokenizer, 128, "truncate_left")
    assert fitted.truncated == {"t": 1} and fitted.skipped == {} and fitted.items[0] == items[0]
    assert "1 of 2 items cut from the left" in fitted.notes[0]
    whole, cut = request(items[1], tokenizer), request(fitted.items[1], tokenizer)
    assert cut.length()[0] == 128 and replace(cut, tokens=whole.tokens) == whole
    tokens = cut.tokens
    assert tokens[0] == whole.tokens[0] == tokenizer.eos_token_id and tokens[1:] == whole.tokens[-len(tokens) + 1 :]
    assert fitted.items[1].source == items[1].source


def test_cutting_keeps_the_chat_template(make_tokenizer):
    tokenizer = make_tokenizer(chat="{% for m in messages %}w50 w51 {{ m['content'] }} w52{% endfor %}")
    (item,) = fit_items(
        [Item("q", "t", "generate", text(300), ("x",), max_tokens=8)], tokenizer, 128, "truncate_left", chat=True
    ).items
    tokens = request(item, tokenizer, chat=True).tokens
    assert (
        len(tokens) == 120
        and tokenizer.decode(tokens).split()[:2] == ["w50", "w51"]
        and tokenizer.decode(tokens).endswith("w59 w52")
    )
    with pytest.raises(ItemsError, match="the tokenizer has no chat template"):
        request(item, make_tokenizer(), chat=True)


def test_cutting_without_offsets(make_tokenizer):
    tokenizer = make_tokenizer()

    def slow(text, add_special_tokens=True):
        return tokenizer(text, add_special_tokens=add_special_tokens)

    (item,) = fit_items([Item("q", "t", "generate", text(300), ("x",), max_tokens=8)], slow, 128, "truncate_left").items
    tokens = request(item, tokenizer).tokens
    assert 110 <= len(tokens) <= 120 and text(300).endswith(item.prompt)


def test_what_cutting_cannot_help_is_named(make_tokenizer, tmp_path):
    for row in (choice("q", 5, 200), generate("q", 5, 500), generate("q", 500, 128)):
        with pytest.raises(
            ItemsError,
            match=r"line 1: item 'q' .* = \d+, and nothing would be left of its prompt; expected at most 128",
        ):
            fit_items(read_items(write(tmp_path / "t.jsonl", row)), make_tokenizer(), 128, "truncate_left")


def test_positions_of_architectures():
    from transformers import BloomConfig, GPT2Config, LlamaConfig, MambaConfig, RobertaConfig

    assert positions(LlamaConfig(max_position_embeddings=77)) == 77
    assert positions(GPT2Config(n_positions=99)) == 99
    assert positions(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert positions(MambaConfig()) is None and positions(BloomConfig()) is None
    assert positions(SimpleNamespace(max_position_embeddings=-1)) is None


def test_choices_that_are_the_same_tokens_are_named(world, tmp_path):
    folder, _, models = world
    file = write(tmp_path / "t.jsonl", choice("a"), choice("b", choices=["w1", "w2 w3", " w1"]))
    with pytest.raises(
        ItemsError,
        match=r"t.jsonl, line 2: item 'b' of task 't': choices\[0\] 'w1' and choices\[2\] ' w1' have the same tok",
    ):
        Scorer(read_items(file), models["llama"], folder)


# -- commands


@pytest.fixture
def config(checkpoints, tmp_path):
    """A configuration of two tasks, a fifth of whose items are too long."""
    rows = [generate(f"g{i}", 3 if i % 5 else 140 + i) for i in range(30)]
    write(tmp_path / "long.jsonl", *rows)
    write(tmp_path / "short.jsonl", *(generate(f"s{i}", 2 + i % 3) for i in range(20)))
    data = {
        "genome": {
            "models": [str(checkpoints / "e0"), str(checkpoints / "e1")],
            "base_model": str(checkpoints / "base"),
            "merge_method": "task_arithmetic",
        },
        "tasks": [{"items": "long.jsonl"}, {"items": "short.jsonl"}],
        "optimizer": {"budget": 3, "population": 2},
        "extract": {"method": "all"},
    }
    (tmp_path / "evolve.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "evolve.yaml"


def client(*arguments, monkeypatch):
    """The command in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["merge3-client", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def test_evaluate_skips_when_asked_and_writes_rows(checkpoints, tmp_path, monkeypatch, capsys):
    rows = [choice("a", model="m", subject="maths"), choice("b", 300), choice("c", 4, subject="art")]
    file = write(tmp_path / "t.jsonl", *rows)
    assert client("evaluate", checkpoints / "base", file, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"error: {file}, line 2: item 'b' of task 't': prompt of 301 tokens")
        and error.count("\n") == 1
    )
    arguments = (
        "evaluate",
        checkpoints / "base",
        file,
        "--skip-too-long",
        "--responses",
        tmp_path / "r.jsonl",
        "--json",
    )
    assert client(*arguments, monkeypatch=monkeypatch) == 0
    out, error = capsys.readouterr()
    result = json.loads(out)
    assert result["skipped"] == {"t": 1} and result["tasks"]["t"]["items"] == 2
    assert f"task 't': 1 of 3 items skipped, too long for 128 positions; the first: {file}, line 2" in error
    written = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(r["item"], r["subject"]) for r in written] == [("a", "maths"), ("c", "art")]
    assert written[0]["model"] == str(checkpoints / "base") and written[0]["extra_model"] == "m"
    assert evaluate_files(checkpoints / "base", Asked([write(tmp_path / "t.jsonl", choice("a"))]))["skipped"] == {}


def test_a_run_skips_before_it_splits(config, monkeypatch, capsys):
    questions = load_questions(load_config(config, skip_too_long=True))
    assert questions.skipped == {"long": 6} and not any(
        int(i.id[1:]) % 5 == 0 for i in questions.search if i.task == "long"
    )
    assert len(questions.search) + len(questions.heldout) == 44 and len(questions.heldout) == 13
    assert client("evolve", config, "--run-dir", config.parent / "no", monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    what = r"long.jsonl, line (\d+): item 'g\d+' of task 'long': prompt of \d+ tokens \+ max_tokens 4 = \d+; expected"
    assert int(re.search(what, error)[1]) % 5 == 1 and not list((config.parent / "no").glob("result.json"))
    arguments = ("evolve", config, "--run-dir", config.parent / "run", "--skip-too-long", "--no-export", "--json")
    assert client(*arguments, monkeypatch=monkeypatch) == 0
    out, error = capsys.readouterr()
    result = json.loads((config.parent / "run" / "result.json").read_text())
    assert result["skipped"] == json.loads(out)["skipped"] == {"long": 6} and result["truncated"] == {}
    assert result["heldout_items"] == 13 and "task 'long': 6 of 30 items skipped" in error


def test_a_policy_per_task(config):
    data = yaml.safe_load(config.read_text())
    data["tasks"][0]["too_long"] = "truncate_left"
    config.write_text(yaml.safe_dump(data))
    questions = load_questions(load_config(config, skip_too_long=True))
    assert (
        questions.truncated == {"long": 6}
        and questions.skipped == {}
        and len(questions.search) + len(questions.heldout) == 50
    )
    data["tasks"][0]["too_long"] = "cut"
    config.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match="tasks.0.too_long: found 'cut'; expected 'error', 'skip' or 'truncate_left'"):
        load_config(config)


def test_limits_count_what_is_left(config):
    data = yaml.safe_load(config.read_text())
    data["tasks"][0] |= {"too_long": "skip", "limit": 4}
    config.write_text(yaml.safe_dump(data | {"limit": 6}))
    first = load_questions(load_config(config))
    config.write_text(yaml.safe_dump(data | {"limit": 6, "shuffle": True}))
    shuffled = load_questions(load_config(config))
    for questions in (first, shuffled):
        assert [sum(i.task == task for i in questions.search) for task in ("long", "short")] == [4, 6]
    assert first.heldout == shuffled.heldout and len(first.heldout) == 13
    assert first.search != shuffled.search and not {*shuffled.search} & {*shuffled.heldout}


def test_calibrate_skips_too(config, monkeypatch, capsys):
    rows = [
        f"{model},{task},{name}{i},{i % 2}"
        for model in "xyz"
        for task, name in (("long", "g"), ("short", "s"))
        for i in range(20)
    ]
    (config.parent / "r.csv").write_text("\n".join(["model,task,item,score", *rows]))
    arguments = (config, config.parent / "r.csv", config.parent / "bank", "cpu", False, 1)
    assert calibrate._configured(*arguments, skip_too_long=False).skipped == {}
    assert "skipped" not in capsys.readouterr().err
    found = calibrate._configured(*arguments, skip_too_long=True)
    groups = found.groups
    assert found.skipped == {"long": 6} and "task 'long': 6 of 30 items skipped" in capsys.readouterr().err
    assert groups["long"] and not any(key.endswith(("0", "5")) for key in groups["long"])
    arguments = (
        "calibrate",
        "--responses",
        config.parent / "r.csv",
        "--out",
        config.parent / "bank",
        "--skip-too-long",
    )
    assert client(*arguments, monkeypatch=monkeypatch) == 2
    assert "--skip-too-long: given without a configuration" in capsys.readouterr().err


def test_a_daemons_driver_needs_the_bases_files(config):
    data = yaml.safe_load(config.read_text())
    data["genome"] |= {"base_model": "/nowhere/base"}
    config.write_text(yaml.safe_dump(data))
    asked = load_config(config, skip_too_long=True)
    with pytest.raises(
        ConfigError, match="too_long: skip: no directory /nowhere/base here, only on the daemon; expected"
    ):
        run.evolve(asked, config.parent / "run", target=Target("127.0.0.1:1"))
    assert not (config.parent / "run").exists()


def test_a_daemons_refusal_names_the_line(tmp_path):
    """Only the driver knows where an item was read."""
    items = read_items(write(tmp_path / "t.jsonl", generate("a"), generate("b")))

    def refuse(requests):
        list(requests)
        raise ItemsError("item 'b' of task 't'", "prompt of 300 tokens", "at most 128")

    with pytest.raises(ItemsError) as error:
        Registrar(refuse).register("pool", Registration(tuple(items)))
    assert error.value.where == place(items[1]) == f"{tmp_path / 't.jsonl'}, line 2: item 'b' of task 't'"


def test_images_have_no_length():
    image = Item("i", "t", "classify", "", 0, image="x.npy")
    assert fit_to_model([image], "/nowhere", "skip").items == [image]


def test_a_document_is_cut_alike_for_all_that_follows_one_context(make_tokenizer):
    tokenizer = make_tokenizer()
    context = text(300)
    asks = ((context, " w1"), (context, " w2 w3 w4"), ("", " w1"))
    document = Item("0", "t", "loglikelihood", "", "", asks=asks)
    (cut,) = fit_items([document], tokenizer, 64, "truncate_left").items
    assert cut.asks[0][0] == cut.asks[1][0] and context.endswith(cut.asks[0][0]) and cut.asks[2] == asks[2]
    lengths = [r.length()[0] for r in KINDS["loglikelihood"].requests(cut, Reader(tokenizer))]
    assert max(lengths) == 64 and len(lengths) == 2
