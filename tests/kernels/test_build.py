"""What setup.py links: the toolkit's library wherever nvcc is, and torch's, so that a CUDA build can be imported.

No GPU and no CUDA build of torch is needed: the one symbol that libtorch_cuda has to give comes from a stand-in.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SYMBOL = "aoti_torch_get_current_cuda_stream"

# `nvcc --dryrun`, where nvcc on the path is a script beside which no library lies (CUDA 13.0, shortened).
CUDA = "/usr/local/cuda-13.0/bin/.."
TARGET = f"{CUDA}/targets/x86_64-linux"
WRAPPED = f"""
#$ _NVVM_BRANCH_=nvvm
#$ _SPACE_=\x20
#$ _HERE_=/usr/local/cuda-13.0/bin
#$ TOP={CUDA}
#$ LD_LIBRARY_PATH={CUDA}/lib:
#$ INCLUDES="-I{TARGET}/include" \x20
#$ LIBRARIES=  "-L{TARGET}/lib/stubs" "-L{TARGET}/lib"
#$ CUDAFE_FLAGS=
#$ gcc -D__CUDA_ARCH_LIST__=750 -E -x c++ "-I/elsewhere" "-L/elsewhere" "/dev/null" -o "/tmp/tmpxft_null.cpp4.ii"\x20
"""


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("merge3_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "printed,folders",
    [
        (WRAPPED, [f"{TARGET}/lib/stubs", f"{TARGET}/lib", f"{CUDA}/lib64", f"{CUDA}/lib"]),
        (
            '#$ TOP=/my tools/cuda/bin/..\n#$ LIBRARIES= "-L/my tools/cuda/lib64" -lextra \n',
            ["/my tools/cuda/lib64", "/my tools/cuda/bin/../lib64", "/my tools/cuda/bin/../lib"],
        ),
        ("#$ TOP=/opt/cuda\n#$ LIBRARIES=\n", ["/opt/cuda/lib64", "/opt/cuda/lib"]),
        ("nvcc fatal: no host compiler\n", []),
    ],
    ids=["wrapper", "spaces", "no libraries", "failed"],
)
def test_the_toolkits_folders(setup, printed, folders):
    assert [str(folder) for folder in setup.toolkit_libraries(printed)] == folders


def the_runtime(setup):
    folder = next(argument for argument in setup.kernel_link_arguments(True) if argument.startswith("-L"))
    return Path(folder[2:]) / "libcudart_static.a"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_runtime_is_found_here_and_behind_a_wrapper(setup, tmp_path, monkeypatch):
    assert the_runtime(setup).is_file()
    wrapper = tmp_path / "nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("nvcc")} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert shutil.which("nvcc") == str(wrapper) and the_runtime(setup).is_file()


def test_a_toolkit_without_its_runtime_ends_the_build(setup, tmp_path, monkeypatch):
    empty = tmp_path / "nvcc"
    empty.write_text("#!/bin/sh\necho '#$ TOP=/nowhere/bin/..' >&2\n")
    empty.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(SystemExit, match=r"leads to no libcudart_static\.a; looked in /nowhere/bin/\.\./lib64, "):
        setup.kernel_link_arguments(True)


# ------------------------------------------------------------------------------------------- linking with torch_cuda


def run(command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def parts(setup, tmp_path_factory):
    """The binding compiled for CUDA as setup.py would; stand-ins for the kernels and for libtorch_cuda."""
    folder = tmp_path_factory.mktemp("linked")
    extension = setup.extensions(cuda=True)[0]
    macros = [f"-D{name}" + ("" if value is None else f"={value}") for name, value in extension.define_macros]
    includes = [f"-I{path}" for path in [*extension.include_dirs, sysconfig.get_paths()["include"]]]
    flags = [*setup.FLAGS, "-O0", "-fPIC", "-DTORCH_EXTENSION_NAME=_C", "-DPy_LIMITED_API=0x030b0000"]
    run(["g++", *flags, *macros, *includes, "-c", ROOT / extension.sources[0], "-o", folder / "library.o"])
    wanted = [line.split()[0] for line in run(["nm", "-u", "--format=posix", folder / "library.o"]).splitlines()]
    kernels = [f'const char *{name}(void) {{ return "stand-in"; }}' for name in wanted if name.startswith("merge3_")]
    (folder / "kernels.c").write_text("\n".join(kernels) + "\n")
    run(["gcc", "-fPIC", "-c", folder / "kernels.c", "-o", folder / "kernels.o"])
    (folder / "cuda.c").write_text(f"int {SYMBOL}(int device, void **stream) {{ *stream = 0; return device < 0; }}\n")
    name = "libtorch_cuda.so"
    run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", folder / "cuda.c", "-o", folder / name])
    assert SYMBOL in wanted and "aoti_torch_create_device_guard" in wanted
    return folder, extension


@pytest.mark.heavy  # it compiles the binding
@pytest.mark.skipif(not shutil.which("g++") or not shutil.which("readelf"), reason="needs g++ and binutils")
@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch has the real library")
def test_a_cuda_build_needs_libtorch_cuda_and_can_be_imported(setup, parts):
    folder, extension = parts

    def link(name, libraries):
        folders = [f"-L{path}" for path in [folder, *extension.library_dirs]]
        arguments = setup.kernel_link_arguments(True) if shutil.which("nvcc") else []
        # --as-needed, as Ubuntu's compilers have it: what no symbol asks for is dropped.
        run(
            [
                "g++",
                "-shared",
                "-Wl,--as-needed",
                folder / "library.o",
                folder / "kernels.o",
                *folders,
                *(f"-l{library}" for library in libraries),
                *arguments,
                "-o",
                folder / name,
            ]
        )
        return folder / name

    def load(library):
        script = (
            "import importlib.util, sys, torch\n"
            "spec = importlib.util.spec_from_file_location('_C', sys.argv[1])\n"
            "module = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
            "print(module.build, torch._C._dispatch_has_kernel_for_dispatch_key('merge3::merge_', 'CUDA'))\n"
        )
        command, environment = [sys.executable, "-c", script, library], {"LD_LIBRARY_PATH": str(folder)}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    linked = link("_C.so", extension.libraries)
    assert "[libtorch_cuda.so]" in run(["readelf", "-d", linked])
    done = load(linked)
    assert (done.returncode, done.stdout) == (0, "stand-in True\n"), done.stderr

    without = link("without.so", [library for library in extension.libraries if library != "torch_cuda"])
    assert "libtorch_cuda" not in run(["readelf", "-d", without])
    done = load(without)
    assert done.returncode != 0 and f"undefined symbol: {SYMBOL}" in done.stderr


def test_refusals_do_not_go_through_streams():
    """An extension that has a C++ library of its own inside, as some toolchains link it, ends the process there."""
    sources = [f.read_text() for f in (ROOT / "csrc").rglob("*") if f.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources and not [s for s in sources if "STD_TORCH_CHECK(" in s or "stringstream" in s or "<iostream>" in s]


@pytest.mark.skipif(not all(map(shutil.which, ("nm", "objdump"))), reason="needs binutils")
def test_no_function_of_one_instruction_set_is_shared_with_others():
    """Of an inline function that several files have, the linker takes one for all: were it that of the file for AVX2, a
    processor without could not go on."""
    objects = sorted((ROOT / "build" / "kernels").glob("*_avx*.o"))
    if not objects:
        pytest.skip("the kernels were not built in this directory for several instruction sets")
    printed = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shared, vectors = [], 0
    for path in objects:
        weak = {line.split()[-1] for line in printed("nm", path).splitlines() if re.search(r" [WVu] ", line)}
        for code in re.split(r"\n(?=[0-9a-f]+ <)", printed("objdump", "-d", "--no-show-raw-insn", path)):
            if re.search(r"\t(v[a-z0-9]+|k(mov|and|or)[a-z]*) ", code):
                vectors += 1
                name = re.match(r"[0-9a-f]+ <(.+)>:", code)
                shared += [f"{path.name}: {name[1]}"] * bool(name and name[1] in weak)
    assert vectors and shared == []


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_function_of_one_instruction_set_can_stand_for_that_of_another():
    """Files for several sets compile the same templates. One that is not inlined has the same name in each, the linker
    takes any, and vectors are passed otherwise: built without optimization the sums are wrong."""
    objects = sorted((ROOT / "build" / "kernels").glob("*_avx*.cpp.o"))
    if not objects:
        pytest.skip("the kernels were not built in this directory")
    for file in objects:
        symbols = subprocess.run(["nm", "-C", file], capture_output=True, text=True, check=True).stdout
        shared = re.findall(r" [WVu] (.*merge3::.*)", symbols)
        assert not [name for name in shared if not name.startswith("std::")], file.name
