"""Options that several commands of merge3-client share, as annotated types. Imports nothing heavy: --help is quick."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from merge3.threads import threads_option


def _strict(on: bool) -> bool:
    from merge3.errors import Merge3Warning

    if on:
        warnings.simplefilter("error", Merge3Warning)
    return on


def target_of(server: str, ca: str | None, certificate: Path | None, key: Path | None, token_file: Path | None):
    """A daemon, as channel.Target."""
    from merge3.client.channel import Target

    return Target(server, ca, certificate, key, token_file)


def prefixes(pairs: Iterable[str]) -> dict[str, str]:
    """`--tower FROM=TO ..` as FROM -> TO. Raises BadInput for what is no such pair, and a FROM that occurs twice."""
    from merge3.errors import BadInput

    found: dict[str, str] = {}
    for pair in pairs:
        own, equals, place = pair.partition("=")
        if not equals or own in found:
            what = "is there twice" if own in found else "has no `=`"
            raise BadInput("--tower", f"{pair!r} {what}", "FROM=TO, two prefixes of tensor names, each FROM once")
        found[own] = place
    return found


class Several(TyperCommand):
    """A command whose options with a metavar in `..` take all words up to the next option: `--items a.jsonl b.jsonl`.
    What else it is given stands before them."""

    def parse_args(self, ctx, args: Sequence[str]):
        """As of `--items a.jsonl --items b.jsonl`."""
        several = set()
        for parameter in self.params:
            if (parameter.metavar or "").endswith(".."):
                several |= set(parameter.opts)
        return super().parse_args(ctx, list(_repeated(args, several)))


def _repeated(words: Iterable[str], several: set[str]) -> Iterator[str]:
    """The words, with an option of these before each of its values."""
    option, values = "", 0
    for word in words:
        if word.startswith("-"):
            name, equals, _ = word.partition("=")
            option, values = name if name in several else "", len(equals)
        elif option:
            values += 1
            if values > 1:
                yield option
        yield word


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
Abreast = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Candidates that one read of the models serves, layer by layer; each takes a layer's room more. Default: "
        "4 where weights are streamed, else 1. Answers are the same.",
    ),
]
ExpertsAs = Annotated[
    str | None,
    typer.Option(
        "--experts",
        metavar="full|residual[:DENSITY]|int8",
        help="How experts are held in memory: as they are, the largest DENSITY (0.1) of what they change, or int8 per "
        "row. What is lost is said; exports read the full checkpoints.",
    ),
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
