"""Builds merge3/_C with csrc/cuda/*.cu compiled as C++ against the emulated runtime, sanitizers on.

As a pytest plugin (`-p tests.kernels.emulation.library`) it puts that build in the place of merge3._C, so
that every kernel test runs the CUDA sources, or with MERGE3_TEST_DEVICE=cpu the sanitized CPU kernels.
"""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
# Checks of addresses as calls: written out in place they take twice the time to compile.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1"]
SANITIZE += ["--param", "asan-instrumentation-with-call-threshold=0"]


def sources() -> list[Path]:
    csrc = ROOT / "csrc"
    return [
        *sorted(csrc.glob("torch/*.cpp")),
        csrc / "api.cpp",
        *sorted(csrc.glob("cpu/*.cpp")),
        *sorted(csrc.glob("cuda/*.cu")),
    ]


def _has_avx512() -> bool:
    return "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def build(folder: Path, jobs: int = os.cpu_count() or 2) -> Path:
    """The library, built again where a source is newer than it."""
    import sysconfig

    import torch
    from torch.utils.cpp_extension import include_paths

    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "_C.so"
    newest = max(f.stat().st_mtime for f in [*(ROOT / "csrc").rglob("*.*"), *HERE.glob("*.h"), Path(__file__)])
    if library.exists() and library.stat().st_mtime > newest:
        return library
    flags = [
        "-std=c++20",
        "-O1",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-Wno-psabi",
        "-fPIC",
        *SANITIZE,
        '-DMERGE3_ARCHITECTURES="80 90 120"',
        # Small ones: a tensor needs few elements to have several chunks, and of a chunk a block takes several turns.
        "-DMERGE3_CHUNK=2048",
        "-DMERGE3_THREADS=64",
        "-DMERGE3_WITH_CUDA",
        "-DMERGE3_EMULATED",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-DPy_LIMITED_API=0x030b0000",
        "-DTORCH_EXTENSION_NAME=_C",
        f"-I{HERE}",
        *(f"-I{p}" for p in include_paths()),
        f"-I{sysconfig.get_paths()['include']}",
    ]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.parent.name}-{source.name}.o"
        if target.exists() and target.stat().st_mtime > newest:
            return target
        own = flags
        if "avx512" in source.name and not _has_avx512():  # linked, never run
            own = [flag for flag in flags if flag not in (*SANITIZE, "-O1")]
        subprocess.run(["g++", *own, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, sources()))
    lib = Path(torch.__file__).parent / "lib"
    partial = folder / "_C.partial.so"
    link = [
        "-shared",
        *SANITIZE,
        *map(str, objects),
        f"-L{lib}",
        f"-Wl,-rpath,{lib}",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        "-o",
        str(partial),
    ]
    subprocess.run(["g++", *link], check=True)
    partial.rename(library)
    return library


def environment(device: str, library: Path) -> dict[str, str]:
    """What a Python that loads the library needs: the sanitizers before everything else."""
    found = lambda name: subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    # The tensors count as those of the second GPU, while the first is the current one.
    return (
        os.environ
        | ({"MERGE3_TEST_DEVICE_INDEX": "1"} if device == "cuda" else {})
        | {
            "MERGE3_TEST_LIBRARY": str(library),
            "MERGE3_TEST_DEVICE": device,
            "LD_PRELOAD": f"{found('libasan.so')} {found('libstdc++.so')}",
            # Python and torch leave memory at exit; torch's own libraries are not looked at.
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:halt_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        }
    )


def load(path: str) -> None:
    import torch  # noqa: F401 - the library links against it

    import merge3

    spec = importlib.util.spec_from_file_location("merge3._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["merge3._C"] = merge3._C = module


if path := os.environ.get("MERGE3_TEST_LIBRARY"):
    load(path)
