"""One command for a machine with a GPU: build, measure, test, sanitize; from a bare checkout, without a network.

python benchmarks/gpu_check.py [--only measure | check | STEP ..] [--out DIR]

Needs torch with CUDA, nvcc, ninja, transformers, safetensors, numpy, pytest and hypothesis; pyro, cma and grpc are not
imported. Writes DIR/gpu-<name>.json and .md (default: benchmarks/results, from which docs/benchmarks.md is made), anew
after every row: a run that is cut short has left what it measured. What is worth most comes first. A step that fails is
in the report and does not keep the others from running; the exit code is then 1.

In two calls: --only measure, then --only check. The second adds to the files that it finds in DIR, if the machine and
the kernels' sources are still the same.

--rehearse runs every step that needs no GPU on the CPU, small; it writes only where --out says so, to rehearsal.json.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402

STAGES = {
    "measure": ("build", "bandwidth", "candidate", "eager", "overlap"),
    "check": ("build", "tests", "memcheck", "racecheck", "variants"),
}
STEPS = tuple(dict.fromkeys(step for steps in STAGES.values() for step in steps))
RESULTS = Path(__file__).with_name("results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*STAGES, *STEPS), default=STEPS, help="Default: all.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="Where the results go. Default: benchmarks/results.")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--case", action="store_true", help="Run the small case that the sanitizers watch, no more.")
    options = parser.parse_args()
    if options.case:
        measures().small_case(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("no GPU that this PyTorch can use; --rehearse runs what needs none")
    device = torch.device("cpu" if options.rehearse else "cuda")
    report, folder = import_module("gpu_report"), options.out or (None if options.rehearse else RESULTS)
    found = {"machine": facts(device), "steps": {}}
    if folder:
        found["steps"] = report.earlier(found["machine"], folder)
    chosen = steps_of(options.only)
    for step in chosen:
        if not (options.rehearse and step == "build"):
            perform(step, device, found, lambda: report.write(found, folder) if folder else None)
    failed = [step for step in chosen if "error" in found["steps"].get(step, {})]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def steps_of(names) -> list[str]:
    """In the order of STEPS, whatever the order they were asked for in."""
    wanted = {step for name in names for step in STAGES.get(name, (name,))}
    return [step for step in STEPS if step in wanted]


def perform(step: str, device: torch.device, found: dict, save: Callable[[], object]) -> None:
    """Run a step, a generator of rows and of sentences about them. Each is saved before the next is measured."""
    result = found["steps"][step] = {"rows": [], "notes": [], "cut": True}
    began = time.perf_counter()
    try:
        for row in (globals().get(step) or getattr(measures(), step))(device):
            result["notes" if isinstance(row, str) else "rows"].append(row)
            result["seconds"] = round(time.perf_counter() - began, 1)
            save()
            print(f"{step}: {json.dumps(row)}", flush=True)
    except Exception as error:
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"[-2000:]
    del result["cut"]
    result["seconds"] = round(time.perf_counter() - began, 1)
    save()
    print(f"{step}: {result.get('error', 'done')}, {result['seconds']} s", flush=True)


def measures():
    return import_module("gpu_measures")  # needs the built kernels


def build(device: torch.device):
    major, minor = torch.cuda.get_device_capability(device)
    wanted = {"MERGE3_CUDA": "1", "MERGE3_ARCHITECTURES": f"{major}{minor}", "MAX_JOBS": str(os.cpu_count())}
    run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], os.environ | wanted)
    from merge3 import kernels

    yield kernels.build_info()


def tests(device: torch.device):
    """The kernel suite with its tensors on the GPU, then what only a GPU can show."""
    file = lambda name: str(ROOT / "tests" / "kernels" / f"test_{name}.py")
    suites = [file(name) for name in ("merge", "statistics", "backward", "packed")]
    suites.append(f"{file('draws')}::test_a_keep_is_a_draw_below_the_density")
    # Other processes, other instruction sets, addresses that no GPU memory has, tables that stay on the device.
    skipped = ("instruction_set", "prepare", "bad_arguments", "threads", "opcheck", "build_step")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "MERGE3_TEST_TARGET": str(device)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and device.type == "cuda":
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    selected = ["-p", "tests.kernels.on_gpu", "-k", " and ".join(f"not {name}" for name in skipped)]
    on_gpu = [*selected, *(suites[:1] if device.type == "cpu" else suites)]
    failures = []
    for name, arguments in {"kernel suite": on_gpu, "gpu only": [file("gpu")]}.items():
        try:
            lines = run([*command, *arguments], environment).splitlines()
            yield {"check": name, "result": next((x for x in reversed(lines) if re.search(r"\d passed", x)), lines[-1])}
        except RuntimeError as error:
            failures.append(f"{name}: {error}")
            yield {"check": name, "result": str(error)[-600:]}
    if failures:
        raise RuntimeError("\n".join(failures))


def variants(device: torch.device):
    """Other sizes of blocks and depths of loads: each is a build of its own."""
    yield from import_module("gpu_variants").variants(device)


def memcheck(device: torch.device):
    yield sanitized("memcheck", device)


def racecheck(device: torch.device):
    yield sanitized("racecheck", device)


def sanitized(tool: str, device: torch.device) -> dict:
    watcher = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"] if device.type == "cuda" else []
    output = run([*watcher, sys.executable, __file__, "--case"], os.environ)
    summary = [line for line in output.splitlines() if "SUMMARY" in line]
    return {"check": tool, "result": summary[-1].strip("= ") if summary else output[-300:]}


def run(command: list[str], environment) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(environment))
    if done.returncode:
        said = (done.stdout + done.stderr)[-3000:]
        raise RuntimeError(f"{' '.join(command[:4])} ended with {done.returncode}:\n{said}")
    return done.stdout + done.stderr


def facts(device: torch.device) -> dict:
    known = {"torch": torch.__version__, "python": sys.version.split()[0], "kernels": sources()}
    if device.type == "cuda":
        printed = lambda *command: subprocess.run(command, capture_output=True, text=True).stdout
        driver = printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").strip()
        nvcc = re.search(r"release ([\d.]+)", printed("nvcc", "--version"))
        known |= {"gpu": torch.cuda.get_device_name(device), "driver": driver, "nvcc": nvcc[1] if nvcc else "?"}
    return known


def sources() -> str:
    """A digest of what the kernels are built from: measures of other kernels do not belong into one table."""
    digest = hashlib.sha256()
    for file in sorted(f for f in [ROOT / "setup.py", *(ROOT / "csrc").rglob("*")] if f.is_file()):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    main()
