"""The search: ask, evaluate, journal, tell; then measure the winner on items it never saw.

Resume is replay: the optimizer is rebuilt from its seed and told the journal's fitness again, and
candidates of an unfinished generation that are already answered are not asked twice. Nothing here
knows whether the engine is in this process.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from merge3 import __version__
from merge3.checkpoint.layout import Layout
from merge3.engine import Engine
from merge3.errors import BadInput, ConfigError, ResumeMismatch
from merge3.files import write_atomically
from merge3.fitness import mean_over_tasks
from merge3.methods import METHODS
from merge3.recipe import Recipe
from merge3.search import optimizers
from merge3.search.asking import check, prepare, renew
from merge3.search.baselines import default_merges
from merge3.search.config import EvolveConfig
from merge3.search.questions import Questions, load_questions
from merge3.search.race import Contender, Race, race
from merge3.search.store import Candidate, RunStore
from merge3.space import Space, SpaceDefinition
from merge3.tasks import Item, LogitsError, items_hash


@dataclass
class Progress:
    """Told to `report` after every candidate."""

    generation: int = 0
    done: int = 0
    budget: int = 0
    best: float = float("nan")
    best_stderr: float = float("nan")
    mean: float = float("nan")
    item_answers: int = 0
    full_answers: int = 0
    failed: int = 0
    seconds: float = 0.0
    replayed: int = 0
    stage: str = "search"


@dataclass(frozen=True)
class Ledger:
    """Item answers spent, by what for, and what a search on all items would have taken."""

    calibration: int
    search: int
    checks: int
    race: int
    full: int

    @property
    def total(self) -> int:
        return self.calibration + self.search + self.checks + self.race


@dataclass
class Outcome:
    """What a finished search found."""

    best: Candidate
    recipe: Recipe
    candidates: int
    failed: int
    item_answers: int
    seconds: float
    swap_share: float
    assumed: tuple[str, str, str]
    ledger: Ledger
    race: Race | None
    checks: list[tuple[int, float, float, float, float]]
    drifted: list[int]
    heldout: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, Any] = field(default_factory=dict)


def run(
    config: EvolveConfig,
    engine: Engine,
    layout: Layout,
    store: RunStore,
    resume: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome | None:
    """Search to the end of the budget. None if `stop` asked to leave early (the journal has it all).

    Raises ResumeMismatch if the directory holds another run, or this one without `resume`.
    """
    questions = load_questions(config)
    space = Space(config.genome.definition(), layout)
    # What merging, asking or exporting would refuse at the end is refused now.
    report(Progress(stage="statistics", budget=config.optimizer.budget))
    engine.register(space, [*questions.search, *questions.heldout], questions.heads, questions.weights)
    engine.check(space.uniform_recipe())
    baselines = _possible(config, engine)
    started = store.begin(_identity(config, engine, space, questions))
    if started and not resume:
        raise ResumeMismatch(store.directory, "this run has begun", "a new directory", "continue it with --resume")
    write_atomically(store.directory / "config.yaml", config.to_yaml())
    calibrating = lambda done, total: report(Progress(stage="calibration", done=done, budget=total))
    asking = prepare(
        config, engine, space, questions.search, questions.subset, questions.heads, questions.weights, questions.assumed,
        store, calibrating, stop,
    )  # fmt: skip
    if asking is None:
        return None
    optimizer = _search(config, engine, space, questions, asking, store, report, stop)
    if optimizer is None:
        return None
    candidates = store.candidates()
    ranked = _ranked(candidates, optimizer)
    best = ranked[0][0]
    report(Progress(stage="race", done=len(candidates), budget=config.optimizer.budget, best=best.value, best_stderr=best.stderr))
    answers = sum(len(c.responses) for c in candidates if c.responses is not None)
    found = _race(config, engine, space, questions, asking, store, ranked, answers, stop)
    if stop():
        return None
    if found is not None:
        best = found[0]
    recipe = space.recipe(best.genome)
    write_atomically(store.directory / "best.yaml", best_yaml(recipe, config))
    seconds = sum(c.seconds for c in candidates)
    ledger = Ledger(
        asking.calibration.answers if asking.calibration else 0, answers, store.answers("check"), store.answers("race"),
        config.optimizer.budget * len(questions.search),
    )  # fmt: skip
    outcome = Outcome(
        best, recipe, len(candidates), sum(c.error is not None for c in candidates), ledger.total, seconds,
        sum(c.swap_seconds for c in candidates) / seconds if seconds else 0.0,
        asking.assumed, ledger, found[1] if found else None, asking.checks, asking.drifted,
    )  # fmt: skip
    measured = questions.heldout or questions.search
    report(Progress(stage="held-out", done=len(candidates), budget=config.optimizer.budget, best=best.value))
    outcome.heldout = _measure(engine, recipe, measured, questions.weights)
    outcome.baselines = _measured(engine, baselines, measured, questions.weights)
    return outcome


def best_yaml(recipe: Recipe, config: EvolveConfig) -> str:
    """The winner as a mergekit recipe."""
    seed = config.optimizer.seed
    head = f"# found by merge3 {__version__} ({config.optimizer.name}, seed {seed})\n"
    if METHODS[recipe.method].stochastic:
        head += f"# random keeps: the searched model is `merge3-client merge best.yaml OUT --seed {seed}`\n"
    return head + recipe.to_yaml()


def _ranked(candidates: list[Candidate], optimizer: optimizers.Optimizer) -> list[tuple[Candidate, float, float]]:
    """(candidate, value, stderr) by value, the optimizer's where it has any; of equals the earliest, and no recipe twice."""
    known = list({c.recipe_hash: c for c in reversed(candidates) if not math.isnan(c.value)}.values())
    believed = optimizer.beliefs([c.genome for c in known])
    values, stderrs = believed if believed else ([c.value for c in known], [c.stderr for c in known])
    ranked = zip(known, map(float, values), map(float, stderrs))
    return sorted(ranked, key=lambda r: (-r[1], r[0].generation, r[0].position))


