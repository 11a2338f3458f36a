"""`merge3-client fit` of a recipe with `surgery:`: the merge alone first, fitted where it is a learned one, then an
adapter for each task on top of it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge3.checkpoint import check_free
from merge3.client import fit as fits
from merge3.client.fit_files import FitFiles, identity
from merge3.client.fit_progress import chosen
from merge3.client.fit_report import write_fit_report
from merge3.client.run import StopOnInterrupt, open_models
from merge3.engine import Engine, Operated
from merge3.errors import BadInput
from merge3.files import resource_error, sync, write_atomically
from merge3.learn.fit import Fit, check_learned
from merge3.learn.losses import LOSSES
from merge3.learn.settings import SurgerySettings, located, read_fit, read_surgery
from merge3.learn.surgery import Adapters, Surgery, check_surgery, save
from merge3.methods import method_named
from merge3.methods.learned import LEARNED
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.search.measure import Measured
from merge3.tasks import items_hash

if TYPE_CHECKING:
    from merge3.client.channel import Target

STEPS = "surgery.jsonl"  # a line a step


@dataclass(frozen=True)
class Asked:
    """host: the recipe below the adapters, learned or not. settings, taught: of the surgery; learned: what the host
    learns from, None where it is an ordinary recipe."""

    recipe: Recipe
    host: Recipe
    settings: SurgerySettings
    taught: fits.Taught
    learned: fits.Taught | None


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
    asked = _read(recipe, file)
    others = {str(run): fits.other_run(run) for run in compare}
    files = FitFiles(directory, resume)
    models, dtype = [str(model) for model in recipe.models()], recipe.out_dtype or recipe.dtype
    opened = open_models(models, dtype, device, quiet, None, memory_budget, None, recipe.tokenizer, recipe.tower)
    with closing(opened) as engine:
        check_surgery(asked.settings, engine.slot.model)  # before a fit that takes minutes
        if asked.learned is None:
            engine.check(asked.host)
        files.begin(identity(recipe, engine.info().content_hashes, _hashes(asked)))
        write_atomically(directory / "recipe.yaml", recipe.to_yaml())
        host, of_host, outcome = asked.host, {}, None
        with StopOnInterrupt() as stopping:
            if asked.learned is not None:
                fitted = fits.learned(engine, host, asked.learned, files, stopping, as_json, quiet)
                if fitted is None:
                    return fits.say_stopped(file, directory)
                host, *told = fitted
                of_host = _of_host(asked.host, asked.learned, *told)
            if not stopping():
                outcome = _operated(engine, host, asked, stopping, as_json, quiet)
        if outcome is None:
            return fits.say_stopped(file, directory)
        write_atomically(directory / "fitted.yaml", host.to_yaml())
        write_atomically(directory / STEPS, "".join(json.dumps(line) + "\n" for line in outcome.history))
        held = _registration(engine, asked.taught, asked.taught.heldout)
        measured = fits.measure(engine, held, Operated(host, outcome.adapters.tasks))
        alone = fits.measure(engine, held, host)
        baselines = {f"{recipe.method} alone": alone, **fits.measured_baselines(engine, host, asked.taught)}
        _write(engine, host, outcome.adapters, directory, export)
    result = _summary(asked, outcome, measured, baselines, others) | of_host
    write_atomically(directory / "result.json", json.dumps(result, indent=2))
    write_fit_report(directory)
    return result


def _read(recipe: Recipe, file: Path) -> Asked:
    """Raises RecipeError or ItemsError."""
    host, where, folder = replace(recipe, surgery={}), f"{file}: surgery", Path(file).parent
    settings, learned = read_surgery(recipe.surgery, where), None
    if recipe.fit or recipe.method in LEARNED:
        check_learned(host, str(file))
        of_fit = located(read_fit(recipe.fit, f"{file}: fit"), folder)
        loss = LOSSES[Fit(host).method.loss]
        learned = fits.load_items(fits.others_of(recipe), of_fit, f"{file}: fit", loss.expert)
        settings = settings.after(of_fit)
    else:
        method_named(recipe.method, f"{file}: merge_method")
    settings = located(settings, folder)
    taught = fits.load_items(fits.others_of(recipe), settings, where, matched=True)
    if learned is not None:  # what either has learned from measures neither
        seen = {(item.task, item.id) for item in learned.learned}
        unseen = [item for item in taught.heldout if (item.task, item.id) not in seen]
        taught = replace(taught, heldout=unseen or taught.heldout)
    return Asked(recipe, host, settings, taught, learned)


def _hashes(asked: Asked) -> dict[str, str]:
    taught, learned = asked.taught, asked.learned
    found = {"surgery's items": items_hash(taught.learned), "held-out items": items_hash(taught.heldout)}
    return found if learned is None else found | {"learned items": items_hash(learned.learned)}


def _registration(engine: Engine, taught: fits.Taught, items) -> Registration:
    return Registration(tuple(items), heads=fits.own_heads(engine, taught), chat=taught.chat)


def _operated(engine: Engine, host: Recipe, asked: Asked, stopping, as_json: bool, quiet: bool) -> Outcome | None:
    """None when interrupted."""
    taught, began = asked.taught, time.perf_counter()
    registration = _registration(engine, taught, taught.learned)
    operation = engine.operate(registration, host, Surgery(asked.settings, taught.experts))
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


def _write(engine: Engine, host: Recipe, adapters: Adapters, directory: Path, export: bool) -> None:
    """The checkpoint with its adapters in model/, there whole or not at all; without it the adapters alone."""
    model = directory / "model"
    if not export:
        save(adapters, directory)
        return
    if model.exists():  # a run that is resumed had come so far
        return
    check_free(model)
    partial = directory / f".model.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        engine.export(host, partial)
        save(adapters, partial)
        os.rename(partial, model)
        sync(directory)
    except OSError as error:
        raise resource_error(model, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _of_host(host: Recipe, taught: fits.Taught, history: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """What result.json says of a host that was learned."""
    settings = Fit(host, taught.experts).settings.model_dump(mode="json")
    found = {"learned_items": len(taught.learned), "settings": settings, "seconds": seconds}
    return {"fit": found | {"losses": [line["loss"] for line in history]}}


def _summary(
    asked: Asked, outcome: Outcome, heldout: Measured, baselines: Mapping[str, Measured], others: Mapping[str, Any]
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
        "baselines": {name: detail["accuracy"] for name, detail in baselines.items()},
        "baselines_detail": dict(baselines),
        "best_baseline": max(baselines, key=lambda name: baselines[name]["accuracy"]),
        "host": next(iter(baselines)),
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
        "peak_memory": fits.peak_memory(),
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
