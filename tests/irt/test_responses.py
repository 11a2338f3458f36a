"""Tables of responses: three formats, joins, and the row that is wrong."""

import numpy as np
import pytest

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
    "ragged": ("model,item,score\nm,a,1\nm,b,1,2,3\n", "expected a csv table"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named(tmp_path, case):
    text, message = BAD[case]
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(ResponsesError, match=message):
        read_responses(tmp_path / "r.csv")


def test_files_that_are_no_tables(tmp_path):
    (tmp_path / "r.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "r.jsonl").write_text("{not json\n")
    for name, message in [("r.parquet", "parquet table"), ("r.jsonl", "jsonl table"), ("r.pkl", "ending '.pkl'"), ("no.csv", "No such file")]:
        with pytest.raises(ResponsesError, match=message):
            read_responses(tmp_path / name)
