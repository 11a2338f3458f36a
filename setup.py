"""Builds merge3/_C (the kernels, against torch's stable ABI), merge3/arrays and, with grpc_tools, the gRPC stubs.

MERGE3_CUDA=0|1|auto: auto adds the CUDA kernels where nvcc and a CUDA build of torch are both there.
MERGE3_ARCHITECTURES: compute capabilities to build for, such as 90 or 80,90,120.
MERGE3_CUDA_FLAGS: more for nvcc, such as -DMERGE3_DEPTH=2 (see csrc/cuda/merge.cuh).
"""

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch  # build isolation must be off: an isolated build would fetch another torch
from setuptools import Extension, setup
from setuptools.command.build_py import build_py
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

ARCHITECTURES = os.environ.get("MERGE3_ARCHITECTURES", "80,90,120").split(",")
CUDA_FLAGS = shlex.split(os.environ.get("MERGE3_CUDA_FLAGS", ""))
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"]


def cuda_wanted() -> bool:
    choice = os.environ.get("MERGE3_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"MERGE3_CUDA={choice!r}: expected 0, 1 or auto")
    possible = shutil.which("nvcc") is not None and torch.version.cuda is not None
    if choice == "1" and not possible:
        sys.exit("MERGE3_CUDA=1: nvcc and a CUDA build of torch are needed, at least one is missing")
    return choice != "0" and possible


def toolkit_libraries(dryrun: str) -> list[Path]:
    """Folders of a CUDA toolkit's libraries, from what `nvcc --dryrun` prints: the nvcc on the path may be a script
    that calls another, so where it lies says nothing."""
    settings = dict(re.findall(r"^#\$ (TOP|LIBRARIES)=(.*)$", dryrun, re.MULTILINE))
    named = [Path(word[2:]) for word in shlex.split(settings.get("LIBRARIES", "")) if word.startswith("-L")]
    top = settings.get("TOP", "").strip().strip('"')
    return [*named, *(Path(top) / name for name in ("lib64", "lib") if top)]


def kernel_link_arguments(cuda: bool) -> list[str]:
    """What linking the kernels takes, for torch or without it."""
    if not cuda:
        return ["-lpthread"]
    command = ["nvcc", "--dryrun", "-c", "-x", "cu", os.devnull, "-o", "unused.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    folders = toolkit_libraries(done.stdout + done.stderr)
    runtime = next((folder for folder in folders if (folder / "libcudart_static.a").is_file()), None)
    if runtime is None:
        looked = ", ".join(map(str, folders)) or f"nowhere: {(done.stdout + done.stderr).strip()[-300:]}"
        sys.exit(f"`{' '.join(command)}` leads to no libcudart_static.a; looked in {looked}")
    return [f"-L{runtime}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def compile_kernels(cuda: bool) -> list[str]:
    """Objects of the torch-free library, which both extensions link.

    nvcc is called here, not through torch's CUDAExtension: the kernels include no torch header, and
    must not get its fast-math or half-operator flags.
    """
    folder = Path("build") / ("kernels-cuda" if cuda else "kernels")
    # A build with other flags for nvcc leaves this one's objects as they are.
    folders = {".cpp": folder, ".cu": folder / "".join(c for c in "".join(CUDA_FLAGS) if c.isalnum())}
    folders[".cu"].mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, "-fPIC", *(["-DMERGE3_WITH_CUDA"] if cuda else [])]
    # Each with PTX, which GPUs between and beyond them (sm_100, say) compile when they load the kernels.
    gencode = [f"-gencode=arch=compute_{a},code=[sm_{a},compute_{a}]" for a in ARCHITECTURES]
    nvcc = [
        "nvcc",
        "-std=c++20",
        "-O3",
        "--fmad=false",
        "--threads",
        "0",
        "-Xcompiler",
        "-fPIC,-ffp-contract=off",
        *gencode,
        *CUDA_FLAGS,
        f'-DMERGE3_ARCHITECTURES="{" ".join(ARCHITECTURES)}"',
    ]
    compilers = {".cpp": [os.environ.get("CXX", "c++"), *flags], ".cu": nvcc}
    sources = [Path("csrc/api.cpp"), *Path("csrc/cpu").glob("*.cpp"), *(Path("csrc/cuda").glob("*.cu") if cuda else [])]
    changed = max(
        f.stat().st_mtime for f in [Path("setup.py"), *Path("csrc").rglob("*.h"), *Path("csrc").rglob("*.cuh")]
    )

    def compile_one(source: Path) -> str:
        target = folders[source.suffix] / f"{source.name}.o"
        command = [*compilers[source.suffix], "-c", str(source), "-o", str(target)]
        record = target.with_suffix(".command")
        fresh = target.exists() and record.exists() and record.read_text() == " ".join(command)
        if not fresh or target.stat().st_mtime < max(changed, source.stat().st_mtime):
            record.unlink(missing_ok=True)
            subprocess.check_call(command)
            record.write_text(" ".join(command))
        return str(target)

    # The largest first: the loops of one instruction set take as long as all small files together, and the fused merge
    # of eight experts twice as long as that of one.
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_one, sorted(sources, key=lambda s: ("merge" in s.name, s.name), reverse=True)))


def extensions(cuda: bool) -> list[Extension]:
    """merge3._C for torch, merge3.arrays for NumPy and DLPack."""
    macros = [("TORCH_TARGET_VERSION", "0x020b000000000000")]  # torch 2.11
    if cuda:
        macros.append(("MERGE3_WITH_CUDA", None))
    # It has the current stream. libtorch names it too, but a linker that drops what nothing asks for (--as-needed,
    # the rule on Ubuntu) drops libtorch, and with it this.
    libraries = ["torch_cuda"] if cuda else []
    try:
        import pybind11

        headers = [pybind11.get_include()]
    except ImportError:
        headers = include_paths()  # torch carries a copy of pybind11's headers
    depends = glob.glob("csrc/**/*.h", recursive=True)
    return [
        CppExtension(
            "merge3._C",
            ["csrc/torch/library.cpp", "csrc/torch/compact.cpp"],
            define_macros=macros,
            extra_compile_args=FLAGS,
            libraries=libraries,
            py_limited_api=True,
            depends=depends,
        ),
        Extension(
            "merge3.arrays",
            ["csrc/python/arrays.cpp"],
            include_dirs=headers,
            extra_compile_args=FLAGS,
            language="c++",
            depends=depends,
        ),
    ]


class BuildKernels(BuildExtension):
    def run(self):
        link = kernel_link_arguments(cuda_wanted())  # first: it may end the build, and the kernels take minutes
        objects = compile_kernels(cuda_wanted())
        for extension in self.extensions:
            extension.extra_objects, extension.extra_link_args = objects, link
        super().run()


class BuildStubs(build_py):
    def run(self):
        proto = Path("proto/merge3/v1/merge3.proto")
        if proto.exists():
            from grpc_tools import protoc

            arguments = [
                "protoc",
                "-Imerge3/rpc=proto/merge3/v1",
                "--python_out=.",
                "--pyi_out=.",
                "--grpc_python_out=.",
                "merge3/rpc/merge3.proto",
            ]
            if protoc.main(arguments):
                raise SystemExit("protoc failed")
        super().run()


if __name__ == "__main__":  # tests import this file
    setup(
        ext_modules=extensions(cuda_wanted()),
        cmdclass={"build_ext": BuildKernels, "build_py": BuildStubs},
    )
