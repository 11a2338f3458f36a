"""What the machine code of a CUDA kernel does: how many loads it has under way before it needs the first, how it
stores, how many instructions its loop takes. From NVIDIA's nvdisasm, or from PTX where there is none.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple


class Code(NamedTuple):
    loads: int  # of 16 bytes, before the first use of what one of them brought
    stores: int  # of 16 bytes
    narrow_stores: int  # to global memory, of less
    shortest: int  # instructions through the loop that holds those loads; 0: not known
    longest: int


class Dialect(NamedTuple):
    """How one of the two languages writes things."""

    load: re.Pattern  # 16 bytes from global memory; group 1: the registers they go to
    store: re.Pattern  # 16 bytes
    narrow: re.Pattern  # less
    register: re.Pattern


SASS = Dialect(
    re.compile(r"\bLDG?\.E[.\w]*\.128[.\w]* (R\d+),"),
    re.compile(r"\bSTG?\.E[.\w]*\.128\b"),
    re.compile(r"\bSTG?\.E(?![.\w]*\.128)"),
    re.compile(r"\bR(\d+)(\.64)?"),
)
PTX = Dialect(
    re.compile(r"ld\.(?:global\.)?v4\.[buf]32 \{([^}]*)\}"),
    re.compile(r"st\.(?:global\.)?v4\.[buf]32"),
    re.compile(r"st\.(?:global\.)?(?:v2\.)?[busf]\d"),
    re.compile(r"%(?:r|f)(\d+)()\b"),
)


def find_nvdisasm(toolkit: Path | None) -> str | None:
    """Beside nvcc, on the path, or from the package nvidia-cuda-nvdisasm."""
    places = [toolkit / "bin"] if toolkit else []
    packages = {Path(sysconfig.get_path(name)) / "nvidia" for name in ("purelib", "platlib")}
    places += [folder for package in packages for folder in package.glob("*/bin")]
    found = (shutil.which("nvdisasm", path=str(place)) for place in places)
    return next(filter(None, found), None) or shutil.which("nvdisasm")


def disassemble(nvdisasm: str, cubin: Path) -> dict[str, Code]:
    """Every kernel of a cubin by its symbol."""
    text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)
    return {symbol: read(body.splitlines(), SASS) for symbol, body in zip(parts[1::2], parts[2::2])}


def read_ptx(ptx: Path) -> dict[str, Code]:
    parts = re.split(r"^\.visible \.entry (\w+)\(", ptx.read_text(), flags=re.MULTILINE)
    return {symbol: read(body.splitlines(), PTX) for symbol, body in zip(parts[1::2], parts[2::2])}


def read(lines: list[str], dialect: Dialect) -> Code:
    loads = [at for at, line in enumerate(lines) if dialect.load.search(line)]
    ahead = loads_ahead(lines[loads[0] :], dialect) if loads else 0
    count = lambda pattern: sum(bool(pattern.search(line)) for line in lines)
    paths = loop_paths(lines, loads[0]) if loads and dialect is SASS else (0, 0)
    return Code(ahead, count(dialect.store), count(dialect.narrow), *paths)


def loads_ahead(lines: list[str], dialect: Dialect) -> int:
    """From the first of the loads on: how many there are before a line names what one of them brings."""
    pending: set[int] = set()
    found = 0
    for line in lines:
        load = dialect.load.search(line)
        named = line[load.end() :] if load else line  # a load's own target may be its address
        if pending & registers(named, dialect):
            break
        if load:
            found += 1
            target = registers(load[1], dialect)
            pending |= {r + i for r in target for i in range(4)} if dialect is SASS else target
    return found


def registers(text: str, dialect: Dialect) -> set[int]:
    return {int(m[1]) + i for m in dialect.register.finditer(text) for i in range(2 if m[2] else 1)}


def loop_paths(lines: list[str], load: int) -> tuple[int, int]:
    """Instructions on the shortest and the longest way through the innermost loop around a line, called code aside."""
    labels = {m[1]: at for at, line in enumerate(lines) if (m := re.match(r"(\.L_\w+):", line))}
    jump = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
    target = {at: labels.get(m[1]) for at, line in enumerate(lines) if (m := jump.search(line))}
    ends = [at for at, to in target.items() if to is not None and to <= load < at]
    if not ends:
        return 0, 0
    end = min(ends, key=lambda at: at - target[at])
    shortest, longest = {end: 1}, {end: 1}
    for at in range(end - 1, target[end] - 1, -1):
        one = bool(re.match(r"\s*/\*[0-9a-f]+\*/", lines[at]))
        after = [at + 1]
        if (to := target.get(at)) is not None and at < to <= end:
            after = [to] if re.search(r"\*/\s+BRA `", lines[at]) else [at + 1, to]
        shortest[at] = one + min(shortest[to] for to in after)
        longest[at] = one + max(longest[to] for to in after)
    return shortest[target[end]], longest[target[end]]
