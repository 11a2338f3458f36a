"""One command for a machine with a GPU: build, test, sanitize, measure; from a bare checkout, without a network.

python benchmarks/gpu_check.py [--only build tests ..]

Needs torch with CUDA, nvcc, ninja, transformers, safetensors, numpy, pytest and hypothesis; pyro, cma and grpc are not
imported. Takes under ten minutes. Writes benchmarks/results/gpu-<name>.json and .md, from which the README's table is
made. A step that fails is in the report and does not keep the others from running; the exit code is then 1.
--rehearse runs every step that needs no GPU on the CPU, small, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402

STEPS = ("build", "tests", "memcheck", "racecheck", "bandwidth", "eager", "candidate", "linear", "overlap")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--case", action="store_true", help="Run the small case that the sanitizers watch, and nothing else.")
    options = parser.parse_args()
    if options.case:
        measures().small_case(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("no GPU that this PyTorch can use; --rehearse runs what needs none")
    device = torch.device("cpu" if options.rehearse else "cuda")
    found: dict = {"machine": facts(device), "steps": {}}
    for step in options.only:
        if options.rehearse and step == "build":
            continue
        began = time.perf_counter()
        try:
            result = (globals().get(step) or getattr(measures(), step))(device)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"[-2000:]}
        result["seconds"] = round(time.perf_counter() - began, 1)
        found["steps"][step] = result
        print(f"{step}: {json.dumps(result)[:3000]}", flush=True)
        if not options.rehearse:
            import_module("gpu_report").write(found)
    failed = [step for step, result in found["steps"].items() if "error" in result]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def measures():
    return import_module("gpu_measures")  # needs the built kernels


def build(device: torch.device) -> dict:
    major, minor = torch.cuda.get_device_capability(device)
    environment = os.environ | {"MERGE3_CUDA": "1", "MERGE3_ARCHITECTURES": f"{major}{minor}", "MAX_JOBS": str(os.cpu_count())}
    run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], environment)
    from merge3 import kernels

    return kernels.build_info()


def tests(device: torch.device) -> dict:
    """The kernel suite with its tensors on the GPU, then what only a GPU can show."""
    suites = [str(ROOT / "tests" / "kernels" / f"test_{name}.py") for name in ("merge", "statistics", "backward", "packed", "linear")]
    # Other processes, other instruction sets, addresses that no GPU memory has, tables that stay on the device.
    skipped = "not instruction_set and not prepare and not bad_arguments and not threads and not opcheck and not build_step"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "MERGE3_TEST_TARGET": str(device)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    on_gpu = run([*command, "-p", "tests.kernels.on_gpu", "-k", skipped, *(suites[:1] if device.type == "cpu" else suites)], environment)
    own = run([*command, str(ROOT / "tests" / "kernels" / "test_gpu.py")], environment)
    last = lambda text: text.strip().splitlines()[-1]
    return {"kernel suite": last(on_gpu), "gpu only": last(own)}


def memcheck(device: torch.device) -> dict:
    return sanitized("memcheck", device)


def racecheck(device: torch.device) -> dict:
    return sanitized("racecheck", device)


def sanitized(tool: str, device: torch.device) -> dict:
    watcher = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"] if device.type == "cuda" else []
    output = run([*watcher, sys.executable, __file__, "--case"], os.environ)
    summary = [line for line in output.splitlines() if "SUMMARY" in line]
    return {"summary": summary[-1].strip("= ") if summary else output[-300:]}


def run(command: list[str], environment) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(environment))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout + done.stderr


def facts(device: torch.device) -> dict:
    known = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if device.type == "cuda":
        driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
        nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
        release_of = re.search(r"release ([\d.]+)", nvcc)
        known |= {"gpu": torch.cuda.get_device_name(device), "driver": driver.stdout.strip(), "nvcc": release_of[1] if release_of else "?"}
    return known


if __name__ == "__main__":
    main()
