"""merge3-client evaluate: a checkpoint, and a recipe that is merged in memory."""

import json
import shutil

import pytest
import yaml

from tests.commands import client


def asked(what, folder, name, *options):
    """(what it prints as JSON, responses by item)"""
    done = client(
        "evaluate",
        what,
        folder / "english.jsonl",
        folder / "sorting.jsonl",
        "--json",
        "--responses",
        folder / name,
        *options,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return json.loads(done.stdout), {(row["task"], row["item"]): row["score"] for row in rows}


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_a_recipe_answers_as_its_merge_on_disk(solving_world, tmp_path, method):
    """Also where elements are dropped at random: the seed says which."""
    world = shutil.copytree(solving_world, tmp_path / "world")
    recipe = {
        "merge_method": method,
        "base_model": "./base",
        "parameters": {"density": 0.6},
        "dtype": "bfloat16",
        "models": [{"model": f"./{name}", "parameters": {"weight": 0.5}} for name in ("english", "sorting")],
    }
    (world / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result, responses = asked(world / "recipe.yaml", world, "in-memory.jsonl", "--seed", 7)
    assert client("merge", world / "recipe.yaml", world / "merged", "--seed", 7, "--quiet").returncode == 0
    written, expected = asked(world / "merged", world, "written.jsonl")
    assert responses == expected and len(responses) == 80
    assert 0 < sum(responses.values()) < 80  # it knows some, and not all
    for task in ("english", "sorting"):
        scores = [score for (of, _), score in responses.items() if of == task]
        assert result["tasks"][task] == written["tasks"][task]
        assert result["tasks"][task]["accuracy"] == pytest.approx(sum(scores) / 40)


def test_the_table_for_people(tiny_world):
    done = client("evaluate", tiny_world / "english", tiny_world / "english.jsonl", tiny_world / "italian.jsonl")
    assert done.returncode == 0, done.stderr
    english, italian, mean = done.stdout.splitlines()
    assert english.startswith("english ") and "(40 items)" in english and italian.startswith("italian ")
    values = [float(line.split(" ± ")[0].split()[-1]) for line in (english, italian, mean)]
    assert mean.startswith("mean over tasks") and values[2] == pytest.approx((values[0] + values[1]) / 2, abs=1e-4)
