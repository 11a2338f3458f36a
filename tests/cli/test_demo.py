"""The demo from its command to its report, small."""

import json
import sys

from merge3.recipe import Recipe
from merge3.world.numbers import TASKS
from tests.commands import client

OPTIONAL = ("matplotlib", "pandas", "pyarrow", "peft", "ray", "mergekit")
QUICK = ("--seed", 1, "--budget", 8, "--steps", 30, 5, "--items", 20)


def test_the_demo_from_training_to_the_report(tmp_path, monkeypatch):
    """With nothing but what `make demo` installs."""
    for package in OPTIONAL:
        monkeypatch.setitem(sys.modules, package, None)
    folder = tmp_path / "demo"
    done = client("demo", *QUICK, "--run-dir", folder, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {*TASKS, "base", "uniform_linear", "ties"} <= set(result["baselines"])
    assert result["candidates"] == 8 and result["heldout_items"] == len(TASKS) * 6  # three tenths of 20
    assert 0 < result["training_seconds"] < result["total_seconds"]
    assert {p.name for p in folder.iterdir()} == {"models", "run"} and not list(tmp_path.glob(".demo*"))
    assert all(len((folder / "models" / f"{task}.jsonl").read_text().splitlines()) == 20 for task in TASKS)
    recipe = Recipe.from_yaml(folder / "run" / "best.yaml")
    assert recipe.hash() == result["recipe_hash"] and recipe.method == "task_arithmetic"
    assert {p.name for p in (folder / "run").iterdir()} >= {
        "report.html",
        "result.json",
        "run.db",
        "model",
        "best.yaml",
    }
    again = client("demo", *QUICK, "--run-dir", folder)
    assert again.returncode == 2 and "exists and is not empty" in again.stderr
