"""A run directory's files over HTTP, read only, on the loopback unless another address is asked for."""

from __future__ import annotations

import mimetypes
import os
import socket
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from merge3.client.rewriting import PAGE
from merge3.errors import BadInput, NotFound, Unavailable

LOOPBACK = "127.0.0.1"
_RUNS = (PAGE, "run.db", "fit.json", "study.jsonl", "config.yaml")  # one of them is in every run directory
_LOOPBACK = (LOOPBACK, "localhost", "::1")
_TEXTS = (".yaml", ".jsonl")
_WAITING = """<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="3"><title>merge3</title>
<p>No report.html yet: it is written when the run has something to show. This page asks again.</p>"""


def serve(directory: Path, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Until interrupted. ready: told the address. Raises BadInput, NotFound and Unavailable."""
    server = make_server(directory, host, port)
    shown = f"[{host}]" if ":" in host else host
    with server:
        ready(f"http://{shown}:{server.server_port}/")
        server.serve_forever()


def make_server(directory: Path, host: str = LOOPBACK, port: int = 0) -> ThreadingHTTPServer:
    """A server that listens; port 0: a free one. Raises as `serve`."""
    if not directory.is_dir():
        raise NotFound(directory, "no such directory", "a run directory")
    if not any((directory / name).exists() for name in _RUNS):
        raise BadInput(directory, f"none of {', '.join(_RUNS)} in it", "a run directory")
    made = _Server6 if ":" in host else ThreadingHTTPServer
    try:
        return made((host, port), partial(Handler, directory.resolve(), host))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Unavailable(f"{host}:{port}", reason, "an address of this machine and a free port", "--port 0") from None


class _Server6(ThreadingHTTPServer):
    address_family = socket.AF_INET6


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of the files of a directory; every other method is refused."""

    server_version, sys_version, protocol_version = "merge3", "", "HTTP/1.1"
    timeout = 30  # seconds that a silent connection is kept

    def __init__(self, directory: Path, host: str, *request):
        self._directory, self._host = directory, host
        super().__init__(*request)

    def do_GET(self) -> None:
        """A file."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """What GET would say of it."""
        self._answer(body=False)

    def log_message(self, format: str, *values) -> None:
        """Nothing: a page asks every few seconds."""

    def _answer(self, body: bool) -> None:
        if self._host in _LOOPBACK and not self._asked_by_name():
            # Else a page from anywhere could read this one, by a name that it lets mean 127.0.0.1.
            return self.send_error(HTTPStatus.MISDIRECTED_REQUEST, f"expected one of {', '.join(_LOOPBACK)}")
        path = unquote(urlsplit(self.path).path)
        name = path.lstrip("/") or PAGE
        try:
            file = _opened(self._directory, name)
        except OSError:
            if name == PAGE:
                return self._send(_WAITING.encode(), "text/html; charset=utf-8", body)
            return self.send_error(HTTPStatus.NOT_FOUND, "no such file in the run directory")
        with file:
            self._send(file, _kind(name), body)

    def _asked_by_name(self) -> bool:
        try:
            return urlsplit(f"//{self.headers.get('Host', '')}").hostname in _LOOPBACK
        except ValueError:
            return False

    def _send(self, content: IO[bytes] | bytes, kind: str, body: bool) -> None:
        length = len(content) if isinstance(content, bytes) else os.fstat(content.fileno()).st_size
        self.send_response(HTTPStatus.OK)
        for header, value in (
            ("Content-Type", kind),
            ("Content-Length", str(length)),
            ("Cache-Control", "no-store"),  # the same name has something else in a few seconds
            ("X-Content-Type-Options", "nosniff"),
        ):
            self.send_header(header, value)
        self.end_headers()
        if not body:
            return
        if isinstance(content, bytes):
            self.wfile.write(content)
            return
        left = length  # what a growing file (a log, the journal) had when its length was told
        while left and (piece := content.read(min(left, 1 << 20))):
            self.wfile.write(piece)
            left -= len(piece)
        self.close_connection = self.close_connection or bool(left)


def _opened(directory: Path, name: str) -> IO[bytes]:
    """A file of the directory, wherever links lead from there only if they stay in it. Raises OSError."""
    if "\0" in name or any(part.startswith(".") for part in Path(name).parts):
        raise FileNotFoundError(name)  # hidden files are those being written
    file = (directory / name).resolve()
    if not file.is_relative_to(directory) or not file.is_file():
        raise FileNotFoundError(name)
    return file.open("rb")


def _kind(name: str) -> str:
    suffix = Path(name).suffix
    kind = "text/plain" if suffix in _TEXTS else mimetypes.guess_type(name)[0] or "application/octet-stream"
    return f"{kind}; charset=utf-8" if kind.startswith("text/") or suffix == ".json" else kind
