"""The commands calibrate, extract and estimate: their options and what they print; calibrate.py does the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merge3.client.options import Device, Json, Quiet, SkipTooLong, TaskPath, Threads


def calibrate(
    out: Annotated[Path, typer.Option(help="A new directory for responses, item banks and their pictures.")],
    config: Annotated[
        Path | None, typer.Argument(help="An evolve configuration: its endpoints and random merges answer.")
    ] = None,
    responses: Annotated[
        Path | None, typer.Option(help="Use these answers (model, item, score; CSV, Parquet, JSONL).")
    ] = None,
    endpoint: Annotated[
        list[str] | None, typer.Option(help="Name of an endpoint among a response file's models; repeat.")
    ] = None,
    dimensions: Annotated[int, typer.Option(min=1, help="Ability dimensions; each needs five models.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the fit; a configuration's own seed goes first.")] = 0,
    skip_too_long: SkipTooLong = False,
    task_path: TaskPath = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
):
    """Learn the difficulty of items, from models' answers to them."""
    from merge3.client import calibrate as command

    result = command.calibrate(
        out,
        config,
        responses,
        tuple(endpoint or ()),
        dimensions,
        seed,
        device,
        quiet or as_json,
        skip_too_long,
        task_path or (),
    )
    if as_json:
        print(json.dumps(result))
        return
    for task, d in result["tasks"].items():
        print(
            f"{task:<24} {d['items']} items, {d['models']} models, {d['answers']:,} answers; "
            f"abilities ± {d['ability_sd']:.2f}; {d['misfitting_items']} items fit badly"
        )
    print(f"{result['answers']:,} answers in all: {out}")


def extract(
    calibration: Annotated[Path, typer.Argument(help="What `calibrate` wrote.")],
    size: Annotated[int, typer.Option(min=1, help="Items per task.")] = 20,
    method: Annotated[str, typer.Option(help="random, irt, correctness, entropy or information.")] = "irt",
    seed: Annotated[int, typer.Option(help="Of random choices.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the subset as JSON, for `estimate`.")] = None,
    threads: Threads = None,
    as_json: Json = False,
):
    """Choose a few items of every task that stand for all."""
    from merge3.client import calibrate as command

    result = command.extract(calibration, method, size, seed, out)
    if as_json:
        print(json.dumps(result))
        return
    for task, chosen in result["tasks"].items():
        print(f"{task}: {' '.join(chosen['items'])}")


def estimate(
    calibration: Annotated[Path, typer.Argument(help="What `calibrate` wrote.")],
    subset: Annotated[Path, typer.Argument(help="What `extract --out` wrote.")],
    responses: Annotated[Path, typer.Argument(help="New models' answers to the subset (model, item, score).")],
    method: Annotated[str, typer.Option(help="mean, p-irt, gp-irt, mp-irt or gmp-irt.")] = "gmp-irt",
    threads: Threads = None,
    as_json: Json = False,
):
    """Estimate accuracy on all items from answers to a few."""
    from merge3.client import calibrate as command

    rows = command.estimate(calibration, subset, responses, method)
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        note = "" if row["complete"] else "  (not every task answered)"
        print(f"{row['model']:<32} {row['accuracy']:.4f} ± {row['stderr']:.4f}{note}")


COMMANDS = (  # in the order of --help, each with its example
    (calibrate, "calibrate evolve.yaml --out calibration    or: --responses leaderboard.csv --out calibration"),
    (extract, "extract calibration --size 20 --out subset.json"),
    (estimate, "estimate calibration subset.json answers.csv"),
)
