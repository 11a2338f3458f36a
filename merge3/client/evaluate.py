"""Answer items with one model: a checkpoint as it is, or a recipe merged in memory."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from merge3.adapters.lm_eval import Settings, load_benchmark
from merge3.client.routing import check_variants, routed, told_of_routes
from merge3.engine import Evaluation, LocalEngine, Operated, Varied
from merge3.errors import BadInput, CheckpointError, ItemsError, Merge3Warning
from merge3.experts import Experts
from merge3.files import write_atomically
from merge3.fitness import mean_over_tasks
from merge3.learn.surgery import load
from merge3.learn.surgery_file import FILE
from merge3.live.hooks import Adapter
from merge3.methods.filters import check_filters
from merge3.packaging import chat_template
from merge3.pool import Pool
from merge3.recipe import Recipe, load_yaml
from merge3.registration import Registration
from merge3.tasks import Item, fit_to_model, read_items
from merge3.tasks.items import place
from merge3.variants import ABOUT
from merge3.variants import FILE as VARIANTS

if TYPE_CHECKING:
    from merge3.adapters.judging import Benchmark


@dataclass(frozen=True)
class Asked:
    """What a model is asked. files: of items; tasks: of lm-eval's, by name, with folders of further ones; limit: the
    first items or documents of each, and of each task of a group. settings: of the tasks; their chat template and
    system message are the files' too."""

    files: Sequence[Path] = ()
    tasks: Sequence[str] = ()
    task_path: Sequence[Path] = ()
    settings: Settings = field(default_factory=Settings)
    limit: int | None = None

    def chat(self, items: Sequence[Item]) -> dict[str, str]:
        """Task -> system message, of the files' tasks, where a chat template is applied."""
        if not self.settings.apply_chat_template:
            return {}
        return {item.task: self.settings.system_instruction or "" for item in items}


def evaluate_files(
    what: Path,
    asked: Asked,
    seed: int = 0,
    device: str = "cpu",
    responses_file: Path | None = None,
    memory_budget: str | None = None,
    skip_too_long: bool = False,
    surgery: bool = True,
    variants: bool = True,
    route: bool = False,
    experts: str = "full",
) -> dict[str, Any]:
    """{"accuracy", "stderr", "tasks": {task: {accuracy, stderr, items}}, "skipped": {task: items}, "seconds"}; of
    lm-eval's tasks "metrics" too: {task: {leaf: {"metric,filter": value}}}, by their own aggregation.

    A task without a value per document has metrics and no accuracy. skip_too_long: leave out what the model has no
    positions for, say so, and count it in `skipped`. surgery: answer a task's items with its adapter where the folder
    has one. variants: with its own model where the folder has one for each task, as a recipe of such a method does.
    route: by the variant that the router finds for its prompt, whatever the item's task. experts: of a recipe, how they
    are held; see Pool.open.
    """
    if not asked.files and not asked.tasks:
        raise BadInput("evaluate", "neither a file of items nor --task", "one of them, or both")
    items = items_of_files(asked)  # bad items and bad adapters before any model is opened
    adapters = _adapters(what) if surgery and (what / FILE).is_file() else None
    chat = asked.chat(items)
    subject = None if what.is_dir() or what.suffix not in (".yaml", ".yml") else Recipe.from_yaml(what)
    check_variants(route, variants, what, subject)
    held = Experts.parse(experts, "--experts")
    if held and subject is None:
        raise BadInput("--experts", f"{held} for {what}, which is one model", "a recipe, whose models are held so")
    pool, subject, dtype = _opened(what, subject, device, memory_budget, held)
    folder = pool.words.folder(chat_template(subject, pool) if isinstance(subject, Recipe) else None)
    benchmarks = _benchmarks(asked, folder)
    for benchmark in benchmarks.values():
        items += benchmark.first(asked.limit)
    check_unique(items)
    policy, system = "skip" if skip_too_long else "error", asked.settings.system_instruction or ""
    fitted = fit_to_model(items, folder, policy, bool(chat), system)
    items = fitted.items
    for note in fitted.notes:
        print(note, file=sys.stderr)
    engine = LocalEngine(pool, getattr(torch, dtype) if dtype else None)
    start = time.perf_counter()
    routes: list[str] | None = None
    if route:
        routes = routed(what, subject, engine.slot, items)
        subject = Varied(subject, tuple(routes))
    elif isinstance(subject, str) and variants and any((what / name).is_file() for name in (ABOUT, VARIANTS)):
        subject = Varied(subject)
    if adapters is not None:
        subject = _with_adapters(subject, adapters, items)
    (evaluation,) = engine.evaluate(Registration(tuple(items), seed=seed, chat=chat), [subject])
    seconds = time.perf_counter() - start
    responses, metrics = _judged(evaluation, items, benchmarks)
    counted = [i for i, value in enumerate(responses) if not np.isnan(value)]
    result = _accuracies(responses[counted], [items[i] for i in counted]) if counted else {"tasks": {}}
    if responses_file is not None:
        rows = [response_row(str(what), items[i], float(responses[i])) for i in counted]
        write_atomically(responses_file, "".join(json.dumps(row) + "\n" for row in rows))
    result |= {"skipped": fitted.skipped, "seconds": seconds}
    if held:
        result["experts"] = {"option": str(held), "loss": [loss._asdict() for loss in pool.compacted.losses]}
    if routes is not None:
        result["routes"] = told_of_routes(routes, items)
    return result | {"metrics": metrics} if metrics else result


