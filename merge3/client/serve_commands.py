"""The command serve-report: its options; serve_report.py does the work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from merge3.client.options import Json


def serve_report(
    run_dir: Annotated[Path, typer.Argument(help="A run directory, of a run that goes on or has ended.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="To listen at; 0: a free one.")] = 8765,
    host: Annotated[
        str, typer.Option(help="Address of this machine; others than 127.0.0.1 let all who reach it read.")
    ] = ("127.0.0.1"),
    as_json: Json = False,
):
    """Show a run's report.html over HTTP, as it is rewritten, until Ctrl-C. Read only."""
    import signal

    from merge3.client.serve_report import serve

    def ready(address: str) -> None:
        print(json.dumps({"url": address, "directory": str(run_dir)}) if as_json else address, flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):  # the first is ignored in what a shell runs in the background
        signal.signal(number, signal.default_int_handler)
    try:
        serve(run_dir, host, port, ready)
    except KeyboardInterrupt:  # how it is meant to end
        sys.exit(0)


COMMANDS = (  # each with its example
    (serve_report, "serve-report runs/first --port 8765"),
)
