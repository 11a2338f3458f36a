"""A connection to a daemon: address, credentials, and calls whose failures are our errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from merge3.errors import ConfigError, Unavailable
from merge3.rpc import statuses

TOKEN_VARIABLE = "MERGE3_TOKEN"
_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),  # responses to 100,000 items are close to a megabyte
    ("grpc.keepalive_time_ms", 20_000),  # a daemon whose machine has gone is noticed within half a minute
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.use_local_subchannel_pool", 1),  # the back-off of another connection to this address is not ours
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


@dataclass(frozen=True)
class Target:
    """address: `host:port` or `unix:/path`. ca: the authority to trust, or `system`; with it, or a certificate, TLS.
    token_file: a bearer token; else MERGE3_TOKEN.

        Target("models.example.org:50051", ca="system", token_file=Path("token"))
    """

    address: str
    ca: str | None = None
    certificate: Path | None = None
    key: Path | None = None
    token_file: Path | None = None

    def channel(self) -> grpc.Channel:
        """A new channel, TLS where an authority or a certificate is given. Raises ConfigError for half a pair."""
        if not self.ca and not self.certificate:
            return grpc.insecure_channel(self.address, options=_OPTIONS)
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("--tls-cert, --tls-key", "one of them", "both or neither")
        authority = None if self.ca in (None, "system") else _read(Path(self.ca))
        pair = (_read(self.key), _read(self.certificate)) if self.certificate else (None, None)
        return grpc.secure_channel(self.address, grpc.ssl_channel_credentials(authority, *pair), options=_OPTIONS)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The token, never from the command line, where others could read it."""
        token = _read(self.token_file).decode().split()[0] if self.token_file else os.environ.get(TOKEN_VARIABLE)
        return (("authorization", f"Bearer {token}"),) if token else ()


@contextmanager
def translated(address: str) -> Iterator[None]:
    """A call's failure as the error that an engine in this process would have raised."""
    try:
        yield
    except grpc.RpcError as error:
        trailing = dict(error.trailing_metadata() or ())
        if error.code() is grpc.StatusCode.UNAVAILABLE and statuses.ERROR_KEY not in trailing:
            raise Unavailable(
                f"daemon {address}", "does not answer", "merge3-server serve", error.details() or ""
            ) from None
        raise statuses.error_from(error.code().name, error.details() or "", trailing) from None


def _read(file: Path) -> bytes:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(file, error.strerror or str(error), "a readable file") from None
    if not data.strip():
        raise ConfigError(file, "empty", "a token or PEM data")
    return data
