"""merge3-client: one short function per command. Heavy imports happen inside them, so --help is quick."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from merge3.client import (
    calibration_commands,
    evaluation_commands,
    fit_commands,
    methods_command,
    serve_commands,
    study_commands,
)
from merge3.client.options import (
    Abreast,
    Ca,
    Certificate,
    Device,
    ExpertsAs,
    Json,
    Key,
    MemoryBudget,
    Quiet,
    Server,
    Several,
    SkipTooLong,
    Strict,
    TaskPath,
    Threads,
    TokenFile,
    target_of,
)
from merge3.threads import configure

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Merge fine-tuned language models, and search for better merges.",
    epilog="Example: merge3-client demo        Docs: README.md",
)

BAD_INPUT = 2  # exit code; see merge3/errors.py


@app.callback()
def version(
    show: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda on: _version(on), help="Print the version.")
    ] = False,
):
    """Merge fine-tuned language models, and search for better merges."""


@app.command(epilog="Example: merge3-client merge recipe.yaml merged/")
def merge(
    recipe: Annotated[Path, typer.Argument(help="A recipe in mergekit's YAML; with --task also a packed folder.")],
    out: Annotated[Path, typer.Argument(help="A new or empty directory.")],
    task: Annotated[str | None, typer.Option(help="Of a method with a model for each task: this task's alone.")] = None,
    seed: Annotated[int, typer.Option(help="Of random keeps (DARE, DELLA).")] = 0,
    shard_size: Annotated[int, typer.Option(help="Largest file, in bytes.")] = 5_000_000_000,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="Tensors that a model has and the base lacks, to merge without: a name or pattern; repeat."),
    ] = None,
    tower: Annotated[
        list[str] | None,
        typer.Option(metavar="FROM=TO", help="Where a language model's tensors lie in a vision-language base; repeat."),
    ] = None,
    strict: Strict = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
):
    """Merge a recipe to a checkpoint on disk. Weights that a recipe learns (`fit:`) are fitted first."""
    from merge3.client.merge import merge_files, show_merged
    from merge3.client.options import prefixes
    from merge3.client.terminal import bar
    from merge3.errors import BadInput
    from merge3.methods import ZIPPED
    from merge3.recipe import Recipe

    show = lambda done, total: quiet or as_json or bar("merging", done, total)
    asked = None if recipe.is_dir() else Recipe.from_yaml(recipe)
    if asked is not None and asked.method in ZIPPED:
        from merge3.client.zip import merge_zip

        for option, given in (("--task", task), ("--drop", drop), ("--tower", tower)):
            if given:
                raise BadInput(option, f"given with a recipe of {asked.method}", f"{recipe} without it")
        return merge_zip(recipe, asked, out, as_json, quiet)
    if asked is not None and asked.fit:
        from merge3.checkpoint import check_free
        from merge3.client.fit import fitted_recipe

        check_free(out)
        asked = fitted_recipe(recipe, as_json, quiet)
    if asked is not None and tower:
        asked = replace(asked, tower=prefixes(tower))
    result = merge_files(recipe, asked, out, task, seed, shard_size, show, drop or ())
    print(json.dumps(result)) if as_json else show_merged(result)


@app.command(epilog="Example: merge3-client evolve evolve.yaml --run-dir runs/first")
def evolve(
    config: Annotated[Path, typer.Argument(help="An evolve configuration; mergekit-evolve's are understood.")],
    run_dir: Annotated[Path, typer.Option(help="Where the run lives: journal, best.yaml, model, report.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped or killed.")] = False,
    budget: Annotated[int | None, typer.Option(help="Candidates; overrides the file.")] = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the file.")] = None,
    device: Device = "cpu",
    memory_budget: MemoryBudget = None,
    experts: ExpertsAs = None,
    abreast: Abreast = None,
    export: Annotated[bool, typer.Option(help="Write the winner's checkpoint.")] = True,
    pick: Annotated[
        str | None,
        typer.Option(help="Of several objectives, the member exported: its number, knee, or an objective."),
    ] = None,
    skip_too_long: SkipTooLong = False,
    task_path: TaskPath = None,
    log: Annotated[
        list[str] | None, typer.Option(help="Tell the search to tensorboard or wandb too (extras); repeat.")
    ] = None,
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
    """Search for the best merge, in this process or on a daemon."""
    from merge3.client import run
    from merge3.experts import Experts
    from merge3.search.config_files import load_config

    target = target_of(server, tls_ca, tls_cert, tls_key, token_file) if server else None
    asked = load_config(config, skip_too_long, task_path or (), budget=budget, seed=seed)
    if experts is not None:
        asked = asked.model_copy(update={"experts": str(Experts.parse(experts, "--experts"))})
    if log:
        asked = asked.model_copy(update={"logging": (*asked.logging, *log)})
    result = run.evolve(asked, run_dir, resume, as_json, quiet, device, export, target, memory_budget, pick, abreast)
    _finish(result, run_dir, as_json)


_TABLES = (fit_commands, evaluation_commands, study_commands, calibration_commands, methods_command, serve_commands)
for _command, _example in (row for table in _TABLES for row in table.COMMANDS):
    app.command(cls=Several, epilog=f"Example: merge3-client {_example}")(_command)


@app.command(epilog="Example: merge3-client report runs/first")
def report(
    run_dir: Annotated[Path, typer.Argument(help="A finished run.")], threads: Threads = None, as_json: Json = False
):
    """Draw a run's report.html again."""
    from merge3.client.report import write_report

    path = write_report(run_dir)
    print(json.dumps({"report": str(path)}) if as_json else path)


