"""`merge3-client fit`: from a recipe with `fit:` to a finished run directory."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge3.client.fit_files import FitFiles, identity
from merge3.client.fit_items import Taught, load_items
from merge3.client.fit_page import FitPage
from merge3.client.fit_progress import chosen
from merge3.client.fit_report import write_fit_report
from merge3.client.fit_result import baselines, measure, other_run, summary
from merge3.client.rewriting import PAGE, Rewriting
from merge3.client.run import open_models
from merge3.client.stopping import StopOnInterrupt
from merge3.engine import Engine
from merge3.errors import BadInput, RecipeError
from merge3.files import Held, write_atomically
from merge3.learn.fit import Fit, check_learned, experts_of, merged_with
from merge3.learn.losses import LOSSES, check_labels
from merge3.learn.settings import located, read_fit
from merge3.methods import ZIPPED
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.tasks import Item, items_hash

if TYPE_CHECKING:
    from merge3.client.channel import Target


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
    if recipe.method in ZIPPED:
        from merge3.client.zip import fit_zip

        for option, given in (("--server", target), ("--memory-budget", memory_budget)):
            if given is not None:
                raise BadInput(option, f"given with {recipe.method}", "a zip in this process, both models in memory")
        return fit_zip(recipe, file, directory, resume, as_json, quiet, device, export, compare)
    if recipe.surgery:
        from merge3.client.surgery import fit_with_surgery

        how = device, export, target, memory_budget, compare
        return fit_with_surgery(recipe, file, directory, resume, as_json, quiet, *how)
    check_learned(recipe, str(file))
    settings = located(read_fit(recipe.fit, f"{file}: fit"), Path(file).parent)
    if settings.heldout == 0:
        found = "found 0, and nothing would say what the fit is worth"
        raise RecipeError(f"{file}: fit.heldout", found, "a share of every task's items")
    taught = load_items(recipe, settings, f"{file}: fit")
    check_possible(recipe, taught, target, f"{file}: fit", directory)
    others = {str(run): other_run(run, taught.heldout) for run in compare}
    files = FitFiles(directory, resume)
    with Held(directory):
        with StopOnInterrupt() as stopping:
            run = Run(recipe, taught, files, device, target, memory_budget, quiet, as_json, stopping)
            outcome = fitted_host(run)
        if outcome is None:
            return say_stopped(file, directory)
        fitted = outcome.recipe
        with closing(outcome.engine) as engine:
            write_atomically(directory / "fitted.yaml", fitted.to_yaml())
            files.tell(outcome.history)  # of groups it is the last one's
            held = registration(taught.heldout, outcome.taught, engine.info().own_heads)
            measurement = measure(engine, held, fitted)
            if export and not (directory / "model").exists():
                engine.export(fitted, directory / "model")
            beside = {} if outcome.elsewhere else baselines(engine, recipe, held)
        if outcome.elsewhere:
            with closing(run.open(recipe)) as engine:
                held = registration(taught.heldout, taught, engine.info().own_heads)
                beside = baselines(engine, recipe, held)
        cost = {"merges": outcome.steps, "items": outcome.asked}
        result = summary(recipe, taught, outcome.history, cost, measurement, beside, others, outcome.seconds)
        write_atomically(directory / "result.json", json.dumps(result, indent=2))
        write_fit_report(directory)
        return result


def say_stopped(file: Path, directory: Path) -> None:
    """How a run that was interrupted goes on."""
    line = f"stopped; continue with: merge3-client fit {file} --run-dir {directory} --resume"
    print(line, file=sys.stderr)


def fitted_recipe(file: Path, as_json: bool = False, quiet: bool = False) -> Recipe:
    """What a recipe with `fit:` is fitted to, where nothing else of the run is wanted."""
    recipe = Recipe.from_yaml(file)
    check_learned(recipe, str(file))
    if recipe.surgery:
        found = f"`surgery:` in a recipe of {recipe.method}, to be fitted too"
        raise RecipeError(f"{file}: surgery", found, "a recipe without", "`merge3-client fit RECIPE`")
    if Fit(recipe).method.survivors:
        expected = "`merge3-client fit`, whose run directory keeps them"
        raise RecipeError(f"{file}: merge_method", f"{recipe.method} makes experts of its own", expected)
    settings = located(read_fit(recipe.fit, f"{file}: fit"), Path(file).parent)
    taught = load_items(recipe, settings, f"{file}: fit")
    check_possible(recipe, taught, None, f"{file}: fit", Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix="merge3-fit-") as folder:
        files = FitFiles(Path(folder), resume=False)
        outcome = fitted_host(Run(recipe, taught, files, "cpu", None, None, quiet, as_json, lambda: False))
        with closing(outcome.engine):
            return outcome.recipe


def check_possible(recipe: Recipe, taught: Taught, target: Target | None, where: str, directory: Path) -> None:
    """Raises RecipeError for what only this process can do, asked of a daemon, and for groups that cannot be; BadInput
    for a directory whose models no recipe could name, ItemsError for items without the labels that are learned."""
    what = Fit(recipe)
    check_labels(LOSSES[what.method.loss], taught.learned)
    if (what.method.survivors or what.settings.groups is not None) and set("+@") & set(str(directory.resolve())):
        found = f"{str(directory)!r}, where models are made, and recipes read + and @ in a path as more than that"
        raise BadInput("--run-dir", found, "a path without them")
    if target is not None and what.method.survivors:
        raise RecipeError(where, f"{recipe.method} with --server", "a fit in this process: it makes experts of its own")
    if target is not None and what.settings.groups is not None:
        expected = "a fit in this process: every group opens models of its own"
        raise RecipeError(f"{where}.groups", "with --server", expected)
    if what.settings.groups is not None and LOSSES[what.method.loss].expert:
        found = f"with {recipe.method}, which asks every expert at every level"
        raise RecipeError(f"{where}.groups", found, "another method, or no groups")
    if what.settings.groups is None:
        return
    if what.method.survivors:
        raise RecipeError(f"{where}.groups", f"with {recipe.method}", "adamerging, or no groups")
    expected = "its expert, as `model`; or as many files as models, in their order"
    for task in dict.fromkeys(item.task for item in taught.learned):
        if task not in taught.experts:
            raise RecipeError(f"{where}.items", f"no model for task {task!r}, and there are groups", expected)
    experts = experts_of(recipe)
    for expert in experts:
        if expert not in taught.experts.values():
            found = f"none of {expert}, and there are groups"
            raise RecipeError(f"{where}.items", found, "items of every expert's task")
    if len(experts) < 2:
        raise RecipeError(f"{where}.groups", "with one expert", "at least two, or no groups")


@dataclass(frozen=True)
class Run:
    """A fit on its way. stopping: whether it was asked to stop. more: name -> hash of items for what is fitted
    afterwards."""

    recipe: Recipe
    taught: Taught
    files: FitFiles
    device: str
    target: Target | None
    memory_budget: str | None
    quiet: bool
    as_json: bool
    stopping: Callable[[], bool]
    more: Mapping[str, str] = field(default_factory=dict)

    def open(self, recipe: Recipe, memory_budget: str | None = None) -> Engine:
        """An engine over a recipe's models."""
        models, dtype = [str(model) for model in recipe.models()], recipe.out_dtype or recipe.dtype
        settings = self.device, self.quiet, self.target, memory_budget or self.memory_budget
        return open_models(models, dtype, *settings, None, recipe.tokenizer, recipe.tower)


