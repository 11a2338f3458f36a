"""What the operator decides, once, when the daemon starts."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from merge3.errors import ConfigError
from merge3.experts import FULL, Experts
from merge3.recipe import DTYPES, Tokenizer, load_yaml, read_tokenizer

_POOL_KEYS = ("models", "dtype", "tokenizer_source", "tokenizer")


@dataclass(frozen=True)
class Limits:
    """queue, driver_queue: requests waiting, in all and of one driver. items: of one registration. store: bytes
    of items and item banks remembered. tokens: of one Generate. recipe: characters. steps, coefficients: of one Fit,
    whose turns take `turn` seconds or one step. pools: open at once.
    retention, idle: seconds that answers are remembered, and that a pool nobody uses keeps its place."""

    queue: int = 1024
    driver_queue: int = 256
    items: int = 100_000
    store: int = 1 << 30
    tokens: int = 1024
    recipe: int = 1_000_000
    steps: int = 1_000_000
    coefficients: int = 250_000  # with their moments three megabytes, which leaves room in a message of four
    turn: float = 1.0
    pools: int = 4
    registrations: int = 256
    retention: float = 600.0
    answers: int = 4096
    idle: float = 3600.0
    stalled: float = 120.0  # a stream whose other end does nothing for so many seconds is ended


@dataclass(frozen=True)
class Settings:
    """listen: `host:port` (port 0: a free one) or `unix:/path`. roots: where checkpoints may be read. workers:
    `local`, or `ray[:N]`; threads: of each on the CPU (default: its share of the cores).
    grace: seconds that calls under way have when the daemon is asked to stop. memory_budget: bytes, of each pool.
    experts: how pools hold them whose drivers do not say."""

    listen: tuple[str, ...]
    roots: tuple[Path, ...]
    pools: tuple[Path, ...] = ()
    export_root: Path | None = None
    device: str = "cpu"
    workers: str = "local"
    threads: int | None = None
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    tokens: Path | None = None
    insecure: bool = False
    metrics: str | None = None
    grace: float = 30.0
    limits: Limits = Limits()
    memory_budget: int | None = None
    experts: Experts = FULL

    def __post_init__(self):
        if not self.roots:
            raise ConfigError("--root", "none", "at least one directory that checkpoints may be read from")
        for root in (*self.roots, *([self.export_root] if self.export_root else [])):
            if not root.is_dir():
                raise ConfigError(root, "no such directory", "a directory")
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("--tls-cert, --tls-key", "one of them", "both or neither")
        if self.client_ca and not self.certificate:
            raise ConfigError("--tls-client-ca", "without --tls-cert", "a server certificate too")
        for address in self.listen:
            if not self.certificate and not self.insecure and not is_local(address):
                raise ConfigError(
                    f"--listen {address}",
                    "anybody who reaches it could use it, and read along",
                    "--tls-cert and --tls-key",
                    "or --insecure, if something else protects it",
                )


def is_local(address: str) -> bool:
    """Whether only this machine reaches an address."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_pool_file(file: Path) -> tuple[tuple[str, ...], str, Tokenizer | None]:
    """(models, dtype, tokenizer) of a pool to open at the start: `models: [base, expert, ..]`, `dtype: bfloat16`, and
    `tokenizer_source` or `tokenizer` as in a recipe."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(file, str(error).splitlines()[0], "a pool file") from None
    data = load_yaml(text, str(file))
    models = data.get("models") if isinstance(data, dict) else None
    if not isinstance(models, list) or not models or not all(isinstance(m, str) for m in models):
        raise ConfigError(f"{file}: models", f"found {models!r}", "a list of models, base first")
    if unknown := sorted(set(data) - set(_POOL_KEYS)):
        raise ConfigError(file, f"unknown key {unknown[0]!r}", ", ".join(_POOL_KEYS))
    dtype = data.get("dtype") or ""
    if dtype not in ("", *DTYPES):
        raise ConfigError(f"{file}: dtype", f"found {dtype!r}", ", ".join(DTYPES))
    return tuple(models), dtype, read_tokenizer(data, str(file))
