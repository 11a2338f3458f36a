"""Registers, shared memory, stack and spills of every CUDA kernel, as the assembler reports them. Needs nvcc, no GPU.

python benchmarks/ptxas.py [--save] [--arch 90]

Ends with 1 where a kernel spills registers: `make check-cuda`, and CI.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from measure import report, table

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90", "120")
ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", action="append", help="Compute capability without its dot; repeat. Default: 80, 90 and 120."
    )
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if not shutil.which("nvcc"):
        print("no nvcc here: CUDA sources not compiled")
        return
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    jobs = list(product(sources, options.arch or ARCHITECTURES))
    kernels = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (source, arch), found in zip(jobs, pool.map(lambda job: assemble(*job), jobs)):
            print(f"{source.name} sm_{arch}: {len(found)} kernels", flush=True)
            kernels += found
    families = defaultdict(list)
    for kernel in kernels:
        families[kernel["source"], kernel["kernel"], kernel["arch"]].append(kernel)
    span = lambda values: f"{min(values)} to {max(values)}" if min(values) < max(values) else str(max(values))
    rows = [
        [
            source,
            name,
            f"sm_{arch}",
            len(group),
            span([k["registers"] for k in group]),
            max(k["shared"] for k in group),
            max(k["stack"] for k in group),
            f"**{max(k['spills'] for k in group)}**",
        ]
        for (source, name, arch), group in sorted(families.items())
    ]
    columns = [
        "source",
        "kernel",
        "for",
        "instantiations",
        "registers",
        "shared memory, bytes",
        "stack, bytes",
        "spills, bytes",
    ]
    version = (
        subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout.split("release ")[-1].split(",")[0]
    )
    data = {"rows": [dict(zip(columns, row)) for row in rows]}
    report("ptxas", table(f"What each CUDA kernel takes (nvcc {version})", columns, rows), data, options.save)
    if spilling := [k["name"] for k in kernels if k["spills"]]:
        sys.exit(f"{len(spilling)} kernels spill registers, the first: {spilling[0]}")


def assemble(source: Path, arch: str) -> list[dict]:
    """One row per kernel of a source."""
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [
                "nvcc",
                "-std=c++20",
                "-O3",
                "--fmad=false",
                "-Xcompiler",
                "-fPIC,-ffp-contract=off",
                "-Xptxas",
                "-v",
                f"-gencode=arch=compute_{arch},code=sm_{arch}",
                "-c",
                str(source),
                "-o",
                f"{directory}/object.o",
            ],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        sys.exit(f"{source.name} for sm_{arch}:\n{done.stderr}")
    found = list(ENTRY.finditer(done.stderr))
    names = subprocess.run(
        ["c++filt", "-p"], input="\n".join(m["symbol"] for m in found), capture_output=True, text=True
    ).stdout.splitlines()
    rows = []
    for match, name in zip(found, names):
        name = name.replace("merge3::", "").replace("(anonymous namespace)::", "").replace("void ", "")
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        rows.append(
            {
                "source": source.name,
                "kernel": name.split("<")[0],
                "name": name,
                "arch": arch,
                "registers": int(match["registers"]),
                "shared": int(shared[1]) if shared else 0,
                "stack": int(match["stack"]),
                "spills": int(match["stores"]) + int(match["loads"]),
            }
        )
    return rows


if __name__ == "__main__":
    main()