@app.command(epilog="Example: merge3-client status --server 127.0.0.1:50051")
def status(
    server: Server = "127.0.0.1:50051",
    tls_ca: Ca = None,
    tls_cert: Certificate = None,
    tls_key: Key = None,
    token_file: TokenFile = None,
    as_json: Json = False,
):
    """What a daemon holds and does, once."""
    from merge3.client import status as command

    command.show(target_of(server, tls_ca, tls_cert, tls_key, token_file), as_json)


@app.command(epilog="Example: merge3-client watch --server 127.0.0.1:50051 --interval 2")
def watch(
    server: Server = "127.0.0.1:50051",
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks.")] = 1.0,
    tls_ca: Ca = None,
    tls_cert: Certificate = None,
    tls_key: Key = None,
    token_file: TokenFile = None,
    as_json: Json = False,
):
    """What a daemon does, until Ctrl-C."""
    from merge3.client import status as command

    command.watch(target_of(server, tls_ca, tls_cert, tls_key, token_file), interval, as_json)


@app.command(epilog="Example: merge3-client demo --seed 1 --run-dir runs/demo")
def demo(
    seed: Annotated[int, typer.Option(help="Of training, items and search.")] = 0,
    run_dir: Annotated[Path | None, typer.Option(help="A new directory (default: runs/demo-SEED).")] = None,
    budget: Annotated[int, typer.Option(help="Candidates.")] = 600,
    steps: Annotated[
        tuple[int, int] | None,
        typer.Option(min=1, help="Of training: base, each expert (default: the base until it is half trained)."),
    ] = None,
    items: Annotated[int, typer.Option(min=10, help="Questions of every task.")] = 2000,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
):
    """Train tiny experts, evolve their merge, show the result: about three minutes on two cores."""
    from merge3.client.demo import demo as run_demo

    directory = run_dir or _free(Path("runs") / f"demo-{seed}")
    result = run_demo(seed, directory, as_json, quiet, budget, steps, items)
    _finish(result, directory / "run", as_json)


def main() -> None:
    """Entry point of the process."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress is ours to show
    configure()  # before a command imports torch
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """A command line's exit code: bad input is one line and 2, never a traceback. Warnings are again as they were."""
    from merge3.errors import Merge3Error, Merge3Warning

    with warnings.catch_warnings():
        warnings.simplefilter("always", Merge3Warning)
        warnings.showwarning = _Once()
        try:
            app(list(arguments), prog_name="merge3-client")
        except SystemExit as ended:
            return int(ended.code or 0)
        except Merge3Error as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except Merge3Warning as warning:
            print(f"error: {warning} (--strict)", file=sys.stderr)
            return BAD_INPUT
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Exception as error:  # the one place where anything else becomes a line
            if os.environ.get("MERGE3_TRACEBACK"):
                raise
            print(f"error: {type(error).__name__}: {error} (MERGE3_TRACEBACK=1 shows where)", file=sys.stderr)
            return 1
    return 0


class _Once:
    """Shows a warning as one line, the same one once in a command."""

    def __init__(self):
        self._said: set[str] = set()

    def __call__(self, message, category, *where, **named) -> None:
        if str(message) not in self._said:
            self._said.add(str(message))
            print(f"warning: {message}", file=sys.stderr)


def _version(on: bool) -> None:
    if on:
        from merge3 import __version__

        print(f"merge3-client {__version__}")
        raise typer.Exit


def _finish(result: dict | None, directory: Path, as_json: bool) -> None:
    if result is None:
        sys.exit(130)
    if as_json:
        print(json.dumps(result))
        return
    from merge3.client.run import print_result

    print_result(result, directory)


def _free(path: Path) -> Path:
    """The path, or path-2, path-3, .. until one is not taken."""
    number = 1
    while (candidate := path if number == 1 else path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return candidate
