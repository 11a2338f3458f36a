"""Builds merge3/_C (the kernels, against torch's stable ABI), merge3/arrays and, with grpc_tools, the gRPC stubs.

MERGE3_CUDA=0|1|auto: auto adds the CUDA kernels where nvcc and a CUDA build of torch are both there.
MERGE3_ARCHITECTURES: compute capabilities to build for, such as 90 or 80,90,120.
"""

import glob
import os
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
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"]


def cuda_wanted() -> bool:
    choice = os.environ.get("MERGE3_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"MERGE3_CUDA={choice!r}: expected 0, 1 or auto")
    possible = shutil.which("nvcc") is not None and torch.version.cuda is not None
    if choice == "1" and not possible:
        sys.exit("MERGE3_CUDA=1: nvcc and a CUDA build of torch are needed, at least one is missing")
    return choice != "0" and possible


def compile_kernels(cuda: bool) -> tuple[list[str], list[str]]:
    """Objects of the torch-free library, which both extensions link, and what linking them needs.

    nvcc is called here, not through torch's CUDAExtension: the kernels include no torch header, and
    must not get its fast-math or half-operator flags.
    """
    folder = Path("build") / ("kernels-cuda" if cuda else "kernels")
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, "-fPIC", *(["-DMERGE3_WITH_CUDA"] if cuda else [])]
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    nvcc = ["nvcc", "-std=c++20", "-O3", "--fmad=false", "--threads", "0", "-Xcompiler", "-fPIC,-ffp-contract=off", *gencode,
            f'-DMERGE3_ARCHITECTURES="{" ".join(ARCHITECTURES)}"']  # fmt: skip
    compilers = {".cpp": [os.environ.get("CXX", "c++"), *flags], ".cu": nvcc}
    sources = [Path("csrc/api.cpp"), *Path("csrc/cpu").glob("*.cpp"), *(Path("csrc/cuda").glob("*.cu") if cuda else [])]
    changed = max(f.stat().st_mtime for f in [Path("setup.py"), *Path("csrc").rglob("*.h"), *Path("csrc").rglob("*.cuh")])

    def compile_one(source: Path) -> str:
        target = folder / f"{source.name}.o"
        command = [*compilers[source.suffix], "-c", str(source), "-o", str(target)]
        record = folder / f"{source.name}.command"
        fresh = target.exists() and record.exists() and record.read_text() == " ".join(command)
        if not fresh or target.stat().st_mtime < max(changed, source.stat().st_mtime):
            record.unlink(missing_ok=True)
            subprocess.check_call(command)
            record.write_text(" ".join(command))
        return str(target)

    # The largest first: the loops of one instruction set take as long as all small files together.
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, sorted(sources, key=lambda s: ("merge" not in s.name, s.name))))
    if not cuda:
        return objects, ["-lpthread"]
    root = Path(shutil.which("nvcc")).resolve().parent.parent
    return objects, [f"-L{root}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def extensions() -> list[Extension]:
    """merge3._C for torch, merge3.arrays for NumPy and DLPack."""
    macros = [("TORCH_TARGET_VERSION", "0x020b000000000000")]  # torch 2.11
    cuda = [("MERGE3_WITH_CUDA", None)] if cuda_wanted() else []
    try:
        import pybind11

        headers = [pybind11.get_include()]
    except ImportError:
        headers = include_paths()  # torch carries a copy of pybind11's headers
    depends = glob.glob("csrc/**/*.h", recursive=True)
    return [
        CppExtension("merge3._C", ["csrc/torch/library.cpp"], define_macros=macros + cuda, extra_compile_args=FLAGS,
                     py_limited_api=True, depends=depends),
        Extension("merge3.arrays", ["csrc/python/arrays.cpp"], include_dirs=headers, extra_compile_args=FLAGS, language="c++", depends=depends),
    ]  # fmt: skip


class BuildKernels(BuildExtension):
    def run(self):
        objects, link = compile_kernels(cuda_wanted())
        for extension in self.extensions:
            extension.extra_objects, extension.extra_link_args = objects, link
        super().run()


class BuildStubs(build_py):
    def run(self):
        proto = Path("proto/merge3/v1/merge3.proto")
        if proto.exists():
            from grpc_tools import protoc

            arguments = ["protoc", "-Imerge3/rpc=proto/merge3/v1", "--python_out=.", "--pyi_out=.",
                         "--grpc_python_out=.", "merge3/rpc/merge3.proto"]
            if protoc.main(arguments):
                raise SystemExit("protoc failed")
        super().run()


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels, "build_py": BuildStubs},
)
