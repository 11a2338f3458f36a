"""The command evaluate: its options; evaluate.py does the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merge3.client.options import Device, ExpertsAs, Json, MemoryBudget, SkipTooLong, Strict, TaskPath, Threads


def evaluate(
    what: Annotated[Path, typer.Argument(help="A checkpoint directory, or a recipe file to merge in memory.")],
    items: Annotated[list[Path] | None, typer.Argument(help="JSONL files of items.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task, group or tag of lm-eval's; repeat.")] = None,
    task_path: TaskPath = None,
    metric: Annotated[str | None, typer.Option(help="Of the tasks, as lm-eval prints it: acc_norm,none.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first items or documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Worked examples before each document.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Prompts in the model's chat template.")
    ] = False,
    system_instruction: Annotated[str | None, typer.Option(help="The chat's system message.")] = None,
    fewshot_as_multiturn: Annotated[
        bool, typer.Option("--fewshot-as-multiturn", help="Worked examples as turns of the chat.")
    ] = False,
    gen_kwargs: Annotated[
        str | None, typer.Option(help="Generation arguments, as JSON: '{\"max_gen_toks\": 32}'.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random keeps (DARE, DELLA).")] = 0,
    device: Device = "cpu",
    memory_budget: MemoryBudget = None,
    experts: ExpertsAs = None,
    responses: Annotated[Path | None, typer.Option(help="Also write every response, as JSONL.")] = None,
    skip_too_long: SkipTooLong = False,
    surgery: Annotated[bool, typer.Option(help="By task, with the adapters that lie in the folder.")] = True,
    variants: Annotated[bool, typer.Option(help="By task, with the variants that lie in the folder.")] = True,
    route: Annotated[
        bool, typer.Option("--route", help="By the variant that the router finds for each prompt.")
    ] = False,
    strict: Strict = False,
    threads: Threads = None,
    as_json: Json = False,
):
    """Ask a model, or a recipe's merge, the items of files, or tasks of lm-eval's."""
    from merge3.adapters.lm_eval import Settings
    from merge3.client.evaluate import Asked, evaluate_files, show

    settings = Settings(
        metric, num_fewshot, apply_chat_template, system_instruction, fewshot_as_multiturn, _mapping(gen_kwargs)
    )
    asked = Asked(items or (), task or (), task_path or (), settings, limit)
    beside = {"surgery": surgery, "variants": variants, "route": route, "experts": experts or "full"}
    result = evaluate_files(what, asked, seed, device, responses, memory_budget, skip_too_long, **beside)
    print(json.dumps(result)) if as_json else show(result)


def _mapping(text: str | None) -> dict:
    """--gen-kwargs. Raises BadInput."""
    from merge3.errors import BadInput

    try:
        found = json.loads(text) if text else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BadInput("--gen-kwargs", f"found {text!r}", "a JSON object")
    return found


COMMANDS = (  # each with its example
    (evaluate, "evaluate merged/ items.jsonl    or: merged/ --task arc_easy --limit 200"),
)
