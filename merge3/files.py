"""Small files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import warnings
from pathlib import Path

from merge3.errors import ResourceError

LOCK = ".lock"  # in a directory that a process holds


def write_atomically(file: Path, content: str | bytes) -> None:
    """Replace a file as a whole: temporary name, sync, rename. What is there and is no file, such as a pipe or
    /dev/stdout, is written to as it is. Raises ResourceError."""
    data = content.encode() if isinstance(content, str) else content
    temporary = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        if file.exists() and not file.is_file() and not file.is_dir():
            file.write_bytes(data)
            return
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise resource_error(file, error) from None


def folder_beside(path: Path) -> tempfile.TemporaryDirectory:
    """A folder on the disk that `path` will lie on, for what is not whole yet; it goes when it is left. Raises
    ResourceError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{path.name}.partial-", dir=path.parent)
    except OSError as error:
        raise resource_error(path, error) from None


class Held:
    """A directory, which is made where there is none, that no other process can hold until `close`. The system lets go
    of what a process held that dies, however it does. Raises ResourceError where another one is there.

    with Held(Path("runs/first")):
        print("alone")
    """

    def __init__(self, directory: Path):
        self._file = directory / LOCK
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._handle = open(self._file, "ab")
            while not self._lock(directory):  # it was taken away between the two by who held it
                self._handle.close()
                self._handle = open(self._file, "ab")
        except OSError as error:
            raise resource_error(directory, error) from None

    def close(self) -> None:
        """Let others in. Further calls do nothing."""
        if not self._handle.closed:
            with contextlib.suppress(OSError):
                self._file.unlink()
            self._handle.close()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _lock(self, directory: Path) -> bool:
        """Whether what is locked is the file of that name."""
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._handle.close()
            raise ResourceError(directory, "in use by another process", "one at a time in a run directory") from None
        except OSError as error:
            found = f"its file system has no locks ({error.strerror})"
            # Not one that --strict refuses: nobody can help it.
            warnings.warn(f"{directory}: {found}: let no second process work there", stacklevel=4)
            return True
        try:
            return os.path.samestat(os.fstat(self._handle.fileno()), os.stat(self._file))
        except FileNotFoundError:
            return False


def put_in_place(made: Path, directory: Path) -> None:
    """Give a whole folder its final name, which is free or an empty folder's. Raises OSError."""
    if directory.exists():
        directory.rmdir()  # empty, as was checked; refuses if it no longer is
    os.rename(made, directory)
    sync(directory.parent)


def sync(path: Path) -> None:
    """Wait until a file or directory has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def resource_error(path: Path, error: OSError) -> ResourceError:
    """What a failed write means to whoever asked for it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(path, "the disk is full", hint="nothing was left under the final name")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ResourceError(path, "no permission to write here")
    return ResourceError(path, f"cannot write ({error.strerror or error})")
