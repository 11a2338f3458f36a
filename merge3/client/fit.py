"""`merge3-client fit`: from a recipe with `fit:` to a finished run directory."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from merge3.client.fit_files import FitFiles, identity
from merge3.client.fit_progress import chosen
from merge3.client.fit_report import write_fit_report
from merge3.client.run import StopOnInterrupt, open_models
from merge3.engine import Engine, Subject
from merge3.errors import BadInput, ItemsError, Merge3Warning, RecipeError
from merge3.files import write_atomically
from merge3.learn.fit import Fit, check_learned, experts_of
from merge3.learn.losses import LOSSES
from merge3.learn.settings import FitSettings, SurgerySettings, located, read_fit
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.search.baselines import default_merges
from merge3.search.measure import Measured, measured, short_names
from merge3.search.seeds import seed_of
from merge3.tasks import Item, LogitsError, items_hash, read_items, split_heldout

if TYPE_CHECKING:
    from merge3.client.channel import Target


@dataclass(frozen=True)
class Taught:
    """learned: the items of every task that are learned from; heldout: those that measure. experts: task -> its own
    model; chat: task -> system message, of prompts that the chat template wraps."""

    learned: list[Item]
    heldout: list[Item]
    experts: dict[str, str]
    chat: dict[str, str]


def fit(
    file: Path,
    directory: Path,
    resume: bool = False,
    as_json: bool = False,
    quiet: bool = False,
    device: str = "cpu",
    export: bool = True,
    target: Target | None = None,
    memory_budget: str | None = None,
    compare: Sequence[Path] = (),
) -> dict[str, Any] | None:
    """Learn, measure, export, report. Returns result.json's content; None when interrupted by Ctrl-C.

    target: the daemon that holds the models; None: this process does. compare: run directories of searches, or of other
    fits, to stand beside this one in the table.
    """
    recipe = Recipe.from_yaml(file)
    if recipe.surgery:
        from merge3.client.surgery import fit_with_surgery

        how = device, export, target, memory_budget, compare
        return fit_with_surgery(recipe, file, directory, resume, as_json, quiet, *how)
    check_learned(recipe, str(file))
    settings = located(read_fit(recipe.fit, f"{file}: fit"), Path(file).parent)
    taught = load_items(experts_of(recipe), settings, f"{file}: fit", LOSSES[Fit(recipe).method.loss].expert)
    others = {str(run): other_run(run) for run in compare}
    files = FitFiles(directory, resume)
    models, dtype = [str(model) for model in recipe.models()], recipe.out_dtype or recipe.dtype
    opened = open_models(models, dtype, device, quiet, target, memory_budget, None, recipe.tokenizer, recipe.tower)
    with closing(opened) as engine:
        found = {"learned items": items_hash(taught.learned), "held-out items": items_hash(taught.heldout)}
        files.begin(identity(recipe, engine.info().content_hashes, found))
        write_atomically(directory / "recipe.yaml", recipe.to_yaml())
        with StopOnInterrupt() as stopping:
            outcome = learned(engine, recipe, taught, files, stopping, as_json, quiet)
            if outcome is None:
                say_stopped(file, directory)
                return None
        fitted, history, seconds = outcome
        write_atomically(directory / "fitted.yaml", fitted.to_yaml())
        baselines = measured_baselines(engine, recipe, taught)
        if export and not (directory / "model").exists():
            engine.export(fitted, directory / "model")
    result = summary(recipe, taught, history, baselines, others, seconds)
    write_atomically(directory / "result.json", json.dumps(result, indent=2))
    write_fit_report(directory)
    return result


def load_items(models: Sequence[str], settings: FitSettings | SurgerySettings, where: str, matched: bool) -> Taught:
    """Items of every task, split as a search with the same seed splits them. models: the experts; matched: whether
    every task needs one, whose outputs are matched. Raises ItemsError or RecipeError."""
    if not settings.items:
        raise RecipeError(f"{where}.items", "none", "files of items, one for each task")
    if settings.system_instruction and not settings.apply_chat_template:
        raise RecipeError(f"{where}.system_instruction", "without apply_chat_template", "both, or neither")
    items: list[Item] = []
    experts: dict[str, str] = {}
    for at, entry in enumerate(settings.items):
        own = read_items(entry.items, entry.name)
        if entry.name is not None:
            own = [replace(item, task=entry.name) for item in own]
        model = _model_of(entry.model, at, len(settings.items), models, f"{where}.items[{at}].model")
        tasks = dict.fromkeys(item.task for item in own)
        if model is None and matched:
            expected = "the expert whose outputs are matched, as `model`; or as many files as models, in their order"
            raise RecipeError(f"{where}.items[{at}]", f"no model for task {', '.join(tasks)}", expected)
        for task in tasks:
            if task in experts and experts[task] != model:
                raise RecipeError(f"{where}.items[{at}]", f"task {task!r} is in another file too", "a task a file")
            if model is not None:
                experts[task] = model
        items += own
    _check_unique(items)
    learned, heldout = split_heldout(items, settings.heldout, seed_of("held-out", settings.seed))
    rng = np.random.default_rng(seed_of("limit", settings.seed))
    chosen: list[Item] = []
    for task in dict.fromkeys(item.task for item in learned):
        own = [item for item in learned if item.task == task]
        chosen += [own[i] for i in sorted(rng.permutation(len(own))[: settings.per_task])]
    chat = dict.fromkeys(experts, "") if settings.apply_chat_template else {}
    if settings.apply_chat_template:
        chat = {item.task: settings.system_instruction or "" for item in items}
    return Taught(chosen, heldout or learned, experts, chat)


def _model_of(said: str | None, at: int, files: int, models: Sequence[str], where: str) -> str | None:
    """The expert of a file: the one that is named, by its path or the last part of it, else the one in its place."""
    if said is None:
        return models[at] if files == len(models) else None
    for model in models:
        if said == model or Path(model).name == Path(said).name:
            return model
    raise RecipeError(where, f"found {said!r}", ", ".join(models))


def others_of(recipe: Recipe) -> list[str]:
    """Names of the models of any recipe, in order, without its base."""
    return [str(model) for model in recipe.models() if model != recipe.base_model]


def _check_unique(items: Sequence[Item]) -> None:
    seen: set[tuple[str, str]] = set()
    for item in items:
        if (item.task, item.id) in seen:
            raise ItemsError(f"task {item.task!r}", f"item id {item.id!r} twice", "unique ids within a task")
        seen.add((item.task, item.id))


def say_stopped(file: Path, directory: Path) -> None:
    """How a run that was interrupted goes on."""
    line = f"stopped; continue with: merge3-client fit {file} --run-dir {directory} --resume"
    print(line, file=sys.stderr)


def learned(engine: Engine, recipe: Recipe, taught: Taught, files: FitFiles, stopping, as_json: bool, quiet: bool):
    """(the fitted recipe, the history, seconds), or None when interrupted."""
    heads = own_heads(engine, taught)
    asked = Registration(tuple(taught.learned), heads=heads, chat=taught.chat)
    held = Registration(tuple(taught.heldout), heads=heads, chat=taught.chat)
    what = Fit(recipe, taught.experts)
    steps = what.settings.steps
    state = files.state()
    history = files.history(state.step if state else 0)
    began, fitted, replayed = time.perf_counter(), None, len(history)
    with chosen(as_json, quiet, steps, replayed) as report:
        if state is not None and state.step >= steps:
            fitted = Recipe.from_yaml(files.directory / "latest.yaml")
        for step in engine.fit(asked, what, state) if fitted is None else ():
            line: dict[str, Any] = {"step": step.number, "loss": step.loss, "losses": dict(step.losses)}
            every = what.settings.measured_every
            if step.number == steps or (every and step.number % every == 0):
                line["heldout"] = measure(engine, held, step.recipe)
            history.append(line)
            report(line)
            if step.state is not None:
                fitted = step.recipe
                write_atomically(files.directory / "latest.yaml", fitted.to_yaml())
                files.save(step.state, history)
                if stopping() and step.number < steps:
                    return None
    return fitted, history, time.perf_counter() - began


def own_heads(engine: Engine, taught: Taught) -> dict[str, str]:
    """Every task is answered by its own expert's head where endpoints have heads of their own; elsewhere there is
    one."""
    return dict(taught.experts) if engine.info().own_heads else {}


def measure(engine: Engine, held: Registration, subject: Subject) -> Measured:
    """Accuracy of one subject. Raises what keeps it from answering."""
    (evaluation,) = engine.evaluate(held, [subject])
    return measured(evaluation.answers(), held.items)


def measured_baselines(engine: Engine, recipe: Recipe, taught: Taught) -> dict[str, Measured]:
    """Held-out accuracy of the endpoints and the default merges; what has no answers is named and left out."""
    held = Registration(tuple(taught.heldout), heads=own_heads(engine, taught), chat=taught.chat)
    models = [str(model) for model in recipe.models()]
    names = short_names(models)
    subjects: list[tuple[str, Recipe | str]] = [(names[model], model) for model in models]
    base = None if recipe.base_model is None else str(recipe.base_model)
    for name, merge in default_merges(base, others_of(recipe), recipe.dtype, dict(recipe.tower)):
        subjects.append((name, replace(merge, tokenizer=recipe.tokenizer, chat_template=recipe.chat_template)))
    found = {}
    for name, subject in subjects:
        try:
            if isinstance(subject, Recipe):
                engine.check(subject)
            found[name] = measure(engine, held, subject)
        except (LogitsError, BadInput) as error:
            warnings.warn(f"baseline {name} is left out: {error}", Merge3Warning, stacklevel=2)
    return found


def other_run(run: Path) -> dict[str, Any]:
    """What another run's result.json says. Raises BadInput."""
    try:
        result = json.loads((run / "result.json").read_text())
        detail = result["heldout_detail"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput("--compare", f"no readable result.json in {run}", "a finished run directory") from None
    return {"detail": detail, "answers": result.get("item_answers"), "items": result.get("heldout_items")}


def summary(
    recipe: Recipe,
    taught: Taught,
    history: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, Measured],
    others: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """result.json."""
    what = Fit(recipe, taught.experts)
    settings = what.settings
    counts = Counter(item.task for item in taught.learned)
    each = sum(min(settings.batch, count) for count in counts.values())
    heldout = history[-1]["heldout"]
    passes = {"merges": settings.steps, "forward": settings.steps * each, "backward": settings.steps * each}
    if LOSSES[what.method.loss].expert:
        passes["forward of experts"] = len(taught.learned)
    return {
        "method": recipe.method,
        "models": [str(model) for model in recipe.models()],
        "seed": settings.seed,
        "heldout": heldout["accuracy"],
        "heldout_detail": heldout,
        "heldout_items": len(taught.heldout),
        "baselines": {name: detail["accuracy"] for name, detail in baselines.items()},
        "baselines_detail": dict(baselines),
        "best_baseline": max(baselines, key=lambda name: baselines[name]["accuracy"]),
        "learned_items": len(taught.learned),
        "labels": what.method.labels,
        "settings": settings.model_dump(mode="json"),
        "passes": passes,
        "item_answers": passes["forward"] + passes.get("forward of experts", 0),
        "losses": [line["loss"] for line in history],
        "others": dict(others),
        "seconds": seconds,
        "peak_memory": peak_memory(),
    }


def peak_memory() -> dict[str, int]:
    """Bytes that this process had at most, in memory and on a GPU."""
    import resource

    found = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.max_memory_allocated()
    return found


def print_fit(result: Mapping[str, Any], directory: Path) -> None:
    """The table a person reads at the end."""
    if "surgery" in result:
        from merge3.client.surgery import print_surgery

        return print_surgery(result, directory)
    from rich.console import Console

    from merge3.client.run import accuracy_table

    rows = [("fitted", result["heldout_detail"])]
    rows += [(name, other["detail"]) for name, other in result["others"].items()]
    rows += sorted(result["baselines_detail"].items(), key=lambda row: -row[1]["accuracy"])
    console = Console()
    console.print(accuracy_table(rows, result["heldout_items"], "the fit", "fitted"))
    gain = result["heldout"] - result["baselines"][result["best_baseline"]]
    passes, learned = result["passes"], "labelled" if result["labels"] else "unlabelled"
    console.print(
        f"{passes['merges']} steps over {result['learned_items']} {learned} items in {result['seconds']:.0f} s, "
        f"{gain:+.3f} over the best baseline ({result['best_baseline']})"
    )
    counted = ", ".join(f"{name} {count:,}" for name, count in passes.items())
    console.print(f"passes: {counted}; peak memory {result['peak_memory']['resident'] / 2**30:.2f} GiB")
    model = f"model {directory / 'model'}, " if (directory / "model").exists() else ""
    console.print(f"recipe {directory / 'fitted.yaml'}, {model}report {directory / 'report.html'}")


