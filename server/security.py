"""Who may call, and which paths a call may name."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import grpc

from merge3.errors import BadInput, ConfigError, Denied, NotFound, Unauthenticated
from merge3_server.settings import Settings

TOKEN_VARIABLE = "MERGE3_TOKEN"


class Roots:
    """The directories that checkpoints and images may be read from, whatever links point elsewhere."""

    def __init__(self, roots: Sequence[Path]):
        self.roots = [root.resolve() for root in roots]

    def directory(self, name: str) -> str:
        """Where a model lies. Every file in its directory must lie inside a root as well, links followed."""
        path = self._inside(name)
        if not path.is_dir():
            raise NotFound(f"model {name!r}", "no such directory below the daemon's roots", "a checkpoint directory")
        for entry in path.rglob("*"):  # a sentence encoder has files in folders
            if entry.is_symlink() and not self._holds(entry.resolve()):
                raise Denied(
                    f"model {name!r}", f"{entry.name} is a link to outside the daemon's roots", "files inside them"
                )
        return str(path)

    def file(self, name: str, where: str) -> str:
        """Where an image lies."""
        path = self._inside(name)
        if not path.is_file():
            raise NotFound(where, f"no file {name!r} below the daemon's roots", "a file there")
        return str(path)

    def _inside(self, name: str) -> Path:
        if not name or "\0" in name or len(name) > 4096:
            raise BadInput(
                "path", f"{len(name)} characters" if name else "empty", "a path below one of the daemon's roots"
            )
        # An absolute name replaces the root that it is joined to. Absent or forbidden, outside looks the same.
        try:
            places = [(root / name).resolve() for root in self.roots]
            inside = [place for place in places if self._holds(place)]
            if not inside:
                raise Denied(f"path {name!r}", "outside the daemon's roots", "a path below one of them")
            return next((place for place in inside if place.exists()), inside[0])
        except (OSError, RuntimeError) as error:  # a loop of links, a name too long
            raise BadInput(f"path {name[:100]!r}", str(error)[:200], "a path below one of the daemon's roots") from None

    def _holds(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self.roots)


def export_directory(root: Path | None, name: str) -> Path:
    """A new directory below the export root."""
    if root is None:
        raise Denied("export", "this daemon writes nowhere", "an empty `directory`: the files come back in the stream")
    path = Roots([root])._inside(name)
    if path == root.resolve():
        raise BadInput("export: directory", f"found {name!r}", "a new directory below the export root")
    return path


class Tokens:
    """Bearer tokens: one per line of a file, `TOKEN` or `TOKEN EXPIRES` (ISO 8601), or one in MERGE3_TOKEN.

    The file is read again when it changes, so tokens can be added and withdrawn while the daemon runs.
    """

    def __init__(self, file: Path | None):
        self.file, self._read, self._known = file, None, {}
        variable = os.environ.get(TOKEN_VARIABLE)
        if file is None and variable:
            self._known = {_hashed(variable): None}
        self.required = file is not None or bool(variable)
        if file is not None:
            self._refresh()
            if not self._known:
                raise ConfigError(file, "no token", "one per line")

    def check(self, authorization: str | None) -> None:
        """Raises Unauthenticated. Compares with every token in constant time, by its hash."""
        if not self.required:
            return
        self._refresh()
        given = re.fullmatch(r"[Bb]earer +(\S+)", authorization or "")
        if given is None:
            raise Unauthenticated(
                "authorization", "no token" if not authorization else "not a bearer token", "Bearer TOKEN"
            )
        found = None
        for known, expires in self._known.items():
            if hmac.compare_digest(known, _hashed(given[1])):
                found = (expires,)
        if found is None:
            raise Unauthenticated("authorization", "an unknown token", "one that this daemon knows")
        if found[0] is not None and time.time() >= found[0]:
            raise Unauthenticated("authorization", "a token that has expired", "one that is valid")

    def _refresh(self) -> None:
        if self.file is None:
            return
        try:
            state = (self.file.stat().st_mtime_ns, self.file.stat().st_size)
            if state != self._read:
                self._known = dict(
                    _token_line(self.file, n, line)
                    for n, line in enumerate(self.file.read_text(encoding="utf-8").splitlines(), 1)
                    if line.strip() and not line.startswith("#")
                )
                self._read = state
        except OSError as error:
            if self._read is None:
                raise ConfigError(self.file, error.strerror or str(error), "a file of tokens") from None
            self._known = {}  # withdrawn while running: nobody may call


def _token_line(file: Path, number: int, line: str) -> tuple[bytes, float | None]:
    token, *expires = line.split()
    try:
        at = datetime.fromisoformat(expires[0]) if expires else None
    except ValueError:
        raise ConfigError(f"{file}, line {number}", f"found {expires[0]!r}", "an ISO 8601 time") from None
    if at is not None and at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return _hashed(token), at.timestamp() if at else None


def _hashed(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """TLS as the settings say; with a client authority every caller must show a certificate it signed."""
    if settings.certificate is None:
        return None
    read = {}
    for name in ("certificate", "key", "client_ca"):
        file = getattr(settings, name)
        try:
            read[name] = file.read_bytes() if file else None
        except OSError as error:
            raise ConfigError(file, error.strerror or str(error), "a PEM file") from None
    return grpc.ssl_server_credentials(
        [(read["key"], read["certificate"])],
        root_certificates=read["client_ca"],
        require_client_auth=settings.client_ca is not None,
    )