@dataclass(frozen=True)
class Outcome:
    """What was fitted. engine: over its models, open; elsewhere: whether these are not those that the run was asked
    for; taught: with the models' names there. steps, asked: merges that were asked, and items that were fed forward and
    backward, in all; seconds: that they took, also before the run was continued."""

    recipe: Recipe
    history: list[dict[str, Any]]
    engine: Engine
    taught: Taught
    steps: int
    asked: int
    seconds: float
    elsewhere: bool = False


def fitted_host(run: Run) -> Outcome | None:
    """A learned recipe's fit, whatever is fitted on top of it; None when interrupted."""
    recipe, what = run.recipe, Fit(run.recipe)
    if what.settings.groups is not None:
        from merge3.client.fit_groups import fit_groups

        return fit_groups(run)
    if what.method.survivors:
        return _over_survivors(run)
    engine = run.open(recipe)
    begin(run, engine.info().content_hashes)
    return learned(engine, recipe, run.taught, run, engine.info().own_heads)


def _over_survivors(run: Run) -> Outcome | None:
    from merge3.learn.survivors import write_survivors

    recipe, folder = run.recipe, run.files.directory / "survivors"
    with closing(run.open(recipe)) as whole:
        begin(run, whole.info().content_hashes)
        made = write_survivors(recipe, whole.pool, Fit(recipe).settings.trim, folder)
    del whole  # its models are not needed while weights are learned
    gc.collect()
    places = dict(zip(experts_of(recipe), experts_of(made)))
    taught = replace(run.taught, experts={task: places[model] for task, model in run.taught.experts.items()})
    engine = run.open(made)
    outcome = learned(engine, made, taught, run, engine.info().own_heads)
    return outcome and replace(outcome, elsewhere=True)


