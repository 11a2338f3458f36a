"""Item files as people have them: what is legal reads, what is not is named with file, line and key."""

import json

import pytest

from merge3.errors import ItemsError
from merge3.rpc import convert
from merge3.tasks import Item, items_hash, read_items

GOOD = '{"kind": "generate", "prompt": "a", "answer": "b"}'
CHOICE = {"kind": "choice", "prompt": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1}


def write(path, *lines, end="\n"):
    path.write_bytes(
        end.join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines).encode()
        + end.encode()
    )
    return path


BAD_LINES = {
    "not json": ("{", "not JSON (Expecting property name enclosed in double quotes: column 2)"),
    "truncated": (
        '{"kind": "cho',
        "not JSON (Unterminated string starting at: column 10); expected one JSON object per line",
    ),
    "a list": ("[]", "found list; expected a JSON object"),
    "a number": ("Infinity", "found float; expected a JSON object"),
    "endless number": ("1" * 5000, "not JSON that can be read"),
    "endless list": ("[" * 100_000, "not JSON that can be read"),
    "no kind": ('{"prompt": "a"}', "kind is None; expected choice, generate, classify"),
    "unknown key": ('{"kind": "choice", "promt": "a"}', "unknown key 'promt'; expected id, task, kind, prompt, "),
    "misspelt key": (
        '{"kind": "choice", "prompt": "a", "choices": ["b", "c"], "anwser": 0}',
        "unknown key 'anwser'; expected id, task,",
    ),
    "no prompt": ('{"kind": "generate", "answer": "a"}', "prompt is None"),
    "empty prompt": ({**CHOICE, "prompt": ""}, "prompt is ''; expected text"),
    "no prompt, no image": ('{"kind": "classify", "image": null, "answer": 1}', "prompt is None"),
    "one choice": (
        '{"kind": "choice", "prompt": "a", "choices": ["b"], "answer": 0}',
        "1 choices; expected at least 2",
    ),
    "no choices": ('{"kind": "choice", "prompt": "a", "answer": 0}', "0 choices; expected at least 2"),
    "choices by name": (
        {**CHOICE, "choices": {"text": ["a", "b"]}},
        "choices is {'text': ['a', 'b']}; expected a list of texts",
    ),
    "empty choice": ({**CHOICE, "choices": ["", " 4"]}, "choices[0] is ''; expected a text"),
    "number as choice": ({**CHOICE, "choices": [" 3", 4]}, "choices[1] is 4; expected a text"),
    "equal choices": (
        {**CHOICE, "choices": [" 4", " 3", " 4"]},
        "choices[0] and choices[2] are both ' 4'; expected different choices",
    ),
    "answer outside": ('{"kind": "choice", "prompt": "a", "choices": ["b", "c"], "answer": 2}', "answer is 2"),
    "answer no choice": ('{"kind": "choice", "prompt": "a", "choices": ["b", "c"], "answer": "d"}', "answer is 'd'"),
    "a letter": (
        {**CHOICE, "answer": "B"},
        "answer is 'B'; expected one of the choices, or an index below 2 (index 1, a number, if choices[1]",
    ),
    "index as text": ({**CHOICE, "answer": "1"}, "(index 1, a number, if choices[1] is meant)"),
    "spaces": (
        {**CHOICE, "answer": "4"},
        "answer is '4'; expected one of the choices, or an index below 2 (choices[1] is ' 4')",
    ),
    "a truth": ({**CHOICE, "answer": True}, "answer is True"),
    "bad metric": (
        '{"kind": "choice", "prompt": "a", "choices": ["b", "c"], "answer": 0, "metric": "f1"}',
        "metric is 'f1'",
    ),
    "bad pattern": ('{"kind": "generate", "prompt": "a", "answer": "(", "metric": "regex"}', "is no pattern"),
    "no number": ('{"kind": "generate", "prompt": "a", "answer": "x", "metric": "number"}', "a number, as metric is"),
    "nan as number": (
        '{"kind": "generate", "prompt": "a", "answer": "nan", "metric": "number"}',
        "answer is 'nan'; expected a number",
    ),
    "decimal comma": (
        '{"kind": "generate", "prompt": "a", "answer": "3,14", "metric": "number"}',
        "answer is '3,14'; expected a number",
    ),
    "truths": (
        '{"kind": "generate", "prompt": "a", "answer": [true]}',
        "answer is [True]; expected a text, a number or a list",
    ),
    "max_tokens": ('{"kind": "generate", "prompt": "a", "answer": "x", "max_tokens": 0}', "max_tokens is 0"),
    "huge max_tokens": (
        '{"kind": "generate", "prompt": "a", "answer": "x", "max_tokens": 1e10}',
        "max_tokens is 10000000000.0",
    ),
    "beyond the wire": (
        '{"kind": "generate", "prompt": "a", "answer": "x", "max_tokens": 4294967296}',
        "max_tokens is 4294967296",
    ),
    "label beyond": (
        '{"kind": "classify", "prompt": "a", "answer": -1}',
        "answer is -1; expected a label or its index",
    ),
    "stop of numbers": (
        '{"kind": "generate", "prompt": "a", "answer": "x", "stop": [1]}',
        "stop[0] is 1; expected a text",
    ),
    "empty stop": ('{"kind": "generate", "prompt": "a", "answer": "x", "stop": ""}', "stop[0] is ''; expected a text"),
    "id": ({**CHOICE, "id": [1]}, "id is [1]; expected a text or a number"),
    "empty id": ({**CHOICE, "id": ""}, "id is ''; expected a text or a number"),
    "task": ({**CHOICE, "task": True}, "task is True; expected a text or a number"),
    "image": ('{"kind": "classify", "image": 7, "answer": 1}', "image is 7; expected a file"),
    "twice": (
        '{"kind": "generate", "prompt": "a", "answer": "b", "answer": "c"}',
        "key 'answer' twice in one object; expected each key once",
    ),
    "twice inside": (
        '{"kind": "generate", "prompt": "a", "answer": "b", "meta": {"x": 1, "x": 2}}',
        "key 'x' twice in one object",
    ),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_named(tmp_path, case):
    line, message = BAD_LINES[case]
    # What other readers take for the end of a line, in the lines before, changes no number.
    write(tmp_path / "items.jsonl", {**json.loads(GOOD), "prompt": "a\u2028b\u2029c\x85d"}, "", line)
    with pytest.raises(ItemsError) as error:
        read_items(tmp_path / "items.jsonl")
    assert str(error.value).startswith(f"{tmp_path / 'items.jsonl'}, line 3: ") and message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(tmp_path))


