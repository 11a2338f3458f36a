"""Files that a daemon sends, checked against their digests as they arrive."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from merge3.errors import ResourceError
from merge3.files import put_in_place, resource_error, sync
from merge3.rpc import merge3_pb2 as pb


def _inside(name: str) -> bool:
    """Whether a file's name stays in the folder that it is relative to, and is spelled in one way only."""
    path = PurePosixPath(name)
    parts = path.parts and not path.is_absolute() and ".." not in path.parts
    return bool(parts) and str(path) == name and "\\" not in name and "\0" not in name


def fetched(begin: Callable[[], Iterator[pb.ExportResponse]], directory: Path) -> pb.ExportResult:
    """A checkpoint in a new or empty directory, which appears whole. begin: starts its Export stream. Raises
    ResourceError."""
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        result = received(begin(), partial)
        for file in partial.rglob("*"):
            sync(file)
        put_in_place(partial, directory)
    except OSError as error:
        raise resource_error(directory, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result


def received(stream, directory: Path) -> pb.ExportResult:
    """Write the files of an Export stream into a folder; returns the message that ends it. Raises ResourceError for a
    name that leads out of the folder, and for files that are not whole."""
    digests, offsets, result = {}, {}, None
    for message in stream:
        if message.HasField("result"):
            result = message.result
        elif message.HasField("chunk"):
            chunk = message.chunk
            if not _inside(chunk.file):
                found = f"the daemon sent a file named {chunk.file!r}"
                raise ResourceError("export", found, "a plain name, or one in a folder of the checkpoint")
            if chunk.offset != offsets.get(chunk.file, 0):
                raise ResourceError(
                    "export", f"{chunk.file} continues at byte {chunk.offset}", f"{offsets.get(chunk.file, 0)}"
                )
            (directory / chunk.file).parent.mkdir(parents=True, exist_ok=True)
            with open(directory / chunk.file, "ab") as handle:
                handle.write(chunk.data)
            offsets[chunk.file] = chunk.offset + len(chunk.data)
            digests.setdefault(chunk.file, hashlib.sha256()).update(chunk.data)
    if result is None or {f: d.digest() for f, d in digests.items()} != dict(result.files):
        raise ResourceError("export", "files arrived incomplete", "what the daemon wrote")
    return result
