"""What each CUDA kernel takes, as the assembler reports it and its machine code shows. Needs nvcc, no GPU.

python benchmarks/ptxas.py [--save] [--arch 90] [--source merge_3.cu]

Registers, shared memory, stack and spills of every kernel; the processor time to compile its file; and of the fused
merges (merge_1.cu .. merge_8.cu) what makes them fast: stores of 16 bytes, all K + 1 inputs (of more than six: six)
asked for before the first is used. Ends with 1 where a kernel spills registers or a fused merge does not do that: `make
check-cuda`, and CI. The machine code is read with nvdisasm, which is in the CUDA toolkit or in the package
nvidia-cuda-nvdisasm; where there is none, PTX stands for it, and instructions are not counted.
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

import machine_code
from measure import report, table

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90", "120")
ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
FUSED = re.compile(r"merge_kernel<(?P<experts>\d), (?P<sparsify>\d), (?P<dtype>\w+)>")
SPARSIFY = ("all", "magnitude", "random", "ranked", "band", "mask", "signs")  # as in merge3_sparsify
SIGNS = SPARSIFY.index("signs")
ENOUGH = 6  # loads before the first use, where there are as many inputs: 48 KB on a multiprocessor with two blocks
IN_FLIGHT = 48  # KB of loads on one multiprocessor: enough in any order
REGISTERS, THREADS, GROUP = 65536, 256, 8  # of a multiprocessor; of a block; elements that a thread takes at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", action="append", help="Compute capability without its dot; repeat. Default: 80, 90 and 120."
    )
    parser.add_argument("--source", action="append", help="A file of csrc/cuda; repeat. Default: all.")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if not shutil.which("nvcc"):
        print("no nvcc here: CUDA sources not compiled")
        return
    nvdisasm = machine_code.find_nvdisasm(toolkit())
    sources = [s for s in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if s.name in (options.source or [s.name])]
    jobs = list(product(sources, options.arch or ARCHITECTURES))
    kernels, seconds = [], {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (source, arch), (found, spent) in zip(jobs, pool.map(lambda job: assemble(*job, nvdisasm), jobs)):
            print(f"{source.name} sm_{arch}: {len(found)} kernels, {spent:.1f} s", flush=True)
            kernels += found
            seconds[source.name, arch] = spent
    fused = [k for k in kernels if k["source"].startswith("merge_")]
    version = printed("nvcc", "--version").split("release ")[-1].split(",")[0]
    read = "machine code" if nvdisasm else "PTX"
    parts = [(f"What each CUDA kernel takes (nvcc {version})", *by_family(kernels, seconds))]
    parts.append((f"The fused merge of bfloat16 for sm_90, eight elements at a time ({read})", *by_mode(fused)))
    as_dicts = lambda part: [dict(zip(part[1], row)) for row in part[2]]
    data = {"rows": as_dicts(parts[0]), "fused": as_dicts(parts[1])}
    report("ptxas", "\n\n".join(table(*part) for part in parts if part[2]), data, options.save)
    if wrong := [f"{k['name']} for sm_{k['arch']}: {fault}" for k in kernels if (fault := fault_of(k))]:
        sys.exit(f"{len(wrong)} kernels are not what they should be, the first: {wrong[0]}")


def fault_of(kernel: dict) -> str | None:
    if kernel["spills"]:
        return f"spills {kernel['spills']} bytes of registers"
    if "loads" not in kernel:
        return None
    # Of many inputs the assembler converts the first before it asks for the last, to have registers for both.
    wanted = min(kernel["inputs"], ENOUGH)
    if kernel["loads"] < wanted and in_flight(kernel) < IN_FLIGHT:
        return f"{kernel['loads']} loads of 16 bytes before the first use of one, expected {wanted}"
    if not kernel["wide_stores"] or kernel["narrow_stores"]:
        return f"{kernel['wide_stores']} stores of 16 bytes and {kernel['narrow_stores']} narrower ones"
    return None


def by_family(kernels: list[dict], seconds: dict) -> tuple[list[str], list[list]]:
    families = defaultdict(list)
    for kernel in kernels:
        families[kernel["source"], kernel["kernel"], kernel["arch"]].append(kernel)
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
            f"{seconds[source, arch]:.1f}",
        ]
        for (source, name, arch), group in sorted(families.items())
    ]
    bytes_of = ["shared memory, bytes", "stack, bytes", "spills, bytes"]
    return ["source", "kernel", "for", "instantiations", "registers", *bytes_of, "the file compiles in, s"], rows


def in_flight(kernel: dict) -> int:
    """KB of loads on one multiprocessor, as far as registers allow blocks there."""
    blocks = min(REGISTERS // (-(-kernel["registers"] // 8) * 8 * THREADS), 2048 // THREADS)
    return blocks * THREADS * kernel["loads"] * 16 // 1024


def by_mode(fused: list[dict]) -> tuple[list[str], list[list]]:
    rows = []
    for k in fused:
        if k["arch"] != "90" or k["dtype"] != "BFloat16":
            continue
        counted = f"{k['shortest'] / GROUP:.0f} to {k['longest'] / GROUP:.0f}" if k["longest"] else ""
        rows.append([k["experts"], SPARSIFY[k["sparsify"]], k["registers"], k["loads"], f"**{in_flight(k)}**", counted])
    rows.sort(key=lambda row: (row[0], SPARSIFY.index(row[1])))
    columns = ["K", "sparsify", "registers", "loads before the first use", "KB in flight", "instructions an element"]
    return columns, rows


def span(values: list[int]) -> str:
    return f"{min(values)} to {max(values)}" if min(values) < max(values) else str(max(values))


def printed(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def toolkit() -> Path | None:
    """Where nvcc's own files are: the one on the path may be a script that calls another."""
    said = printed("nvcc", "--dryrun", "-c", "-x", "cu", os.devnull, "-o", "unused.o")
    found = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    return Path(found[1].strip()) if found else None


