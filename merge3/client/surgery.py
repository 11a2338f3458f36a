"""`merge3-client fit` of a recipe with `surgery:`: the merge alone first, fitted where it is a learned one, then an
adapter for each task on top of it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from merge3.client.fit import Run, begin, check_possible, fitted_host, registration, say_stopped
from merge3.client.fit_files import FitFiles
from merge3.client.fit_items import Taught, load_items
from merge3.client.fit_progress import chosen
from merge3.client.fit_report import write_fit_report
from merge3.client.fit_result import baselines, measure, other_run, peak_memory
from merge3.client.stopping import StopOnInterrupt
from merge3.engine import Engine, Operated
from merge3.errors import BadInput, RecipeError
from merge3.files import Held, write_atomically
from merge3.learn.fit import Fit, check_learned
from merge3.learn.lessons import TaskToLearn
from merge3.learn.settings import SurgerySettings, located, read_fit, read_surgery
from merge3.learn.surgery import Adapters, Surgery, check_surgery, save
from merge3.learn.surgery_file import FILE, remove_partials, save_beside
from merge3.learn.surgery_items import check_items, unseen
from merge3.live.heads import own_heads
from merge3.live.slot import Slot
from merge3.methods import method_named
from merge3.methods.learned import LEARNED
from merge3.packaging import chat_template
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.search.measure import Measured, items_name
from merge3.tasks import Item, by_task, items_hash

if TYPE_CHECKING:
    from merge3.client.channel import Target

STEPS = "surgery.jsonl"  # a line a step


@dataclass(frozen=True)
class Asked:
    """settings, taught: of the surgery. learned: what a learned host is fitted with, None where the recipe below the
    adapters is an ordinary one."""

    recipe: Recipe
    settings: SurgerySettings
    taught: Taught
    learned: Taught | None


@dataclass(frozen=True)
class Host:
    """What the adapters are put on. engine: over its models and the experts, open. told: what result.json says of the
    fit of a learned one."""

    recipe: Recipe
    engine: Engine
    told: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """distances: task -> L1 distance from its expert (before, after) of the items that were learned from."""

    adapters: Adapters
    history: Sequence[Mapping[str, Any]]
    distances: Mapping[str, tuple[float, float]]
    seconds: float


def fit_with_surgery(
    recipe: Recipe,
    file: Path,
    directory: Path,
    resume: bool,
    as_json: bool,
    quiet: bool,
    device: str,
    export: bool,
    target: Target | None,
    memory_budget: str | None,
    compare: Sequence[Path],
) -> dict[str, Any] | None:
    """As fit.fit, which hands over to this. The surgery itself is begun anew by --resume: it takes seconds."""
    if target is not None:
        raise BadInput("--server", "given with a recipe that has `surgery:`", "surgery in this process: no --server")
    asked = _read(recipe, file, directory)
    others = {str(run): other_run(run, asked.taught.heldout) for run in compare}
    files = FitFiles(directory, resume)
    hashes = {"surgery's items": items_hash(asked.taught.learned), "measured items": items_hash(asked.taught.heldout)}
    with Held(directory), StopOnInterrupt() as stopping:
        taught = asked.learned or asked.taught
        run = Run(recipe, taught, files, device, None, memory_budget, quiet, as_json, stopping, hashes)
        remove_partials(directory)
        host = _host(run, asked)
        if host is None:
            return say_stopped(file, directory)
        with closing(host.engine) as engine:
            outcome = None if stopping() else _operated(host, asked, stopping, as_json, quiet)
            if outcome is None:
                return say_stopped(file, directory)
            write_atomically(directory / "fitted.yaml", host.recipe.to_yaml())
            write_atomically(directory / STEPS, "".join(json.dumps(line) + "\n" for line in outcome.history))
            held = registration(asked.taught.heldout, asked.taught, engine.info().own_heads)
            measured = measure(engine, held, Operated(host.recipe, outcome.adapters.tasks))
            beside = {f"{recipe.method} alone": measure(engine, held, host.recipe)}
            beside |= baselines(engine, recipe, held)
            _write(host, outcome.adapters, directory, export)
        result = _summary(asked, outcome, measured, beside, others) | host.told
        write_atomically(directory / "result.json", json.dumps(result, indent=2))
        write_fit_report(directory)
    return result


def _read(recipe: Recipe, file: Path, directory: Path) -> Asked:
    """Raises RecipeError or ItemsError."""
    where, folder = f"{file}: surgery", Path(file).parent
    settings, learned = read_surgery(recipe.surgery, where), None
    if recipe.fit or recipe.method in LEARNED:
        check_learned(recipe, str(file))
        of_fit = located(read_fit(recipe.fit, f"{file}: fit"), folder)
        learned = load_items(recipe, of_fit, f"{file}: fit")
        check_possible(recipe, learned, None, f"{file}: fit", directory)
        if recipe.tokenizer is not None and Fit(recipe).method.survivors:
            # Experts and what is made of them have more tokens between them than the merge would have.
            found = f"found with {recipe.method}, which makes experts of its own, and `surgery:`"
            raise RecipeError(f"{file}: tokenizer", found, "none, or another learned method")
        settings = settings.after(of_fit)
    else:
        method_named(recipe.method, f"{file}: merge_method")
    settings = located(settings, folder)
    taught = load_items(recipe, settings, where)
    seen = taught.learned + (learned.learned if learned is not None else [])
    # What either has learned from measures neither.
    return Asked(recipe, settings, replace(taught, heldout=unseen(taught.heldout, seen, where)), learned)


def _host(run: Run, asked: Asked) -> Host | None:
    """None when interrupted."""
    if asked.learned is None:
        alone, engine = replace(asked.recipe, surgery={}), run.open(asked.recipe)
        engine.check(alone)
        _check(asked, engine.slot)
        begin(run, engine.info().content_hashes)
        return Host(alone, engine, {})
    _check_alone(asked)
    found = fitted_host(run)
    if found is None:
        return None
    fit = {
        "learned_items": len(asked.learned.learned),
        "settings": Fit(asked.recipe, asked.learned.experts).settings.model_dump(mode="json"),
        "passes": {"merges": found.steps, "forward": found.asked, "backward": found.asked},
        "losses": [line["loss"] for line in found.history],
        "seconds": found.seconds,
    }
    run.files.tell(found.history)
    engine = found.engine
    if found.elsewhere:  # over models of its own: the experts are needed too
        engine.close()
        engine = run.open(replace(found.recipe, slices=(*found.recipe.slices, *asked.recipe.slices)))
    return Host(found.recipe, engine, {"fit": fit})


def _check_alone(asked: Asked) -> None:
    """What surgery refuses is refused before a fit that takes minutes. Weights are read as they are needed."""
    recipe = asked.recipe
    base, *others = (str(model) for model in recipe.models())
    pool = Pool.open(base, others, tokenizer=recipe.tokenizer, tower=recipe.tower)
    dtype = recipe.out_dtype or recipe.dtype
    _check(asked, Slot(pool, getattr(torch, dtype) if dtype else None))


def _check(asked: Asked, slot: Slot) -> None:
    """Raises BadInput for a rank, heads or items that surgery refuses. Overwrites the live model."""
    check_surgery(asked.settings, slot.model)
    pool, taught = slot.pool, asked.taught
    own = own_heads(pool)
    template = chat_template(asked.recipe, pool) if taught.chat else None

    def tasks(items: list[Item]) -> list[TaskToLearn]:
        found = []
        for task, asked_of in by_task(items).items():
            expert = taught.experts[task]
            found.append(TaskToLearn(task, asked_of, expert if own else None, expert, taught.chat.get(task)))
        return found

    check_items(slot, tasks(taught.learned), tasks(taught.heldout), pool.words.folder(template))


def _operated(host: Host, asked: Asked, stopping, as_json: bool, quiet: bool) -> Outcome | None:
    """None when interrupted."""
    taught, began = asked.taught, time.perf_counter()
    items = registration(taught.learned, taught, host.engine.info().own_heads)
    operation = host.engine.operate(items, host.recipe, Surgery(asked.settings, taught.experts))
    history: list[Mapping[str, Any]] = []
    found = None
    with chosen(as_json, quiet, asked.settings.steps, 0) as report:
        for step in operation.steps():
            history.append({"step": step.number, "loss": step.loss, "losses": dict(step.losses)})
            report(history[-1])
            found = step.adapters
            if stopping() and found is None:
                return None
    before, after = operation.distances(), operation.distances(found)
    distances = {task: (before[task], after[task]) for task in before}
    adapters = Adapters(found, {task: taught.experts[task] for task in found}, operation.recipe)
    return Outcome(adapters, history, distances, time.perf_counter() - began)


def _write(host: Host, adapters: Adapters, directory: Path, export: bool) -> None:
    """The checkpoint with its adapters in model/; without it the adapters alone. What a run that is resumed has left of
    the other is brought up to date as well: result.json is of whatever lies here."""
    (directory / "result.json").unlink(missing_ok=True)
    model = directory / "model"
    if not export or (directory / FILE).exists():
        save(adapters, directory)
    if export or model.exists():
        save_beside(adapters, model, lambda folder: host.engine.export(host.recipe, folder))


def _summary(
    asked: Asked, outcome: Outcome, heldout: Measured, beside: Mapping[str, Measured], others: Mapping[str, Any]
) -> dict[str, Any]:
    """result.json."""
    adapters, taught = outcome.adapters, asked.taught
    passes = {"forward of the merge": len(taught.learned), "forward of experts": len(taught.learned)}
    return {
        "method": asked.recipe.method,
        "models": [str(model) for model in asked.recipe.models()],
        "seed": asked.settings.seed,
        "heldout": heldout["accuracy"],
        "heldout_detail": heldout,
        "heldout_items": len(taught.heldout),
        "heldout_name": items_name(taught.heldout),
        "baselines": {name: detail["accuracy"] for name, detail in beside.items()},
        "baselines_detail": dict(beside),
        "best_baseline": max(beside, key=lambda name: beside[name]["accuracy"]),
        "host": next(iter(beside)),
        "learned_items": len(taught.learned),
        "labels": False,
        "settings": asked.settings.model_dump(mode="json"),
        "surgery": {
            "rank": adapters.rank,
            "width": adapters.width,
            "parameters": adapters.parameters,
            "distances": {task: list(pair) for task, pair in outcome.distances.items()},
        },
        "passes": passes,
        "item_answers": sum(passes.values()),
        "losses": [line["loss"] for line in outcome.history],
        "others": dict(others),
        "seconds": outcome.seconds,
        "peak_memory": peak_memory(),
    }


def print_surgery(result: Mapping[str, Any], directory: Path) -> None:
    """The table a person reads at the end."""
    from rich.console import Console

    from merge3.client.run import accuracy_table

    rows = [("with surgery", result["heldout_detail"])]
    rows += [(name, other["detail"]) for name, other in result["others"].items()]
    rows += sorted(result["baselines_detail"].items(), key=lambda row: -row[1]["accuracy"])
    console, surgery = Console(), result["surgery"]
    console.print(accuracy_table(rows, result["heldout_items"], "the surgery", "with surgery"))
    gains = []
    for name in dict.fromkeys((result["host"], result["best_baseline"])):
        gains.append(f"{result['heldout'] - result['baselines'][name]:+.3f} over {name}")
    best = f", the best baseline is {result['best_baseline']}"
    console.print(", ".join(gains) + best)
    for task, (before, after) in surgery["distances"].items():
        console.print(f"{task}: L1 distance from its expert {before:.4f} before, {after:.4f} after")
    size = f"rank {surgery['rank']} of {surgery['width']}, {surgery['parameters']:,} numbers"
    console.print(f"{size}, from {result['learned_items']} unlabelled items in {result['seconds']:.0f} s")
    model = f"model {directory / 'model'}, " if (directory / "model").exists() else ""
    console.print(f"recipe {directory / 'fitted.yaml'}, {model}report {directory / 'report.html'}")
