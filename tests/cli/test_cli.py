"""The command as a person meets it: its exit code, what it prints, one line for bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from merge3.client.cli import app
from merge3.errors import BadInput
from tests.commands import client

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = tuple(command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands)


def recipe_file(folder, family, **changes):
    data = {
        "merge_method": "ties",
        "base_model": str(family / "base"),
        "parameters": {"density": 0.5},
        "models": [{"model": str(family / f"e{i}"), "parameters": {"weight": 0.5}} for i in range(2)],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data | changes))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    done = client(command, "--help")
    assert done.returncode == 0 and f"Example: merge3-client {command}" in done.stdout


def test_the_process_ends_with_these_codes(family, tmp_path):
    """0: done, 1: not the caller's fault, 2: bad input. 130, interrupted: tests/server/test_remote.py."""

    def process(*arguments):
        command = [sys.executable, "-m", "merge3.client", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = process("merge", recipe_file(tmp_path, family), tmp_path / "out")
    assert done.returncode == 0 and "39 tensors" in done.stdout, done.stderr
    away = process("status", "--server", "127.0.0.1:1")
    assert away.returncode == 1 and away.stderr.startswith("error: daemon 127.0.0.1:1: does not answer")
    assert away.stderr.count("\n") == 1
    bad = process("merge", recipe_file(tmp_path, family, merge_method="tise"), tmp_path / "other")
    assert bad.returncode == 2 and "did you mean 'ties'" in bad.stderr and bad.stderr.count("\n") == 1


def test_a_command_leaves_the_process_as_it_was(family, tmp_path):
    """--strict holds for its command alone, and each command shows its own warnings, once."""
    before = list(warnings.filters), warnings.showwarning, signal.getsignal(signal.SIGINT)
    recipe = recipe_file(tmp_path, family, anchors={"w": 0.5})
    strict = client("merge", recipe, tmp_path / "none", "--strict")
    assert strict.returncode == 2 and "anchors: ignored" in strict.stderr and "(--strict)" in strict.stderr
    for name in ("one", "two"):
        done = client("merge", recipe, tmp_path / name)
        assert done.returncode == 0 and done.stderr.count("anchors: ignored") == 1, done.stderr
    assert (list(warnings.filters), warnings.showwarning, signal.getsignal(signal.SIGINT)) == before


def test_help_imports_nothing_heavy():
    heavy = ("torch", "transformers", "numpy", "cma", "pydantic")
    code = f"import sys; import merge3.client.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"


def test_merge_evaluate_and_report(family, tiny_world, tmp_path):
    done = client("merge", recipe_file(tmp_path, family), tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tensors"] == 39
    card = (tmp_path / "out" / "README.md").read_text()
    assert "merge_method: ties" in card and str(family / "e1") in card
    again = client("merge", tmp_path / "recipe.yaml", tmp_path / "out")
    assert again.returncode == 2 and "exists and is not empty" in again.stderr
    done = client(
        "evaluate",
        tiny_world / "english",
        tiny_world / "translation.jsonl",
        "--json",
        "--responses",
        tmp_path / "r.jsonl",
    )
    result = json.loads(done.stdout)
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and result["accuracy"] == pytest.approx(sum(r["score"] for r in rows) / 40)


def test_evolve_prints_a_table_and_json(tiny_world, tmp_path):
    config = tiny_world / "evolve.yaml"
    done = client("evolve", config, "--run-dir", tmp_path / "run", "--budget", 6, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["candidates"] == 6
    progress = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert progress[-2]["done"] == 6
    page = tmp_path / "run" / "report.html"
    drawn = page.read_text()
    page.unlink()
    done = client("report", tmp_path / "run")
    assert (done.returncode, done.stdout) == (0, f"{page}\n") and page.read_text() == drawn


def test_files_no_larger_than_asked(family, tmp_path):
    """Shards as transformers loads them, with the weights of the merge in one file."""
    recipe = recipe_file(tmp_path, family)
    for name, options in (("whole", ()), ("parts", ("--shard-size", 60_000))):
        assert client("merge", recipe, tmp_path / name, *options).returncode == 0
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 3 and all(f.stat().st_size < 60_000 + 2_000 for f in files)  # and their headers
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())["weight_map"]
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    assert index.keys() == expected.keys() and set(index.values()) == {f.name for f in files}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "parts").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def damaged(family, tmp_path, change):
    shutil.copytree(family / "e0", tmp_path / "e0")
    change(tmp_path / "e0")
    return [{"model": str(tmp_path / "e0"), "parameters": {"weight": 1.0}}]


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def poison(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][2] = float("nan")
    save_file(tensors, folder / "model.safetensors")


BAD_MERGES = {
    "unknown method": (lambda f, t: dict(merge_method="tise"), "did you mean 'ties'"),
    "unknown parameter": (lambda f, t: dict(parameters={"desnity": 0.5}), "did you mean 'density'"),
    "missing base": (lambda f, t: dict(base_model=str(t / "nowhere")), "nowhere: no such directory"),
    "truncated": (lambda f, t: dict(models=damaged(f, t, truncate)), "truncated: tensor"),
    "pickle": (lambda f, t: dict(models=damaged(f, t, pickle)), "a pickle checkpoint"),
    "nan": (lambda f, t: dict(models=damaged(f, t, poison)), "NaN or infinity in tensor 'model.norm.weight'"),
    "density": (lambda f, t: dict(parameters={"density": 7}), "density: found 7; expected a value in [0, 1]"),
}


@pytest.mark.parametrize("case", BAD_MERGES)
def test_bad_input_is_one_line_and_exit_2(family, tmp_path, case):
    make, message = BAD_MERGES[case]
    done = client("merge", recipe_file(tmp_path, family, **make(family, tmp_path)), tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_bad_items_and_configurations(tiny_world, tmp_path):
    (tmp_path / "items.jsonl").write_text('{"kind": "choice"}\n')
    done = client("evaluate", tiny_world / "base", tmp_path / "items.jsonl")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "items.jsonl, line 1" in done.stderr
    (tmp_path / "evolve.yaml").write_text("genome: {models: [a], merge_method: linear}\ntasks: [{weight: 2}]\n")
    done = client("evolve", tmp_path / "evolve.yaml", "--run-dir", tmp_path / "run")
    assert done.returncode == 2 and "neither a name of lm-eval's nor items" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_no_permission_to_write(family, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    recipe = recipe_file(tmp_path, family)
    if os.geteuid() == 0:  # root may write anywhere but below a file
        (tmp_path / "file").write_text("")
        done = client("merge", recipe, tmp_path / "file" / "out")
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        return
    locked.chmod(0o500)
    done = client("merge", recipe, locked / "out")
    assert done.returncode == 2 and "no permission to write" in done.stderr


def test_methods_lists_every_method():
    from merge3.methods import LEARNED, METHODS, VARIANTS, ZIPPED

    assert set(json.loads(client("methods", "--json").stdout)) == {*METHODS, *VARIANTS, *LEARNED, *ZIPPED}


# -- the house


def test_layers():
    linter = shutil.which("lint-imports", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if linter is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run([linter], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_only_the_torch_binding_includes_torch():
    for file in (ROOT / "csrc").rglob("*"):
        if file.suffix in (".h", ".cpp", ".cu", ".cuh") and "torch" not in file.parent.name:
            assert not re.search(r"#include.*(torch|ATen|c10)", file.read_text()), file


def test_public_names():
    """What others build on: a name that goes, or comes, is decided here."""
    import merge3

    assert set(merge3.__all__) == {
        "__version__",
        "Recipe",
        "Pool",
        "Slot",
        "Space",
        "SpaceDefinition",
        "LocalEngine",
        "Registration",
        "Varied",
        "Variants",
        "Item",
        "read_items",
        "merge_to_disk",
        "METHODS",
    }
    for name in ("Recipe", "Pool", "Slot", "Space", "LocalEngine", "Item", "merge_to_disk"):
        assert getattr(merge3, name).__name__ == name
    assert "ties" in merge3.METHODS and set(merge3.__all__) <= set(dir(merge3))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = merge3.nothing


def test_readme_commands_exist():
    text = (ROOT / "README.md").read_text()
    used = set(re.findall(r"merge3-client ([\w-]+)", text))
    assert used <= set(COMMANDS) and {"merge", "evolve", "evaluate"} <= used
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make (\w+)`?", text)) <= targets


def test_nothing_names_this_machine():
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    for name in files:
        path = ROOT / name
        if path.is_file() and path.suffix in (".py", ".md", ".toml", ".txt", ".h", ".cpp", ".cu", ".yaml", ".json", ""):
            text = path.read_text(errors="ignore")
            assert "/wo" + "rk/" not in text and "/ro" + "ot/" not in text, name


def test_a_bad_memory_budget_is_one_line(family, tmp_path):
    items = tmp_path / "items.jsonl"
    items.write_text('{"id": "a", "kind": "choice", "prompt": "x", "choices": ["y", "z"], "answer": 0}\n')
    for budget, message in (
        ("plenty", "memory_budget: found 'plenty'"),
        ("1KiB", "memory_budget: found 0.0 MiB; expected at least"),
    ):
        done = client("evaluate", str(family / "base"), str(items), "--memory-budget", budget)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_memory_budget_is_the_daemons_own():
    from types import SimpleNamespace

    from merge3.client.run import open_engine

    genome = SimpleNamespace(recipe_tokenizer=lambda: None, tower={}, dtype=None)
    config = SimpleNamespace(models=(), genome=genome, experts=None)
    with pytest.raises(BadInput, match="--memory-budget: given with --server"):
        open_engine(config, target=object(), memory_budget="1GiB")
