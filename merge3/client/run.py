"""From a configuration file to a finished run directory, embedded in this process."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from merge3.client.front import check_numbering, front_summary, print_front, write_front
from merge3.client.loggers import check_loggers
from merge3.client.progress import chosen
from merge3.client.report import write_report
from merge3.client.rounds import print_rounds, rounds_summary
from merge3.client.run_directory import MODEL, check_directory, export_result, is_export
from merge3.client.stopping import StopOnInterrupt
from merge3.client.terminal import bar, in_few_lines
from merge3.client.watched import Watched
from merge3.engine import Engine, LocalEngine
from merge3.errors import BadInput, ConfigError, Merge3Warning
from merge3.experts import Experts
from merge3.files import Held, write_atomically
from merge3.memory import enough_memory
from merge3.pool import Pool
from merge3.recipe import ModelRef, Recipe, Tokenizer
from merge3.search.compaction import told_of_experts
from merge3.search.config import EvolveConfig
from merge3.search.journal import Journal
from merge3.search.measure import items_name, unseen
from merge3.search.questions import Questions, load_questions
from merge3.search.run import Outcome, run

if TYPE_CHECKING:
    from merge3.client.channel import Target


def evolve(
    config: EvolveConfig,
    directory: Path,
    resume: bool = False,
    as_json: bool = False,
    quiet: bool = False,
    device: str = "cpu",
    export: bool = True,
    target: Target | None = None,
    memory_budget: str | None = None,
    pick: str | None = None,
    abreast: int | None = None,
) -> dict[str, Any] | None:
    """Search, measure, export, report. Returns result.json's content; None when interrupted by Ctrl-C.

    target: the daemon that holds the models; None: this process does. pick: of several objectives, which member of the
    front is exported; see Front.pick. abreast: see LocalEngine.
    """
    check_directory(directory, resume, export)
    check_numbering(directory, pick)
    if target is not None:
        _check_fitting(config)
    check_loggers(config.logging)
    questions = load_questions(config)  # bad items are found before any model is opened
    if config.fit is not None:
        from merge3.search.fit_first import first_fit

        first_fit(config, questions)
    watched = Watched(config, questions, directory, device, target)
    opened = open_engine(config, device, quiet, target, memory_budget, directory / "derived", abreast)
    with watched, closing(opened) as engine, Held(directory), closing(Journal(directory)) as journal:
        if not quiet:
            print(*questions.notes, questions.policy.why, sep="\n", file=sys.stderr)
        with StopOnInterrupt() as stopping, chosen(as_json, quiet) as report:
            begun = config, 0
            if config.fit is not None:
                from merge3.client.fit_first import fit_first

                begun = fit_first(config, questions, engine, journal, resume, quiet, as_json, stopping, pick)
            outcome = None
            if begun is not None:
                config, spent = begun
                told = watched.beside(report)
                outcome = run(config, questions, engine, journal, resume, told, stopping, pick, spent)
        if outcome is None:
            watched.end(None)
            print(
                f"stopped; continue with: merge3-client evolve CONFIG --run-dir {directory} --resume", file=sys.stderr
            )
            return None
        if outcome.front is not None:
            write_front(directory, config, outcome.front)
        result = summary(config, questions, outcome, pick)
        write_atomically(directory / "result.json", json.dumps(result, indent=2))
        if export:
            export_result(engine, outcome, directory, config.optimizer.seed)
        watched.end(result)
        write_report(directory)
    return result


def open_pool(
    models: Sequence[str],
    device: str = "cpu",
    quiet: bool = False,
    memory_budget: str | None = None,
    derived: Path | None = None,
    tokenizer: Tokenizer | None = None,
    tower: Mapping[str, str] | None = None,
    experts: str | Experts = "full",
) -> Pool:
    """Open every model, base first, read it once (hashes, statistics, NaN check) and say what is there.

    derived: where experts that a method derives of all others are kept for the next run (default: they are not).
    tokenizer: of every recipe to come; tower, experts: see Pool.open.
    """
    settings = {"memory_budget": memory_budget, "derived_folder": derived, "tokenizer": tokenizer, "tower": tower}
    settings["experts_as"] = experts
    pool = Pool.open(models[0], models[1:], device, **settings)
    if not quiet:
        print(pool.memory.describe(), file=sys.stderr)
        if pool.vocabulary is not None:
            print(pool.vocabulary.describe(), file=sys.stderr)
        if pool.device.type == "cpu" and torch.cuda.is_available():
            print("there is a GPU that this does not use: --device cuda", file=sys.stderr)
    _warn(pool.warnings)
    with enough_memory(pool.device):
        pool.read_all(lambda done, total: quiet or bar("reading models", done, total))
    _say_kept(pool.notes, pool.kept, quiet)
    return pool


def open_engine(
    config: EvolveConfig,
    device: str = "cpu",
    quiet: bool = False,
    target: Target | None = None,
    memory_budget: str | None = None,
    derived: Path | None = None,
    abreast: int | None = None,
) -> Engine:
    """A run's engine, in this process or on a daemon. derived: see open_pool; abreast: see LocalEngine."""
    genome = config.genome
    words = genome.recipe_tokenizer(), genome.tower, config.experts, abreast
    return open_models(config.models, genome.dtype, device, quiet, target, memory_budget, derived, *words)