def _race(config, engine, space, questions, asking, store, ranked, answers, stop) -> tuple[Candidate, Race] | None:
    """The best candidates race on items that the last subset leaves out. None where there is nothing to settle."""
    top = ranked[: config.race.candidates]
    last = max(ranked, key=lambda r: (r[0].generation, r[0].position))  # the distribution's mean races whatever its value
    if config.optimizer.name == "cma" and last not in top:
        top = [*top[:-1], last]
    open_ = asking.unseen()
    if len(top) < 2 or not open_:
        return None
    items = [asking.search[i] for i in open_]
    contenders = [Contender(f"{c.generation}-{c.position}", value, stderr) for c, value, stderr in top]

    def ask(c: int, positions: list[int]) -> np.ndarray:
        where = [open_[i] for i in positions]
        return store.remember("race", f"{contenders[c].name} from item {where[0]}", where, lambda: answers_of(c, where))

    def answers_of(c: int, where: list[int]) -> np.ndarray:
        try:
            return engine.answer(space.recipe(top[c][0].genome), [asking.search[i] for i in where])
        except LogitsError:  # it answered all it was asked before; what it cannot answer now it has not solved
            return np.zeros(len(where))

    budget = int(config.race.share * answers)
    found = race(contenders, items, ask, config.extract.size, budget, questions.weights, config.optimizer.seed, stop)
    return top[found.winner][0], found


def _search(config, engine, space, questions, asking, store, report, stop) -> optimizers.Optimizer | None:
    """Spend the budget; the optimizer as it was left. None if stopped."""
    settings = config.optimizer
    low, high = space.bounds()
    start = space.initial()
    if config.random_init:
        start = np.random.default_rng(settings.seed).uniform(*(np.where(np.isfinite(b), b, d) for b, d in ((low, 0), (high, 1))))
    assisted = asking.assumed[0] != "all" if settings.surrogate == "auto" else settings.surrogate
    optimizer = optimizers.make(settings.name, start, low, high, settings.sigma, settings.population, settings.seed, assisted)
    spent = asking.calibration.answers if asking.calibration else 0
    progress = Progress(budget=settings.budget, item_answers=spent, full_answers=settings.budget * len(questions.search))
    best, began, generation, renewed, where = None, time.perf_counter(), 0, False, engine.info().where
    while progress.done < settings.budget:
        genomes = optimizer.ask()
        genomes = genomes[: settings.budget - progress.done]
        if progress.done + len(genomes) == settings.budget and (favorite := optimizer.favorite()) is not None:
            genomes[-1] = favorite  # the search's last word is its distribution's mean
        answered = store.generation(generation)
        _check_replay(store, answered, genomes, generation)
        for candidate in [answered[p] for p in sorted(answered)]:
            best = _note(progress, candidate, best, replayed=True)
        pending = [p for p in range(len(genomes)) if p not in answered]
        if pending and renewed:  # a replayed generation asks nothing
            engine.register(space, asking.subset, questions.heads, questions.weights, asking.estimator)
            renewed = False
        for evaluation in engine.evaluate([genomes[p] for p in pending]):
            position = pending[evaluation.index]
            candidate = Candidate(
                generation, position, genomes[position], evaluation.recipe_hash, evaluation.responses, evaluation.value,
                evaluation.stderr, evaluation.seconds, evaluation.swap_seconds, where, evaluation.error,
            )  # fmt: skip
            store.append(candidate)
            answered[position] = candidate
            best = _note(progress, candidate, best)
            progress.generation, progress.seconds = generation, time.perf_counter() - began
            report(progress)
            if stop():
                return None
        fitness = [answered[p].value for p in range(len(genomes))]
        known = [f for f in fitness if not math.isnan(f)]
        if not known:
            raise ConfigError(
                f"generation {generation}", f"every candidate failed ({answered[0].error})", "at least one that can be evaluated"
            )
        progress.mean = float(np.mean(known))
        optimizer.tell(genomes, fitness, [answered[p].stderr for p in range(len(genomes))])
        generation += 1
        if progress.done < settings.budget and _renewal(config, asking, engine, space, questions, store, generation, genomes, answered):
            renew(asking, config)
            renewed = True
    return optimizer


