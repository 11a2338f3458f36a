"""Where the limits of this process's control groups stand: containers and batch systems set them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

GROUPS, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def folders(controller: str, groups: Path = GROUPS, mount: Path = MOUNT) -> Iterator[Path]:
    """The folder of every group that this process is in, and of those above it; some may not exist. controller: `cpu`,
    `memory`.

    In a container the paths may be the host's, while its mount begins at its own group: what is not there is to be
    skipped, and the mount itself is always among them."""
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = (line + "::").split(":")[:3]
        if controllers == "":
            mounts = (mount, mount / "unified")
        elif controller in controllers.split(","):
            mounts = tuple(dict.fromkeys((mount / controllers, mount / controller)))
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for root in mounts:
            for depth in range(len(parts) + 1):
                yield root.joinpath(*parts[:depth])


def memory_left(groups: Path = GROUPS, mount: Path = MOUNT) -> list[int]:
    """Bytes that each group with a limit still allows; what it could give back, of files, counts as free."""
    found = []
    for folder in folders("memory", groups, mount):
        for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            try:
                limit, taken = (int((folder / name).read_text(encoding="utf-8")) for name in (most, used))
            except (OSError, ValueError):  # not there, `max`, or not ours to read
                continue
            found.append(max(0, limit - taken + _files(folder)))
    return found


def _files(folder: Path) -> int:
    """Bytes of files that the group has read and does not use."""
    try:
        rows = (line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        return int(dict(rows).get("inactive_file", 0))
    except (OSError, ValueError):
        return 0
