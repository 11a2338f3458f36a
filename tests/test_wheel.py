"""The wheel: built from the sources alone, installed where nothing of this checkout is seen, used from elsewhere."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.heavy


def run(*command, cwd):
    """A command without this checkout on Python's path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def sources(folder):
    """What is in version control, and the compiled kernels, which cost minutes: made anew only where they are stale."""
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for kernels in (ROOT / "build").glob("kernels*"):
        shutil.copytree(kernels, folder / "build" / kernels.name)
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(the folder of its commands, what building it said)"""
    folder = tmp_path_factory.mktemp("wheel")
    build = ("wheel", "--verbose", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, ".")
    said = run(sys.executable, "-m", "pip", *build, cwd=sources(folder / "sources"))
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    # The packages it depends on, by their folder: no .pth file in there is read, so no editable install either.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    Path(site, "dependencies.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return python.parent, said


def test_it_is_built_without_a_complaint_about_packages(installed):
    _, said = installed
    assert "absent from the `packages` configuration" not in said and "Successfully built merge3-gpu" in said


def test_it_merges_from_another_directory(installed, family, tmp_path):
    commands, _ = installed
    where = run(
        commands / "python",
        "-c",
        "import merge3.kernels, merge3_server; print(merge3.__file__, merge3_server.__file__)",
        cwd=tmp_path,
    )
    assert all(Path(file).is_relative_to(commands.parent) for file in where.split())
    assert "merge3-client" in run(commands / "merge3-client", "--version", cwd=tmp_path)
    models = [{"model": str(family / f"e{i}"), "parameters": {"weight": 0.5, "density": 0.5}} for i in range(2)]
    recipe = {"merge_method": "ties", "base_model": str(family / "base"), "models": models}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merged = json.loads(run(commands / "merge3-client", "merge", "recipe.yaml", "out", "--json", cwd=tmp_path))
    assert merged["tensors"] == 39
    run(sys.executable, "-m", "merge3.client", "merge", tmp_path / "recipe.yaml", tmp_path / "ours", cwd=ROOT)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_its_daemon_serves_its_client(installed, family, tmp_path):
    commands, _ = installed
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [commands / "merge3-server", "serve", "--root", family, "--listen", f"unix:{tmp_path}/d.sock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as daemon:
        assert daemon.stdout.readline().startswith("merge3-server listens on unix:")
        status = run(
            commands / "merge3-client", "status", "--server", f"unix:{tmp_path}/d.sock", "--json", cwd=tmp_path
        )
        daemon.terminate()
        assert daemon.wait(60) == 0
    assert json.loads(status)["state"] == "serving"
