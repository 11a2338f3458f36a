"""The CUDA sources run without a GPU: compiled as C++ with the sanitizers on, under the same kernel tests.

The whole suite takes some eight minutes with its build, so it is marked `heavy`: `make test-heavy`, and CI.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.emulation.library import HERE, ROOT, SANITIZE, build, environment

pytestmark = pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ on Linux")
SUITES = ("test_merge.py", "test_statistics.py", "test_backward.py", "test_packed.py")
DRAWS = "test_draws.py::test_a_keep_is_a_draw_below_the_density"


@pytest.fixture(scope="module")
def library():
    return build(ROOT / "build" / "emulated")


@pytest.mark.heavy
@pytest.mark.timeout(2400)
def test_kernel_suite_under_the_sanitizers(library):
    """cuda: csrc/cuda/*.cu, emulated; cpu: csrc/cpu, every loop that this processor has. Both at the same time."""
    files = [str(Path(__file__).with_name(name)) for name in (*SUITES, DRAWS)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "tests.kernels.emulation.library",
        "-p",
        "no:cacheprovider",
        *files,
    ]
    # Instruction sets are compared in processes of their own.
    only = {"cuda": ["-k", "not instruction_set"], "cpu": []}
    runs = {
        device: subprocess.Popen(
            [*command, *only[device]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment(device, library),
        )
        for device in only
    }
    outputs = {device: run.communicate()[0] for device, run in runs.items()}
    for device, run in runs.items():
        assert run.returncode == 0 and " passed" in outputs[device], f"{device}:\n{outputs[device][-6000:]}"
        print(device, outputs[device].splitlines()[-1])


@pytest.mark.heavy
@pytest.mark.parametrize(
    "code,error,said",
    [
        (
            209,
            "Unavailable",
            "CUDA error 209: built for compute capabilities 80 90 120, this GPU has 75: "
            "build again with MERGE3_ARCHITECTURES=75",
        ),
        (35, "Unavailable", "CUDA error 35: the driver serves CUDA 12.4, this build needs 13.0: update the driver"),
        (2, "ResourceError", "CUDA error 2: "),
    ],
)
def test_what_a_gpu_refuses_is_said_in_words(library, code, error, said):
    script = """
import tests.kernels.emulation.library, torch
from merge3 import errors, kernels
try:
    kernels.merge_([torch.empty(8)], [torch.zeros(8)], [torch.ones(8)], kernels.coefficients(1, 1), torch.ones(1))
except errors.Merge3Error as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment("cuda", library) | {"MERGE3_TEST_CUDA_ERROR": str(code)},
    )
    assert done.stdout.startswith(error) and said in done.stdout, done.stdout + done.stderr


@pytest.mark.heavy
def test_a_merge_is_refused_while_a_graph_is_captured(library):
    script = """
import os, tests.kernels.emulation.library, torch
from merge3 import errors, kernels
out, base, experts = [torch.empty(8)], [torch.zeros(8)], [torch.ones(8)]
case = kernels.coefficients(1, 1), torch.ones(1)
prepared = kernels.Prepared(out, base, experts)
prepared.upload(*case)
os.environ["MERGE3_TEST_CAPTURING"] = "1"
prepared.launch()
print(out[0].sum())
try:
    kernels.merge_(out, base, experts, *case)
except errors.BadInput as error:
    print(error)
"""
    command, surroundings = [sys.executable, "-c", script], environment("cuda", library)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=surroundings)
    assert done.stdout.startswith("tensor(8.)\na CUDA graph is being captured"), done.stdout + done.stderr
    assert "capture Prepared.launch" in done.stdout


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_every_merge_has_the_bits_of_the_cpu(library):
    """K, dtypes, modes, sizes, addresses: the kernels that read 16 bytes at a time, and the one that takes the rest."""
    command = [sys.executable, "-m", "tests.kernels.emulation.bits"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # the sanitizer warns of coroutines, or not
    start = lambda device, counts: subprocess.Popen(
        [*command, *counts], cwd=ROOT, env=environment(device, library), **pipes
    )
    # Halves that take about as long, for two cores; the CPU's own take seconds.
    halves = ("8", "7", "5", "4"), ("6", "3", "2", "1")
    runs = [start(device, counts) for device in ("cuda", "cpu") for counts in halves]
    told = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0] * 4, [wrong[-3000:] for _, wrong in told]
    there, here = ("".join(told[at][0] for at in ats).splitlines() for ats in ((0, 1), (2, 3)))
    assert len(there) == len(here) == 24 * 39
    assert [t for t, h in zip(there, here) if t != h] == []


@pytest.mark.heavy
def test_a_call_sends_one_copy_and_starts_one_kernel_for_each_dtype(library, tmp_path):
    objects = sorted(library.parent.glob("*.cu.o"))
    command = ["g++", "-std=c++20", "-O1", "-Wno-psabi", *SANITIZE, "-DMERGE3_WITH_CUDA", "-DMERGE3_EMULATED"]
    command += [
        "-DMERGE3_CHUNK=2048",
        f"-I{HERE}",
        "-x",
        "c++",
        HERE / "uploads.cpp",
        "-x",
        "none",
        *objects,
        "-o",
        tmp_path / "uploads",
    ]
    subprocess.run(command, check=True)
    done = subprocess.run([tmp_path / "uploads"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_a_missed_barrier_and_an_overrun_are_noticed(tmp_path):
    """The emulation itself: what it is there to catch, it catches."""
    (tmp_path / "bad.cpp").write_text("""
#include "cuda_runtime.h"
__global__ void divergent() { if (threadIdx.x < 3) __syncthreads(); }
__global__ void overrun(int* data, int n) { if (int(threadIdx.x) <= n) data[threadIdx.x] = 1; }
__global__ void racing(int* data) { data[0] = threadIdx.x; __syncthreads(); data[1 + threadIdx.x] = data[0]; }
__global__ void sum(int* out) {
  __shared__ int shared[8];
  shared[threadIdx.x] = threadIdx.x + 1;
  __syncthreads();
  for (int half = 4; half > 0; half /= 2) {
    if (int(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = shared[0] + int(gridDim.x) * 100;
}
int main(int, char** argv) {
  std::vector<int> data(8);
  switch (argv[1][0]) {
    case 'd': emulation::launch(divergent, 1, 8); break;
    case 'o': emulation::launch(overrun, 1, 16, data.data(), 8); break;
    case 'r': emulation::launch(racing, 1, 7, data.data()); return data[1] != 6;
    case 's': emulation::launch(sum, 3, 8, data.data()); return data[0] == 336 && data[2] == 336 ? 0 : 1;
  }
}
""")
    subprocess.run(
        ["g++", "-std=c++20", "-O1", *SANITIZE, f"-I{HERE}", "bad.cpp", "-o", "bad"], cwd=tmp_path, check=True
    )
    run = lambda what: subprocess.run([tmp_path / "bad", what], capture_output=True, text=True)
    assert run("sum").returncode == 0 and run("racing").returncode == 0
    divergent, overrun = run("divergent"), run("overrun")
    assert divergent.returncode != 0 and "5 of 8 threads ended while the others wait" in divergent.stderr
    assert overrun.returncode != 0 and "heap-buffer-overflow" in overrun.stderr


@pytest.mark.heavy
def test_tensors_beyond_2_to_the_31(tmp_path):
    objects = [HERE / "large.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        "-ffp-contract=off",
        "-DMERGE3_WITH_CUDA",
        "-DMERGE3_EMULATED",
        f"-I{HERE}",
        "-x",
        "c++",
    ]
    subprocess.run([*command, *map(str, objects), "-o", str(tmp_path / "large")], check=True)
    done = subprocess.run([tmp_path / "large"], capture_output=True, text=True, timeout=300)
    if done.returncode == 77:
        pytest.skip(f"no address space: {done.stderr}")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr
