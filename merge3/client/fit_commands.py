"""The command fit: its options; fit.py does the work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from merge3.client.options import (
    Ca,
    Certificate,
    Device,
    Json,
    Key,
    MemoryBudget,
    Quiet,
    Strict,
    Threads,
    TokenFile,
    target_of,
)


def fit(
    recipe: Annotated[Path, typer.Argument(help="A recipe of a learned method, with `fit:`; see docs/learned.md.")],
    run_dir: Annotated[Path, typer.Option(help="Where the run lives: fitted.yaml, model, result.json, report.html.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped or killed.")] = False,
    compare: Annotated[
        list[Path] | None, typer.Option(help="Another finished run directory, to stand in the table; repeat.")
    ] = None,
    device: Device = "cpu",
    memory_budget: MemoryBudget = None,
    export: Annotated[bool, typer.Option(help="Write the merged checkpoint.")] = True,
    strict: Strict = False,
    server: Annotated[str | None, typer.Option(help="A daemon that holds the models: host:port or unix:/path.")] = None,
    tls_ca: Ca = None,
    tls_cert: Certificate = None,
    tls_key: Key = None,
    token_file: TokenFile = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
):
    """Learn a merge's weights from items, by gradient, in this process or on a daemon."""
    from merge3.client import fit as command
    from merge3.client.fit_result import print_fit

    target = target_of(server, tls_ca, tls_cert, tls_key, token_file) if server else None
    result = command.fit(recipe, run_dir, resume, as_json, quiet, device, export, target, memory_budget, compare or ())
    if result is None:
        sys.exit(130)
    if as_json:
        print(json.dumps(result))
    else:
        print_fit(result, run_dir)


COMMANDS = (  # each with its example
    (fit, "fit supermerge.yaml --run-dir runs/fitted"),
)