def _renewal(config, asking, engine, space, questions, store, generation, genomes, answered) -> bool:
    """Whether the next generation is asked other items: by schedule, or because a spot check says so."""
    drifted, every = False, config.estimate.check_every
    if asking.estimator is not None and every and generation % every == 0:
        drifted = check(asking, config, engine, space, questions.weights, store, generation - 1, genomes, answered)
    scheduled = asking.assumed[0] != "all" and config.extract.renew and generation % config.extract.renew == 0
    return drifted or bool(scheduled)


def _note(progress: Progress, candidate: Candidate, best: Candidate | None, replayed=False) -> Candidate | None:
    progress.done += 1
    progress.replayed += replayed
    progress.item_answers += 0 if candidate.responses is None else len(candidate.responses)
    progress.failed += candidate.error is not None
    # Ties go to the earlier candidate, so that a resumed run has the same winner.
    if not math.isnan(candidate.value) and (best is None or candidate.value > best.value):
        best = candidate
        progress.best, progress.best_stderr = best.value, best.stderr
    return best


def _check_replay(store: RunStore, answered: dict[int, Candidate], genomes: Sequence[np.ndarray], generation: int) -> None:
    for position, candidate in answered.items():
        if position >= len(genomes) or not np.array_equal(candidate.genome, genomes[position]):
            raise ResumeMismatch(
                store.directory, f"candidate {position} of generation {generation} is not what the optimizer asks now",
                "the libraries (cma, numpy) the run began with",
            )  # fmt: skip


def _identity(config: EvolveConfig, engine: Engine, space: Space, questions: Questions) -> dict[str, str]:
    """What must be equal for a journal to be continued."""
    info = engine.info()
    identity = {
        "merge3": __version__, "cma": metadata.version("cma"), "numpy": np.__version__, "scipy": metadata.version("scipy"),
        "genome": _placeless(space.definition, config).hash(),
        "optimizer": config.optimizer.model_dump_json(),
        "search items": items_hash(questions.search), "held-out items": items_hash(questions.heldout),
        "config": config.hash(),
    }  # fmt: skip
    # By place, not by path: a folder that was moved is the same run.
    return identity | {f"checkpoint {i}": info.content_hashes[name] for i, name in enumerate(info.endpoints)}


def _placeless(definition: SpaceDefinition, config: EvolveConfig) -> SpaceDefinition:
    """The definition with places for paths."""
    place = {model: f"model {i}" for i, model in enumerate(config.models)}
    of = lambda model: place.get(model, model)
    return replace(
        definition, models=tuple(map(of, definition.models)), base=of(definition.base), tokenizer_source=of(definition.tokenizer_source)
    )


def _measure(engine: Engine, what: Recipe | str, items: list[Item], weights: dict[str, float]) -> dict[str, Any]:
    """Accuracy on items: {"accuracy", "stderr", "tasks": {task: accuracy}}."""
    responses = engine.answer(what, items)
    value, stderr = mean_over_tasks(responses, items, weights)
    tasks = {}
    for task in dict.fromkeys(item.task for item in items):
        tasks[task] = float(np.mean([r for r, item in zip(responses, items) if item.task == task]))
    return {"accuracy": value, "stderr": stderr, "tasks": tasks}


def _measured(engine: Engine, baselines, items: list[Item], weights: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Accuracy of every baseline that has answers; one without is named and left out, as the search has its winner.
    Raises LogitsError if none has."""
    found: dict[str, dict[str, Any]] = {}
    for number, (name, what) in enumerate(baselines, 1):
        try:
            found[name] = _measure(engine, what, items, weights)
        except LogitsError as error:
            if number == len(baselines) and not found:
                raise
            warnings.warn(f"baseline {name} is left out: {error}", stacklevel=2)
    return found


def _possible(config: EvolveConfig, engine: Engine) -> list[tuple[str, Recipe | str]]:
    """The baselines that these models allow; a default merge that they do not is named once, and left out."""
    found = []
    for name, what in _baselines(config):
        try:
            if isinstance(what, Recipe):
                engine.check(what)
        except BadInput as error:
            warnings.warn(f"baseline {name} is left out: {error}", stacklevel=2)
            continue
        found.append((name, what))
    return found


def _baselines(config: EvolveConfig):
    """(name, endpoint or recipe)"""
    genome = config.genome
    names = _short_names(config.models)
    for model in config.models:
        yield names[model], model
    experts = [m for m in genome.models if m != genome.base_model]
    yield from default_merges(genome.base_model, experts, genome.dtype)


def _short_names(models: Sequence[str]) -> dict[str, str]:
    """The last part of each path, or the whole where that is not unique."""
    last = [Path(m).name for m in models]
    return {m: n if last.count(n) == 1 else m for m, n in zip(models, last)}