def show(result: Mapping[str, Any]) -> None:
    """The table a person reads."""
    for task, leaves in result.get("metrics", {}).items():
        for leaf, metrics in leaves.items():
            for name, value in metrics.items():
                print(f"{leaf if leaf == task else f'{task}: {leaf}':<24} {name} {value:.4f}")
    for task, detail in result["tasks"].items():
        print(f"{task:<24} {detail['accuracy']:.4f} ± {detail['stderr']:.4f}  ({detail['items']} items)")
    if result["tasks"]:
        mean = f"{result['accuracy']:.4f} ± {result['stderr']:.4f}"
        print(f"{'mean over tasks':<24} {mean}  in {result['seconds']:.1f} s")
    if "routes" in result:
        own = result["routes"]["of_own_task"]
        sent = ", ".join(f"{count} to {task}" for task, count in result["routes"]["sent"].items())
        print(f"the router sent {sent}" + ("" if own is None else f"; {100 * own:.1f} % to their own task's variant"))


def items_of_files(asked: Asked) -> list[Item]:
    """The first items of every task. Raises BadInput for settings that only lm-eval's tasks know."""
    settings = asked.settings
    if not asked.tasks:
        own = {"metric": settings.metric, "num-fewshot": settings.num_fewshot, "gen-kwargs": settings.gen_kwargs}
        own |= {"fewshot-as-multiturn": settings.fewshot_as_multiturn, "task-path": asked.task_path}
        for name, value in own.items():
            if value not in (None, False, (), [], {}):
                raise BadInput(f"--{name}", "given without --task", "a task of lm-eval's")
    if settings.system_instruction and asked.files and not settings.apply_chat_template:
        raise BadInput("--system-instruction", "given without --apply-chat-template", "both, or neither")
    items, counts = [], Counter()
    for file in asked.files:
        for item in read_items(file):
            counts[item.task] += 1
            if asked.limit is None or counts[item.task] <= asked.limit:
                items.append(item)
    return items


def _opened(
    what: Path, recipe: Recipe | None, device: str, memory_budget: str | None, experts: Experts
) -> tuple[Pool, Recipe | str, str | None]:
    """(the pool, what is asked, the live model's dtype)"""
    if recipe is None:
        pool, dtype = Pool.open(str(what), [], device, memory_budget=memory_budget), None
        subject = pool.base
    else:
        subject, models = recipe, recipe.models()
        settings = {"memory_budget": memory_budget, "experts_as": experts}
        settings |= {"tokenizer": subject.tokenizer, "tower": subject.tower}
        pool = Pool.open(models[0], models[1:], device, **settings)
        dtype = subject.out_dtype or subject.dtype
        check_filters(subject, pool.layouts.values(), str(what))
    for line in pool.warnings:
        warnings.warn(line, Merge3Warning, stacklevel=2)
    for note in pool.notes:
        print(note, file=sys.stderr)
    return pool, subject, dtype