def begin(run: Run, hashes: Mapping[str, str]) -> None:
    """Write down what this is a run of, or compare with what is there. hashes: of every endpoint's contents."""
    found = {"learned items": items_hash(run.taught.learned), "held-out items": items_hash(run.taught.heldout)}
    places = {str(model): place for place, model in enumerate(run.recipe.models())}
    found["experts"] = json.dumps({task: places.get(expert) for task, expert in run.taught.experts.items()})
    run.files.begin(identity(run.recipe, hashes, found | dict(run.more)))
    write_atomically(run.files.directory / "recipe.yaml", run.recipe.to_yaml())


def learned(engine: Engine, recipe: Recipe, taught: Taught, run: Run, own_heads: bool) -> Outcome | None:
    """A fit of one recipe; None when interrupted, and the engine is closed. own_heads: see PoolInfo."""
    files = run.files
    _check_heads(taught, own_heads)
    # What the export and the measuring at the end would refuse is refused now.
    engine.check(merged_with(recipe, dict.fromkeys(experts_of(recipe), float(Fit(recipe).settings.start))))
    asked, held = (registration(items, taught, own_heads) for items in (taught.learned, taught.heldout))
    for question in (asked, held):
        if question.items:
            engine.prepare(question, recipe)
    what = Fit(recipe, taught.experts if LOSSES[Fit(recipe).method.loss].expert else {})
    steps, every = what.settings.steps, what.settings.measured_every
    counts = Counter(item.task for item in taught.learned)
    each = sum(min(what.settings.batch, count) for count in counts.values())
    state = files.state()
    history = files.history(state.step if state else 0)
    if state is not None and state.step >= steps:
        return Outcome(files.latest(recipe), history, engine, taught, steps, steps * each, files.seconds)
    fitted, before, began = None, files.seconds if state is not None else 0.0, time.perf_counter()
    look = FitPage(recipe.method, steps, history)
    with chosen(run.as_json, run.quiet, steps, len(history)) as report, Rewriting(files.directory / PAGE, look) as page:
        told = lambda line: run.quiet or print(line, file=sys.stderr)
        for step in engine.fit(asked, what, state, told):
            line: dict[str, Any] = {"step": step.number, "loss": step.loss, "losses": dict(step.losses)}
            if held.items and (step.number == steps or (every and step.number % every == 0)):
                line["heldout"] = measure(engine, held, step.recipe)
            history.append(line)
            report(line)
            if step.state is not None:
                fitted = step.recipe
                files.save(step.state, history, fitted, before + time.perf_counter() - began)
                page.begin()  # not before there is something to keep: a directory without it counts as empty
                if run.stopping() and step.number < steps:
                    page.end("stopped")
                    engine.close()
                    return None
    return Outcome(fitted, history, engine, taught, steps, steps * each, files.seconds)


def _check_heads(taught: Taught, own_heads: bool) -> None:
    for task in dict.fromkeys(item.task for item in taught.learned):
        if own_heads and task not in taught.experts:
            expected = "whose head answers, as `model`; or as many files as models, in their order"
            where = f"no model for task {task!r}, and every expert has a head of its own"
            raise RecipeError("fit: items", where, expected)


def registration(items: Sequence[Item], taught: Taught, own_heads: bool) -> Registration:
    """Every task is answered by its own expert's head where endpoints have heads of their own."""
    return Registration(tuple(items), heads=dict(taught.experts) if own_heads else {}, chat=taught.chat)
