"""Options that several commands of merge3-client share, as annotated types. Imports nothing heavy: --help is quick."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from merge3.threads import threads_option


def _strict(on: bool) -> bool:
    from merge3.errors import Merge3Warning

    if on:
        warnings.simplefilter("error", Merge3Warning)
    return on


THREADS_HELP = "CPU threads (default: as many as cores that this process may use)."
# The option acts before the command imports torch.
Threads = Annotated[str | None, typer.Option(metavar="N", callback=threads_option, help=THREADS_HELP)]
Strict = Annotated[bool, typer.Option("--strict", callback=_strict, help="Warnings are errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Device = Annotated[str, typer.Option(help="Where weights live and models run: cpu, cuda, cuda:1.")]
MemoryBudget = Annotated[
    str | None,
    typer.Option(help="Bytes that models may take on the device, e.g. 20GiB; what does not fit is streamed."),
]
SkipTooLong = Annotated[
    bool, typer.Option("--skip-too-long", help="Leave out items longer than the model's positions, and say so.")
]
TaskPath = Annotated[list[Path] | None, typer.Option(help="A folder of lm-eval tasks, as YAML files; repeat.")]
Ca = Annotated[str | None, typer.Option("--tls-ca", help="TLS: PEM of the authority to trust, or `system`.")]
Certificate = Annotated[Path | None, typer.Option("--tls-cert", help="PEM certificate to show the daemon.")]
Key = Annotated[Path | None, typer.Option("--tls-key", help="Its PEM key.")]
TokenFile = Annotated[Path | None, typer.Option(help="A file with the bearer token; or MERGE3_TOKEN.")]
Server = Annotated[str, typer.Option(help="The daemon: host:port or unix:/path.")]