def _adapters(folder: Path) -> Mapping[str, Adapter]:
    """Of the merge in a folder. Raises CheckpointError where they were fitted to another one."""
    found, file = load(folder), folder / "mergekit_config.yml"
    if found.recipe and file.is_file():
        recipe = Recipe.parse(load_yaml(file.read_text(encoding="utf-8"), str(file)), str(file))
        if recipe.hash() != found.recipe:
            which = f"adapters of recipe {found.recipe}, beside the merge of recipe {recipe.hash()}"
            raise CheckpointError(folder / FILE, which, "adapters of this merge", "--no-surgery asks it without")
    return found.tasks


def _with_adapters(subject: Recipe | str, adapters: Mapping[str, Adapter], items: Sequence[Item]) -> Operated:
    """The subject with its folder's adapters; says which tasks have none."""
    without = [task for task in dict.fromkeys(item.task for item in items) if task not in adapters]
    if without:
        print(f"no adapter in {FILE} for {', '.join(without)}: answered by the merge alone", file=sys.stderr)
    return Operated(subject, adapters)


def _benchmarks(asked: Asked, folder: Path) -> dict[str, Benchmark]:
    paths, settings = [str(path) for path in asked.task_path], asked.settings
    found = {name: load_benchmark(name, settings, folder, paths, fitness=False) for name in asked.tasks}
    if settings.metric is not None and all(benchmark.metric is None for benchmark in found.values()):
        expected = "a metric with a value per document; without --metric all are printed"
        raise BadInput("--metric", f"{settings.metric!r} is none of {', '.join(found)}", expected)
    return found


def check_unique(items: Sequence[Item]) -> None:
    """Raises ItemsError where a task has an id twice, in several files."""
    seen: set[tuple[str, str]] = set()
    for item in items:
        if (item.task, item.id) in seen:
            raise ItemsError(place(item), "this id is in another file too", "unique ids within a task")
        seen.add((item.task, item.id))


def _judged(
    evaluation: Evaluation, items: Sequence[Item], benchmarks: Mapping[str, Benchmark]
) -> tuple[np.ndarray, dict[str, dict[str, dict[str, float]]]]:
    """(responses, NaN for documents without a value of their own; lm-eval's metrics of every task)"""
    if not evaluation.raw:
        return evaluation.answers(), {}
    responses, metrics = evaluation.responses.copy(), {}
    for name, benchmark in benchmarks.items():
        own = [at for at in evaluation.raw if items[at].task == name]
        asked, raws = [items[at] for at in own], [evaluation.raw[at] for at in own]
        metrics[name] = benchmark.table(asked, raws)
        if benchmark.metric is not None:
            responses[own] = [benchmark.judge(item, raw) for item, raw in zip(asked, raws)]
    return responses, metrics


def _accuracies(responses: np.ndarray, items: Sequence[Item]) -> dict[str, Any]:
    value, stderr = mean_over_tasks(responses, items)
    tasks = {}
    for task in dict.fromkeys(item.task for item in items):
        at = [i for i, item in enumerate(items) if item.task == task]
        accuracy, error = mean_over_tasks(responses[at], [items[i] for i in at])
        tasks[task] = {"accuracy": accuracy, "stderr": error, "items": len(at)}
    return {"accuracy": value, "stderr": stderr, "tasks": tasks}


def response_row(model: str, item: Item, score: float) -> dict[str, Any]:
    """One answer, with what its item carries beside our keys; `extra_` comes before a name that is a row's own."""
    row: dict[str, Any] = {"model": model, "item": item.id, "task": item.task, "score": score}
    for key, value in item.extra:
        row[f"extra_{key}" if key in row else key] = value
    return row
