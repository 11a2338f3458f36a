"""The kernels inside other programs: the installed C++ library, plain state dicts."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.heavy
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_install_find_package_and_the_cpp_example(tmp_path):
    def cmake(*arguments):
        done = subprocess.run(["cmake", *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    cmake("-S", ROOT, "-B", tmp_path / "build", "-DMERGE3_CUDA=0")
    cmake("--build", tmp_path / "build", "-j", 2)
    cmake("--install", tmp_path / "build", "--prefix", tmp_path / "prefix")
    assert {p.name for p in (tmp_path / "prefix").rglob("*") if p.is_file()} >= {
        "libmerge3.a",
        "libmerge3.so",
        "merge.h",
    }
    cmake(
        "-S", ROOT / "examples" / "embed_cpp", "-B", tmp_path / "example", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}"
    )
    cmake("--build", tmp_path / "example")
    done = subprocess.run([tmp_path / "example" / "embed"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nine experts: 9 experts: expected 1 to 8" in done.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_c_api_refuses_with_code_and_message(tmp_path):
    objects = sorted((ROOT / "build" / "kernels").glob("*.o"))
    if not objects:
        pytest.skip("the kernels were not built in this directory")
    program = tmp_path / "c_api"
    source = Path(__file__).with_name("c_api.cpp")
    subprocess.run(
        ["g++", "-std=c++20", f"-I{ROOT / 'csrc' / 'include'}", source, *objects, "-o", program, "-lpthread"],
        check=True,
    )
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    # The headers are C.
    (tmp_path / "header.c").write_text("#include <merge3/merge.h>\n#include <merge3/compact.h>\n")
    command = ["gcc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{ROOT / 'csrc' / 'include'}", "-c"]
    subprocess.run([*command, tmp_path / "header.c", "-o", tmp_path / "header.o"], check=True)


def test_the_state_dict_example():
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "state_dict" / "merge.py"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    difference, whole, sparse = (float(line.split(":")[1]) for line in done.stdout.splitlines())
    assert difference < 1e-6 and abs(whole - sparse) < 1e-4
