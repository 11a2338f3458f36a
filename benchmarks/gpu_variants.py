"""The fused merge built in other ways, each against a copy in its own run: which one a GPU of this kind wants.

gpu_check runs this as its last step. A variant is a build of its own, in a folder of its own, measured in a process of
its own: python benchmarks/gpu_variants.py cuda LIBRARY prints its rows, one JSON object a line.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# Flags for nvcc: how many times eight elements a thread asks for at once (csrc/cuda/merge.cuh); threads of a block;
# what is said to the caches (csrc/cuda/storage.cuh).
VARIANTS = {
    "as built": (),
    "depth 2": ("-DMERGE3_DEPTH=2",),
    "128 threads": ("-DMERGE3_THREADS=128",),
    "past L1": ("-DMERGE3_PAST_L1",),
}
SPARSIFY = ("all", "magnitude", "random", "band")


def variants(device: torch.device):
    """Rows of every variant, and a sentence about the best."""
    shares = defaultdict(list)
    libraries: dict[str, Path | None] = {"as built": None}
    if device.type == "cuda":
        others = {name: flags for name, flags in VARIANTS.items() if flags}
        with ThreadPoolExecutor(len(others)) as builders:  # all before the first is measured
            libraries |= zip(others, builders.map(lambda flags: build(flags, device, len(others)), others.values()))
    for name, library in libraries.items():
        for row in measured(device, library):
            shares[name].append(row["of_copy"])
            yield {"variant": name} | row
    yield f"fastest: {fastest(shares)}"


def fastest(shares: dict[str, list[float]]) -> str:
    """By the geometric mean of its shares of a copy."""
    mean = lambda values: math.exp(sum(map(math.log, values)) / len(values))
    best = max(shares, key=lambda name: mean(shares[name]))
    return f"{best}, {mean(shares[best]):.3f} of a copy on average; as built {mean(shares['as built']):.3f}"


def build(flags: tuple[str, ...], device: torch.device, beside: int) -> Path:
    """merge3._C with these flags, in a folder of its own. beside: how many are built at the same time."""
    major, minor = torch.cuda.get_device_capability(device)
    jobs = max(1, (os.cpu_count() or 1) // beside)
    wanted = {"MERGE3_CUDA": "1", "MERGE3_ARCHITECTURES": f"{major}{minor}", "MAX_JOBS": str(jobs)}
    folder = ROOT / "build" / "variants" / "".join(c for c in "".join(flags) if c.isalnum())
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    environment = os.environ | wanted | {"MERGE3_CUDA_FLAGS": " ".join(flags)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(flags)}:\n{(done.stdout + done.stderr)[-2000:]}")
    return next((folder / "merge3").glob("_C*.so"))


def measured(device: torch.device, library: Path | None) -> list[dict]:
    command = [sys.executable, __file__, device.type, *([str(library)] if library else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{library or 'as built'}:\n{(done.stdout + done.stderr)[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def load(library: str) -> None:
    """That library in the place of merge3._C."""
    import merge3

    spec = importlib.util.spec_from_file_location("merge3._C", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["merge3._C"] = merge3._C = module


def main() -> None:
    device, *library = sys.argv[1:]
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    if library:
        load(library[0])
    import gpu_measures

    for count in (1, 3, 8):
        for row in gpu_measures.swaps("1B" if device == "cuda" else "tiny", count, torch.device(device), SPARSIFY):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