def assemble(source: Path, arch: str, nvdisasm: str | None) -> tuple[list[dict], float]:
    """One row per kernel of a source, and the processor time that it took to compile."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        command = [
            "nvcc",
            "-std=c++20",
            "-O3",
            "--fmad=false",
            "-Xcompiler",
            "-fPIC,-ffp-contract=off",
            "-Xptxas",
            "-v",
        ]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "--keep", "--keep-dir", directory]
        command += ["-c", str(source), "-o", f"{directory}/object.o"]
        with open(folder / "said", "w+") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            said.seek(0)
            text = said.read()
        if process.returncode:
            sys.exit(f"{source.name} for sm_{arch}:\n{text}")
        codes: dict[str, machine_code.Code] = {}
        if source.name.startswith("merge_"):
            for file in folder.glob("*.cubin" if nvdisasm else "*.ptx"):
                found = machine_code.disassemble(nvdisasm, file) if nvdisasm else machine_code.read_ptx(file)
                codes.update(found)
    return [row_of(source, arch, *found, codes) for found in entries(text)], used.ru_utime


def entries(text: str) -> list[tuple[re.Match, str]]:
    found = list(ENTRY.finditer(text))
    names = subprocess.run(["c++filt"], input="\n".join(m["symbol"] for m in found), capture_output=True, text=True)
    short = lambda name: re.sub(r"merge3::|\(anonymous namespace\)::|^void |\(.*\)$", "", name)
    return [(match, short(name)) for match, name in zip(found, names.stdout.splitlines())]


def row_of(source: Path, arch: str, match: re.Match, name: str, codes: dict) -> dict:
    shared = re.search(r"(\d+) bytes smem", match["rest"])
    row = {
        "source": source.name,
        "kernel": name.split("<")[0],
        "name": name,
        "arch": arch,
        "registers": int(match["registers"]),
        "shared": int(shared[1]) if shared else 0,
        "stack": int(match["stack"]),
        "spills": int(match["stores"]) + int(match["loads"]),
    }
    if fused := FUSED.search(name):
        code = codes[match["symbol"]]
        experts, sparsify, dtype = int(fused["experts"]), int(fused["sparsify"]), fused["dtype"]
        inputs = (1 if sparsify == SIGNS else experts + 1) * (2 if dtype == "Float32" else 1)
        row |= {"experts": experts, "sparsify": sparsify, "dtype": dtype, "inputs": inputs, "loads": code.loads}
        row |= {"wide_stores": code.stores, "narrow_stores": code.narrow_stores}
        row |= {"shortest": code.shortest, "longest": code.longest}
    return row


if __name__ == "__main__":
    main()
