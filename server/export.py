"""A directory of files as a stream of chunks."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, MutableMapping
from pathlib import Path

from merge3.rpc import merge3_pb2 as pb

CHUNK = 1 << 20  # bytes


async def sent_files(directory: Path, digests: MutableMapping[str, bytes]) -> AsyncIterator[pb.FileChunk]:
    """Every file in chunks, an empty file as one empty chunk; names are relative to the directory. digests: filled with
    file -> SHA-256."""
    for file in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = file.relative_to(directory).as_posix()
        digest, offset = hashlib.sha256(), 0
        with open(file, "rb") as handle:
            while True:
                data = await asyncio.to_thread(handle.read, CHUNK)
                if data or not offset:
                    digest.update(data)
                    yield pb.FileChunk(file=name, offset=offset, data=data)
                    offset += len(data)
                if len(data) < CHUNK:
                    break
        digests[name] = digest.digest()