HALVES = {
    "prompt": ({"prompt": "a\ud83d"}, "'prompt'"),
    "choices": ({"choices": [" 3", "\udc00"]}, "'choices[1]'"),
    "answer": ({"kind": "generate", "choices": None, "answer": ["a", "\ud83d b"]}, "'answer[1]'"),
    "stop": ({"stop": ["\ud83d"]}, "'stop[0]'"),
    "id": ({"id": "\ud83d"}, "'id'"),
    "task": ({"task": "\ud83d"}, "'task'"),
    "extra": ({"meta": {"source": ["x", "\ud83d"]}}, "'meta.source[1]'"),
    "a key": ({"\ud83d": 1}, r"'\ud83d'"),
}


@pytest.mark.parametrize("key", HALVES)
def test_half_characters_are_named(tmp_path, key):
    changes, name = HALVES[key]
    (tmp_path / "items.jsonl").write_text(f"{GOOD}\n{json.dumps(CHOICE | changes)}\n")
    with pytest.raises(ItemsError) as error:
        read_items(tmp_path / "items.jsonl")
    found = str(error.value).encode().decode()  # can be printed
    assert f"items.jsonl, line 2: {name} has half a character, the lone surrogate \\ud" in found


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("key", ["answer", "max_tokens", "id", "subject"])
def test_numbers_that_are_none_are_named(tmp_path, number, key):
    line = json.dumps(CHOICE | {key: 12345}).replace("12345", number)
    with pytest.raises(ItemsError, match=f"line 1: '{key}' is (NaN|-?Infinity); expected a finite number"):
        read_items(write(tmp_path / "items.jsonl", line))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\t"])
