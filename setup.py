"""Builds merge3/_C (the kernels, against torch's stable ABI) and, with grpc_tools, the gRPC stubs.

MERGE3_CUDA=0|1|auto: auto adds the CUDA kernels where nvcc and a CUDA build of torch are both there.
"""

import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch  # build isolation must be off: an isolated build would fetch another torch
from setuptools import setup
from setuptools.command.build_py import build_py
from torch.utils.cpp_extension import BuildExtension, CppExtension

ARCHITECTURES = ("80", "90", "120")
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"]


def cuda_wanted() -> bool:
    choice = os.environ.get("MERGE3_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"MERGE3_CUDA={choice!r}: expected 0, 1 or auto")
    possible = shutil.which("nvcc") is not None and torch.version.cuda is not None
    if choice == "1" and not possible:
        sys.exit("MERGE3_CUDA=1: nvcc and a CUDA build of torch are needed, at least one is missing")
    return choice != "0" and possible


def compile_cuda() -> tuple[list[str], list[str]]:
    """Objects of csrc/cuda/*.cu, and what linking them needs.

    nvcc is called here, not through torch's CUDAExtension: the kernels include no torch header, and
    must not get its fast-math or half-operator flags.
    """
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    objects = []
    for source in sorted(glob.glob("csrc/cuda/*.cu")):
        target = Path("build") / "cuda" / (Path(source).stem + ".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.check_call(
            ["nvcc", "-std=c++20", "-O3", "--fmad=false", "--threads", "0", "-Xcompiler", "-fPIC,-ffp-contract=off",
             *gencode, "-c", source, "-o", str(target)]
        )
        objects.append(str(target))
    root = Path(shutil.which("nvcc")).resolve().parent.parent
    return objects, [f"-L{root}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def extension() -> CppExtension:
    sources = ["csrc/torch/library.cpp", "csrc/api.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
    macros = [("TORCH_TARGET_VERSION", "0x020b000000000000")]  # torch 2.11
    objects, link = [], []
    if cuda_wanted():
        objects, link = compile_cuda()
        macros.append(("MERGE3_WITH_CUDA", None))
    return CppExtension(
        "merge3._C", sources, define_macros=macros, extra_compile_args=FLAGS,
        extra_objects=objects, extra_link_args=link, py_limited_api=True,
        depends=glob.glob("csrc/**/*.h", recursive=True),
    )


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
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildStubs},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
