"""What README.md shows is typed as it stands, in order: its files saved, its commands and its Python run. A tiny world
takes the place of the demo's models. In docs/*.md the same holds for blocks under a mark, `<!-- run -->`; commands of
ours run in this process there, which spares them their imports."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.commands import client

ROOT = Path(__file__).resolve().parents[2]
# Commands that cannot run here, by how they begin, and why.
SKIPPED = {
    "python3 -m venv": "installs",
    "source .venv/bin/activate": "installs",
    "pip install": "installs",
    "make demo": "minutes of training: a tiny world takes its models' place",
}
SHORTER = {"merge3-client evolve": "--budget 8"}  # flags that shrink a command and change nothing else
BLOCK = re.compile(r"^(<!-- run -->\n)?```(\w+)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A fenced block of a document. where: file and line; marked: whether it says that it is run."""

    language: str
    text: str
    where: str
    marked: bool


def blocks(file):
    text = file.read_text()
    for match in BLOCK.finditer(text):
        line = 1 + text.count("\n", 0, match.start(2))
        yield Block(match[2], match[3], f"{file.relative_to(ROOT)}, line {line}", bool(match[1]))


class Reader:
    """Somebody who types what a document shows, from `folder` on. skipped: entries of SKIPPED that were met; here:
    whether merge3-client runs in this process."""

    def __init__(self, folder, here=False):
        self.folder, self.skipped, self.printed, self.here = folder, set(), {}, here
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
        assert shutil.which("merge3-client", path=path), "merge3-client is not installed beside this Python"

    def follow(self, block):
        """Do what a block asks."""
        if block.language == "yaml":
            self.save(block)
        elif block.language == "python":
            self.run([sys.executable, "-c", block.text], block.where)
        elif block.language == "bash":
            for line in block.text.splitlines():
                self.type(line, block.where)

    def save(self, block):
        """The file that the first line names, `# ties.yaml`."""
        name = re.match(r"# ([\w-]+\.yaml)\n", block.text)
        assert name, f"{block.where}: a file without a name"
        (self.folder / name[1]).write_text(block.text)

    def type(self, line, where):
        """One command. `cd` holds for those that follow."""
        command = line.partition(" #")[0].strip()
        for beginning in SKIPPED:
            if command.startswith(beginning):
                self.skipped.add(beginning)
                return
        if command.startswith("cd "):
            self.folder = self.folder / command.removeprefix("cd ")
            assert self.folder.is_dir(), f"{where}: {command}"
            return
        for beginning, flag in SHORTER.items():
            if command.startswith(beginning):
                command += f" {flag}"
        run = self.run_here if self.here and command.startswith("merge3-client ") else self.run
        self.printed[command] = run(["bash", "-c", command], f"{where}: {command}")

    def run_here(self, arguments, where):
        """The same of a command without anything that a shell reads."""
        command = shlex.split(arguments[-1])
        assert not set(arguments[-1]) & set("|&;<>$*`"), f"{where}: for a shell"
        with contextlib.chdir(self.folder):
            done = client(*command[1:])
        assert done.returncode == 0, f"{where}\n{done.stdout}{done.stderr}"
        return done.stdout

    def run(self, arguments, where):
        """Its output. A failure says where it stands."""
        place = {"cwd": self.folder, "env": self.environment}
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, **place)
        assert done.returncode == 0, f"{where}\n{done.stdout}{done.stderr}"
        self.printed["last"] = done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def checkout(tiny_world, tmp_path_factory):
    """A folder with what the demo leaves."""
    root = tmp_path_factory.mktemp("checkout")
    models = root / "runs" / "demo-0" / "models"
    shutil.copytree(tiny_world, models)
    (models / "evolve.yaml").unlink()
    return root


def test_the_readme_works_as_typed(checkout):
    reader = Reader(checkout)
    for block in blocks(ROOT / "README.md"):
        reader.follow(block)
    assert reader.skipped == SKIPPED.keys(), "SKIPPED names what the README no longer shows"
    models = checkout / "runs" / "demo-0" / "models"
    assert (models / "merged" / "model.safetensors").exists()
    left = {path.name for path in (models / "runs" / "first").iterdir()}
    assert left >= {"best.yaml", "model", "result.json", "report.html", "run.db"}
    result = json.loads((models / "runs" / "first" / "result.json").read_text())
    assert result["candidates"] == 8 and result["heldout_items"] == 24
    # The snippet, which asks the live model, and the command, which asks the written file, have the same answers.
    evaluated = reader.printed["merge3-client evaluate merged english.jsonl italian.jsonl"]
    accuracy, error = re.search(r"^english\s+(\S+) ± (\S+)", evaluated, re.M).groups()
    assert reader.printed["last"].split() == [f"{float(accuracy):.3f}", "±", f"{float(error):.3f}"]


def test_marked_blocks_of_the_pages_work_as_typed(checkout):
    models = checkout / "runs" / "demo-0" / "models"
    write_answers(models)
    for block in blocks(ROOT / "README.md"):
        if block.language == "yaml":
            Reader(models).save(block)
    followed = 0
    for file in sorted((ROOT / "docs").glob("*.md")):
        marked = [block for block in blocks(file) if block.marked]
        # One Python for all that follows each other on a page: imports are slow.
        for _, group in groupby(marked, key=lambda block: block.language):
            first, *others = group
            text = "\n".join([first.text, *(block.text for block in others)])
            Reader(models, here=True).follow(first._replace(text=text))
        followed += len(marked)
    assert followed == 16
    exported, written = (models / name / "model.safetensors" for name in ("exported", "written"))
    assert exported.read_bytes() == written.read_bytes()
    assert set(json.loads((models / "subset.json").read_text())["tasks"]) == {"math", "italian"}


def write_answers(folder):
    """answers.csv of a dozen models to two tasks of 24 items, and new.csv of two more."""
    rng = np.random.default_rng(0)
    for name, models in (("answers.csv", 12), ("new.csv", 2)):
        lines = ["model,item,score"]
        for task in ("math", "italian"):
            ability, difficulty = rng.normal(size=models), rng.normal(size=24)
            right = rng.random((models, 24)) < 1 / (1 + np.exp(difficulty - ability[:, None]))
            lines += [f"{name[:3]}{m},{task}/i{i},{int(right[m, i])}" for m in range(models) for i in range(24)]
        (folder / name).write_text("\n".join(lines) + "\n")
