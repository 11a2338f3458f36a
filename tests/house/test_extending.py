"""docs/extending.md: its diffs apply to the package as it is, and what they add works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def blocks(language):
    text = (ROOT / "docs" / "extending.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def apply(diff, folder):
    """A diff whose hunks name no lines: what is taken away, or stands unmarked, is found by its text."""
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        head, *hunks = re.split(r"^@@\n", part, flags=re.MULTILINE)
        old, new = (line.split()[-1] for line in head.strip().splitlines())
        file = folder / new.removeprefix("b/")
        text = "" if old == "/dev/null" else file.read_text()
        for hunk in hunks:
            lines = hunk.splitlines()
            before = "".join(line[1:] + "\n" for line in lines if not line.startswith("+"))
            after = "".join(line[1:] + "\n" for line in lines if not line.startswith("-"))
            assert text.count(before) == 1 or not text, f"{file.name}: {before!r} is there {text.count(before)} times"
            text = text.replace(before, after, 1) if text else after
        file.write_text(text)


def test_each_is_one_small_diff_that_applies_and_runs(tmp_path, tiny_world):
    diffs, snippets = blocks("diff"), blocks("python")
    assert len(diffs) == len(snippets) == 5 and all(len(diff.splitlines()) < 60 for diff in diffs)
    shutil.copytree(ROOT / "merge3", tmp_path / "package" / "merge3", ignore=shutil.ignore_patterns("__pycache__"))
    for diff in diffs:
        apply(diff, tmp_path / "package")
    for name in ("base", "e0", "e1"):
        shutil.copytree(tiny_world / {"base": "base", "e0": "english", "e1": "italian"}[name], tmp_path / name)
    (tmp_path / "run.py").write_text("\n".join(snippets))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "package")}
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The rows are all that the configuration and the list of methods look at.
    script = """
from merge3.methods import METHODS
from merge3.search.config import EvolveConfig
genome = {"models": ["e0"], "base_model": "base", "merge_method": "mean_change", "space": "scale"}
data = {"genome": genome, "tasks": ["t"], "optimizer": {"name": "climb"}, "objective": "worst"}
config = EvolveConfig.model_validate(data)
print(config.optimizer.name, config.objective, config.genome.definition().kind, "mean_change" in METHODS)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["climb", "worst", "scale", "True"], done.stderr
    merged, base = (tmp_path / name / "model.safetensors" for name in ("merged", "base"))
    assert merged.stat().st_size == base.stat().st_size and merged.read_bytes() != base.read_bytes()
