"""merge3-server: one command, its options, one clear line for what is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from merge3.threads import configure, threads_option

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Hold models on one machine; drivers come and go.",
    epilog="Example: merge3-server serve --root /models",
)
THREADS_HELP = "CPU threads of each worker (default: its share of the cores that this process may use)."


@app.callback()
def _group() -> None:
    """Hold models on one machine; drivers come and go."""


@app.command(epilog="Example: merge3-server serve --root /models --pool pool.yaml --listen 127.0.0.1:50051")
def serve(
    root: Annotated[list[Path], typer.Option(help="Checkpoints may be read below here; repeat for several.")],
    listen: Annotated[
        list[str] | None, typer.Option(help="host:port (port 0: any) or unix:/path; repeat. Default 127.0.0.1:50051.")
    ] = None,
    pool: Annotated[
        list[Path] | None,
        typer.Option(help="Open at once and keep: a file with `models: [base, ..]`, and dtype or tokenizer."),
    ] = None,
    export_root: Annotated[
        Path | None, typer.Option(help="Checkpoints may be written below here; without it they are streamed.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    memory_budget: Annotated[
        str | None, typer.Option(help="Of each pool on its device, e.g. 20GiB; the rest is streamed.")
    ] = None,
    experts: Annotated[
        str,
        typer.Option(
            metavar="full|residual[:DENSITY]|int8",
            help="How pools hold experts whose drivers do not say: as they are, the largest DENSITY (0.1) of what they "
            "change, or int8 per row.",
        ),
    ] = "full",
    workers: Annotated[
        str, typer.Option(help="local, ray (one engine per GPU) or ray:N. RAY_ADDRESS names a cluster.")
    ] = "local",
    threads: Annotated[str | None, typer.Option(metavar="N", callback=threads_option, help=THREADS_HELP)] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate chain.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM authority: callers must show a certificate it signed.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="One bearer token per line, `TOKEN [EXPIRES]`; or MERGE3_TOKEN.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without TLS.")] = False,
    metrics: Annotated[str | None, typer.Option(help="host:port for Prometheus.")] = None,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for calls under way when asked to stop.")] = 30.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests waiting, in all.")] = 1024,
    max_pools: Annotated[int, typer.Option(min=1, help="Pools open at once.")] = 4,
    max_items: Annotated[int, typer.Option(min=1, help="Items of one registration.")] = 100_000,
    retention: Annotated[
        float, typer.Option(min=0, help="Seconds that answers to idempotency keys are remembered.")
    ] = 600.0,
    log_json: Annotated[bool, typer.Option("--log-json", help="The log as JSON lines.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every call.")] = False,
):
    """Serve until SIGTERM; a second one stops at once."""
    import asyncio

    from merge3.experts import Experts
    from merge3.memory import parse_size
    from merge3_server.logs import set_up
    from merge3_server.settings import Limits, Settings

    settings = Settings(
        tuple(listen or ["127.0.0.1:50051"]),
        tuple(root),
        tuple(pool or ()),
        export_root,
        device,
        workers,
        threads,
        tls_cert,
        tls_key,
        tls_client_ca,
        token_file,
        insecure,
        metrics,
        grace,
        Limits(
            queue=max_queue, pools=max_pools, items=max_items, retention=retention, driver_queue=min(256, max_queue)
        ),
        parse_size(memory_budget) if memory_budget else None,
        Experts.parse(experts, "--experts"),
    )
    set_up(log_json, verbose)
    from merge3_server.daemon import serve as until_stopped

    def ready(addresses: list[str]) -> None:
        print(f"merge3-server listens on {', '.join(addresses)}", flush=True)

    asyncio.run(until_stopped(settings, ready))


def main() -> None:
    """Entry point of the process."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models come from the roots alone
    configure()  # before torch is imported
    code = run(sys.argv[1:])
    # The host's thread may be inside a kernel; what it computes nobody waits for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(arguments: Sequence[str]) -> int:
    """A command line's exit code: a bad option or setting is one line and 2."""
    from merge3.errors import Merge3Error

    try:
        app(list(arguments), prog_name="merge3-server")
    except SystemExit as ended:
        return int(ended.code or 0)
    except Merge3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    main()