def open_models(
    models: Sequence[str],
    dtype: str | None = None,
    device: str = "cpu",
    quiet: bool = False,
    target: Target | None = None,
    memory_budget: str | None = None,
    derived: Path | None = None,
    tokenizer: Tokenizer | None = None,
    tower: Mapping[str, str] | None = None,
    experts: str | None = None,
    abreast: int | None = None,
) -> Engine:
    """An engine over these models, base first, in this process or on a daemon. dtype: of the live model; abreast: see
    LocalEngine. The others: see open_pool."""
    if target is None:
        pool = open_pool(models, device, quiet, memory_budget, derived, tokenizer, tower, experts or "full")
        return LocalEngine(pool, getattr(torch, dtype) if dtype else None, abreast=abreast)
    if memory_budget is not None:
        raise BadInput(
            "--memory-budget",
            "given with --server",
            "one of them: the daemon has its own (merge3-server serve --memory-budget)",
        )
    if abreast is not None:
        raise BadInput("--abreast", "given with --server", "one of them: a daemon asks one candidate after the other")
    from merge3.client.remote import RemoteEngine

    engine = RemoteEngine(target, models, dtype, tokenizer=tokenizer, tower=tower, experts=experts or "")
    _warn(engine.info().warnings)
    _say_kept(engine.info().notes, engine.info().kept, quiet)
    return engine


def _check_fitting(config: EvolveConfig) -> None:
    """The driver measures which items are too long, once, so that all stages of a run see the same ones."""
    base = ModelRef.parse(config.models[0], "base_model").path
    asked = next((task.too_long for task in config.tasks if task.too_long != "error"), None)
    if asked is not None and not Path(base).is_dir():
        raise ConfigError(
            f"too_long: {asked}",
            f"no directory {base} here, only on the daemon",
            "the base's config.json and tokenizer files at this path on the driver's side too",
            "or items that all fit",
        )


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        warnings.warn(line, Merge3Warning, stacklevel=2)


def _say_kept(notes: Iterable[str], kept: dict[str, str], quiet: bool) -> None:
    if not quiet:
        for line in (*notes, *(f"kept from the base: {kept_line}" for kept_line in in_few_lines(kept))):
            print(line, file=sys.stderr)


