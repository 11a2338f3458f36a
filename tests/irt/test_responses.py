"""Tables of responses: three formats, joins, and the row that is wrong."""

import json
import sys

import numpy as np
import pytest

from merge3.errors import Unavailable
from merge3.irt import Responses, read_responses, write_responses
from merge3.irt.responses import FORMATS, ResponsesError


def table(**columns):
    return "\n".join([",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values()))]) + "\n"


@pytest.mark.parametrize("ending", FORMATS)
def test_what_is_written_is_read_again(tmp_path, ending):
    values = np.array([[0.0, 1.0, np.nan], [0.25, np.nan, 1.0]])
    responses = Responses(("base", "NA"), ("a/1", "a/2", "007"), values)
    write_responses(responses, tmp_path / f"r{ending}")
    again = read_responses(tmp_path / f"r{ending}")
    assert again.models == responses.models and set(again.items) == set(responses.items)
    assert np.array_equal(again.only(responses.items).values, values, equal_nan=True)


def test_items_of_two_tasks_may_share_ids(tmp_path):
    (tmp_path / "r.csv").write_text(table(model="mm", item="11", score="10", task=["x", "y"]))
    assert read_responses(tmp_path / "r.csv").items == ("x/1", "y/1")


def test_joining_keeps_order_and_leaves_out_models_without_an_answer():
    responses = Responses(("p", "q"), ("a", "b"), np.array([[1, np.nan], [0, 1]]))
    joined = responses.only(["b", "c"])
    assert joined.models == ("q",) and joined.items == ("b", "c")
    with pytest.raises(ResponsesError, match="none of its 2 items.*is asked"):
        responses.only(["z"], "file.csv")


BAD = {
    "outside": (table(model="mm", item="ab", score=["1", "1.5"]), "row 3: score .*1.5.*; expected a number in"),
    "not a number": (table(model="mm", item="ab", score=["1", "yes"]), "row 3: score 'yes'"),
    "empty score": ("model,item,score\nm,a,1\nm,b,\n", "row 3: score"),
    "twice": (table(model="mnm", item="aaa", score="111"), "row 4: model 'm' and item 'a' a second time"),
    "column": (table(model="m", question="a", score="1"), "a column 'item'"),
    "no rows": ("model,item,score\n", "no rows"),
    "infinite": (table(model="mm", item="ab", score=["1", "inf"]), "row 3: score inf"),
    "ragged": ("model,item,score\nm,a,1\nm,b,1,2,3\n", "line 3: 5 fields, 3 in the first line; expected a csv table"),
    "short": ("model,item,score\nm,a\n", "line 2: 2 fields"),
    "open quote": ('model,item,score\nm,"a,1\n', "line 2: .*; expected a csv table"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named(tmp_path, case):
    text, message = BAD[case]
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(ResponsesError, match=message):
        read_responses(tmp_path / "r.csv")


def test_files_as_others_write_them(tmp_path):
    """Byte order mark, blank lines, quotes, truth values; numbers for ids, and other columns, in JSON lines."""
    (tmp_path / "r.csv").write_bytes('\ufeffmodel,item,score\r\n\r\n"a, b","q ""1""",True\r\nc,q2, 0.5\r\n'.encode())
    found = read_responses(tmp_path / "r.csv")
    assert found.models == ("a, b", "c") and found.items == ('q "1"', "q2")
    assert np.array_equal(found.values, [[1, np.nan], [np.nan, 0.5]], equal_nan=True)
    rows = [
        {"model": "m", "item": 7, "task": "t", "score": "0.25", "when": None},
        {"model": "n", "item": "7", "task": "t", "score": False},
    ]
    (tmp_path / "r.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    found = read_responses(tmp_path / "r.jsonl")
    assert found.items == ("t/7",) and found.values.tolist() == [[0.25], [0.0]]


def test_parquet_alone_needs_pyarrow(tmp_path, monkeypatch):
    responses = Responses(("m",), ("a",), np.array([[0.5]]))
    for package in ("pyarrow", "pandas"):
        monkeypatch.setitem(sys.modules, package, None)
    for ending in (".csv", ".jsonl"):
        write_responses(responses, tmp_path / f"r{ending}")
        assert read_responses(tmp_path / f"r{ending}").values.tolist() == [[0.5]]
    table = tmp_path / "r.parquet"
    for act in (lambda: write_responses(responses, table), lambda: read_responses(table)):
        with pytest.raises(Unavailable, match=r"Parquet needs pyarrow \(pip install 'merge3-gpu\[parquet\]'"):
            act()


def test_files_that_are_no_tables(tmp_path):
    (tmp_path / "r.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "r.jsonl").write_text('{"model": "m", "item": "a", "score": 1}\n{not json\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    messages = {
        "r.parquet": "parquet table",
        "r.jsonl": "line 2: .*jsonl table",
        "list.jsonl": "line 1: list",
        "r.pkl": "ending '.pkl'",
        "no.csv": "No such file",
    }
    for name, message in messages.items():
        with pytest.raises(ResponsesError, match=message):
            read_responses(tmp_path / name)
