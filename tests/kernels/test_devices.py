"""Several GPUs and graph capture, without a GPU: the C API over launchers that note the current device."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).with_name("emulation")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_every_call_runs_on_its_device_and_copies_are_refused_while_a_graph_is_captured(tmp_path):
    loops = [o for o in sorted((ROOT / "build" / "kernels").glob("*.o")) if o.name != "api.cpp.o"]
    if not loops:
        pytest.skip("the kernels were not built in this directory")
    program = tmp_path / "devices"
    command = ["g++", "-std=c++20", "-O0", "-Wall", "-Wextra", "-Wno-psabi", f"-I{HERE}"]
    command += ["-DMERGE3_WITH_CUDA", "-DMERGE3_EMULATED"]
    sources = [HERE / "devices.cpp", ROOT / "csrc" / "api.cpp", ROOT / "csrc" / "cuda" / "device.cu"]
    subprocess.run([*command, "-x", "c++", *sources, "-x", "none", *loops, "-o", program, "-lpthread"], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