def summary(config: EvolveConfig, questions: Questions, outcome: Outcome, pick: str | None = None) -> dict[str, Any]:
    """result.json. pick: see `evolve`."""
    baselines = {name: detail["accuracy"] for name, detail in outcome.baselines.items()}
    checks = outcome.checks if outcome.front is not None else [check[:5] for check in outcome.checks]
    found = {
        "heldout": outcome.heldout["accuracy"],
        "baselines": baselines,
        "best_baseline": max(baselines, key=baselines.get),
        "candidates": outcome.candidates,
        "failed": outcome.failed,
        "item_answers": outcome.ledger.total,
        "ledger": dataclasses.asdict(outcome.ledger) | {"total": outcome.ledger.total},
        "asked": outcome.policy._asdict(),
        "race": dataclasses.asdict(outcome.race) if outcome.race else None,
        "checks": {"made": checks, "drifted": outcome.drifted},
        "seconds": outcome.seconds,
        "swap_share": outcome.swap_share,
        "search_value": outcome.best.value,  # of the search alone; the race's is in `race`
        "search_stderr": None if math.isnan(outcome.best.stderr) else outcome.best.stderr,
        "recipe_hash": outcome.best.recipe_hash,
        "heldout_items": len(questions.heldout or questions.search),
        "heldout_name": items_name(questions.heldout) if questions.heldout else "",
        "measured_on": "held-out items" if questions.heldout else "the search's own items: none were held out",
        "heldout_detail": outcome.heldout,
        "baselines_detail": outcome.baselines,
        "method": ", then ".join([config.genome.merge_method, *(stage.space for stage in config.stages[1:])]),
        "models": list(config.models),
        "seed": config.optimizer.seed,
        "skipped": questions.skipped,  # task -> items that were too long
        "truncated": questions.truncated,
    }
    if outcome.compaction is not None:
        found["experts"] = outcome.compaction.told()
    if outcome.rounds:
        found["rounds"] = rounds_summary(config, outcome)
        found["race_of_rounds"] = outcome.between and dataclasses.asdict(outcome.between)
    return found if outcome.front is None else found | {"front": front_summary(outcome.front, outcome, pick)}


def print_result(result: dict[str, Any], directory: Path) -> None:
    """The table a person reads at the end."""
    from rich.console import Console

    rows = [("evolved", result["heldout_detail"])]
    rows += sorted(result["baselines_detail"].items(), key=lambda row: -row[1]["accuracy"])
    console = Console()
    if "front" in result:
        print_front(result["front"], console, unseen(result))
    if "rounds" in result:
        print_rounds(result["rounds"], result["race_of_rounds"], console)
    items = result["heldout_items"]
    title = "" if unseen(result) else f"accuracy on the {items} items of the search itself: none were held out"
    console.print(accuracy_table(rows, items, "the search", "evolved", title=title))
    gain = result["heldout"] - result["baselines"][result["best_baseline"]]
    console.print(
        f"{result['candidates']} candidates in {result['seconds']:.0f} s, "
        f"{gain:+.3f} over the best baseline ({result['best_baseline']}); "
        f"merging took {100 * result['swap_share']:.1f} % of the time"
    )
    ledger = result["ledger"]
    stages = ("fit", "calibration", "search", "checks", "elites", "race")
    parts = ", ".join(f"{name} {ledger[name]:,}" for name in stages if ledger.get(name))
    console.print(
        f"item answers: {ledger['total']:,} ({parts}); a search on all items would take {ledger['full']:,}, "
        f"{ledger['full'] / max(1, ledger['total']):.1f} times as many"
    )
    for line in told_of_experts(result):
        console.print(line)
    if result["race"] and result["race"]["rounds"]:
        end = "settled" if result["race"]["settled"] else "not settled: items or budget ran out"
        console.print(f"final race: {' → '.join(map(str, result['race']['rounds']))} left, {end}")
    exported = is_export(directory / MODEL, Recipe.from_yaml(directory / "best.yaml"))
    model = f"model {directory / MODEL}, " if exported else ""
    console.print(f"recipe {directory / 'best.yaml'}, {model}report {directory / 'report.html'}")


def accuracy_table(
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    items: int,
    unseen_by: str,
    ours: str,
    further: Mapping[str, Sequence[str]] | None = None,
    title: str = "",
):
    """(name, accuracy with its tasks) of several merges as a table of rich's; the row `ours` stands out. unseen_by: who
    never saw the items; empty where nobody learned. further: column -> what it says of each row. title: another one."""
    from rich.table import Table

    tasks = list(rows[0][1]["tasks"])
    further = further or {}
    heldout = f"held-out accuracy, {items} items {unseen_by} never saw"
    table = Table(title=title or (heldout if unseen_by else f"accuracy on {items} items"))
    table.add_column("merge")
    for name in ("mean", "± se", *tasks, *further):
        table.add_column(name, justify="right")
    for at, (name, detail) in enumerate(rows):
        of_tasks = [f"{detail['tasks'][t]:.3f}" if t in detail["tasks"] else "" for t in tasks]
        cells = [f"{detail['accuracy']:.3f}", f"{detail['stderr']:.3f}", *of_tasks]
        cells += [column[at] for column in further.values()]
        table.add_row(name, *cells, style="bold" if name == ours else None)
    return table