def test_lines_end_at_newlines_only(tmp_path, separator):
    items = read_items(write(tmp_path / "items.jsonl", CHOICE | {"prompt": f"a{separator}b"}, CHOICE))
    assert [i.prompt for i in items] == [f"a{separator}b", "2 + 2 ="]
    (tmp_path / "raw.jsonl").write_text(
        json.dumps(CHOICE | {"prompt": "a#b"}).replace("#", separator) + "\n" + GOOD, newline=""
    )
    items = read_items(tmp_path / "raw.jsonl")
    assert items[0].prompt == f"a{separator}b" and items[1].source.endswith("raw.jsonl, line 2")


def test_line_ends_and_marks_of_other_systems(tmp_path):
    expected = read_items(write(tmp_path / "items.jsonl", CHOICE, CHOICE))
    for name, content in {
        "crlf": write(tmp_path / "x", CHOICE, CHOICE, end="\r\n").read_bytes(),
        "mark": b"\xef\xbb\xbf" + (tmp_path / "items.jsonl").read_bytes(),
        "no last newline": (tmp_path / "items.jsonl").read_bytes().rstrip(),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "items.jsonl").write_bytes(content)
        assert read_items(tmp_path / name / "items.jsonl") == expected


JAPANESE = json.dumps(CHOICE | {"prompt": "東京"}, ensure_ascii=False)
BAD_FILES = {
    "utf16": (
        f"{JAPANESE}\n".encode("utf-16"),
        "line 1: UTF-16, as its byte-order mark says; expected UTF-8 (iconv -f UTF-16 -t UTF-8)",
    ),
    "utf16be": (b"\xfe\xff" + JAPANESE.encode("utf-16-be"), "UTF-16, as its byte-order mark says"),
    "utf32": (JAPANESE.encode("utf-32"), "UTF-32, as its byte-order mark says"),
    "utf16 without a mark": (
        f"{GOOD}\n{JAPANESE}".encode("utf-16-le"),
        "line 1: a NUL byte; expected JSON lines in UTF-8 (UTF-16, or",
    ),
    "damaged": (f"{GOOD}\n".encode() + b"\0" * 20, "line 2: a NUL byte"),
    "latin-1": (GOOD.encode() + '\n{"prompt": "é"}'.encode("latin-1"), "line 2: not UTF-8 at byte 13 of the line"),
    "shift-jis": (JAPANESE.encode("shift_jis"), "line 1: not UTF-8 at byte"),
    "latin-1 after a mark": (b"\xef\xbb\xbf\n" + b"\xe9", "line 2: not UTF-8 at byte 1 of the line"),
    "an array": (json.dumps([CHOICE], indent=1).encode(), "line 1: a JSON array; expected one JSON object per line"),
    "a late array": (b"\n\n" + json.dumps([CHOICE]).encode(), "line 3: a JSON array"),
    "empty": (b"\n\n", "no items; expected at least one JSON line"),
    "nothing": (b"", "no items"),
    "only a mark": (b"\xef\xbb\xbf", "no items"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named(tmp_path, case):
    content, message = BAD_FILES[case]
    (tmp_path / "items.jsonl").write_bytes(content)
    with pytest.raises(ItemsError) as error:
        read_items(tmp_path / "items.jsonl")
    assert (
        message in str(error.value)
        and str(tmp_path / "items.jsonl") in str(error.value)
        and "\n" not in str(error.value)
    )


def test_missing_files_and_repeated_ids(tmp_path):
    with pytest.raises(ItemsError, match="No such file"):
        read_items(tmp_path / "none.jsonl")
    with pytest.raises(ItemsError, match="Is a directory"):
        read_items(tmp_path)
    twice = write(tmp_path / "twice.jsonl", CHOICE | {"id": "7"}, CHOICE | {"id": 7})
    with pytest.raises(ItemsError, match="line 2: id '7' is also on line 1"):
        read_items(twice)


def test_null_is_as_if_it_were_not_there(tmp_path):
    keys = ("id", "task", "metric", "max_tokens", "stop", "image")
    items = read_items(write(tmp_path / "items.jsonl", CHOICE | dict.fromkeys(keys), CHOICE))
    assert (items[0].id, items[0].task, items[0].metric, items[0].max_tokens, items[0].stop) == (
        "items-1",
        "items",
        "acc_norm",
        32,
        (),
    )


def test_numbers_of_generate_items(tmp_path):
    line = {"kind": "generate", "prompt": "a", "metric": "number", "answer": [42, "1,234", "-12,345.50", "1e3"]}
    (item,) = read_items(write(tmp_path / "items.jsonl", line))
    assert item.answer == ("42", "1234", "-12345.50", "1e3")


def test_other_keys_are_kept(tmp_path):
    others = {
        "subject": "maths",
        "source": None,
        "idx": 3,
        "qid": "q",
        "meta": {"a": [1, 2.5]},
        "answers": ["x"],
        "choices_": [],
    }
    (read,) = read_items(write(tmp_path / "items.jsonl", CHOICE | others))
    plain = Item("items-1", "items", "choice", "2 + 2 =", 1, (" 3", " 4"), "acc_norm")
    assert dict(read.extra) == others and read.source == f"{tmp_path / 'items.jsonl'}, line 1"
    # Neither what else a line holds nor where it was is part of the question.
    assert read == plain and hash(read) == hash(plain) and items_hash([read]) == items_hash([plain])
    message = convert.item_to(read)
    assert convert.digest(message) == convert.digest(convert.item_to(plain))
    there = convert.item_from(message, "item 0")
    assert there == read and (there.extra, there.source) == ((), "")


MISSPELT = {
    "promt": "prompt",
    "Prompt": "prompt",
    "anwser": "answer",
    "answers": "answer",
    "max_token": "max_tokens",
    "maxtokens": "max_tokens",
    "choises": "choices",
    "choice": "choices",
    "taks": "task",
    "ID": "id",
    "imgae": "image",
    "metrik": "metric",
    "stops": "stop",
}


@pytest.mark.parametrize("key", MISSPELT)
def test_misspelt_keys_are_refused_with_the_nearest(tmp_path, key):
    meant = MISSPELT[key]
    whole = {
        "id": "q",
        "task": "t",
        "kind": "classify",
        "prompt": "a",
        "image": "i",
        "choices": ["b"],
        "answer": 1,
        "metric": "acc",
        "max_tokens": 3,
        "stop": "x",
    }
    file = write(tmp_path / "items.jsonl", {key if k == meant else k: v for k, v in whole.items()})
    with pytest.raises(ItemsError) as error:
        read_items(file)
    assert f"line 1: unknown key '{key}'; expected id, task, kind" in str(
        error.value
    ) and f"(did you mean '{meant}'?)" in str(error.value)
    # Beside the key that it resembles it is another one.
    assert dict(read_items(write(file, whole | {key: 0}))[0].extra) == {key: 0}


def test_rows_of_other_formats_are_refused(tmp_path):
    for line in (
        {"question": "2 + 2", "choices": ["3", "4"], "answer": 1},
        {"doc_to_text": "a", "kind": "generate", "answer": "b"},
    ):
        with pytest.raises(
            ItemsError,
            match=r"line 1: unknown key '(question|doc_to_text)'; expected id, task, kind, prompt.*an item needs",
        ):
            read_items(write(tmp_path / "items.jsonl", line))


def test_long_values_make_short_messages(tmp_path):
    for change in (
        {"answer": "x" * 10_000},
        {"choices": ["a" * 10_000] * 2},
        {"id": ["x" * 10_000]},
        {"kind": "k" * 10_000},
    ):
        with pytest.raises(ItemsError) as error:
            read_items(write(tmp_path / "items.jsonl", CHOICE | change))
        assert len(str(error.value)) < 400 + len(str(tmp_path))
