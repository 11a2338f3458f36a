"""The commands compare and study: their options; compare.py and study.py do the work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from merge3.client.options import Device, ExpertsAs, Json, MemoryBudget, Quiet, SkipTooLong, Strict, TaskPath, Threads


def compare(
    recipes: Annotated[list[Path] | None, typer.Argument(help="Recipes in mergekit's YAML.")] = None,
    items: Annotated[list[Path] | None, typer.Option(metavar="FILE..", help="JSONL files of items.")] = None,
    base: Annotated[str | None, typer.Option(help="Instead of recipes: the base of the models.")] = None,
    models: Annotated[
        list[str] | None, typer.Option(metavar="MODEL..", help="Instead of recipes: what every method merges.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="TASK..", help="Tasks, groups or tags of lm-eval's.")
    ] = None,
    task_path: TaskPath = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first items or documents of each task.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Prompts in the model's chat template.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of random keeps (DARE, DELLA).")] = 0,
    device: Device = "cpu",
    memory_budget: MemoryBudget = None,
    experts: ExpertsAs = None,
    responses: Annotated[Path | None, typer.Option(help="Also write every response, as JSONL.")] = None,
    skip_too_long: SkipTooLong = False,
    strict: Strict = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
):
    """Which merge of my models? Recipes, or the merges of all methods that need no data, asked the same items."""
    from merge3.adapters.lm_eval import Settings
    from merge3.client import compare as command
    from merge3.client.compare_table import show
    from merge3.client.evaluate import Asked
    from merge3.errors import BadInput

    if bool(recipes) == bool(models):
        raise BadInput("compare", "recipes and --models" if recipes else "neither recipes nor --models", "one of them")
    if recipes and base:
        raise BadInput("--base", "given with recipes", "recipes that name their base, or --models")
    what = command.from_files(recipes) if recipes else command.from_models(base, models)
    asked = Asked(items or (), task or (), task_path or (), Settings(apply_chat_template=apply_chat_template), limit)
    how = seed, device, memory_budget, responses, skip_too_long, quiet or as_json, experts or "full"
    result = command.compare(what, asked, *how)
    print(json.dumps(result)) if as_json else show(result)


def study(
    config: Annotated[Path, typer.Argument(help="Methods, numbers of experts, worlds; see docs/study.md.")],
    run_dir: Annotated[Path, typer.Option(help="Where the study lives: study.jsonl, result.json, report.html.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue a study that was stopped or killed.")] = False,
    device: Device = "cpu",
    memory_budget: MemoryBudget = None,
    strict: Strict = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
):
    """Merges by several methods, of several numbers of experts, in several worlds: what decides how good they are?"""
    from merge3.client.study import study as run_study
    from merge3.client.study_report import show

    result = run_study(config, run_dir, resume, quiet, device, memory_budget)
    if result is None:
        sys.exit(130)
    print(json.dumps(result)) if as_json else show(result, run_dir)


COMMANDS = (  # each with its example
    (compare, "compare ties.yaml linear.yaml --items a.jsonl b.jsonl    or: --base base --models a b --items a.jsonl"),
    (study, "study study.yaml --run-dir runs/study"),
)
