"""The search: ask, evaluate, journal, tell; then measure the winner on items it never saw.

Resume is replay: the optimizer is rebuilt from its seed and told the journal's fitness again, and
candidates of an unfinished generation that are already answered are not asked twice. Nothing here
knows whether the engine is in this process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from merge3 import __version__
from merge3.checkpoint.layout import Layout
from merge3.engine import Engine, mean_over_tasks
from merge3.errors import ConfigError, ResumeMismatch
from merge3.files import write_atomically
from merge3.methods import METHODS
from merge3.recipe import Recipe
from merge3.search import optimizers
from merge3.search.baselines import default_merges
from merge3.search.config import EvolveConfig
from merge3.search.store import Candidate, RunStore
from merge3.space import Space
from merge3.tasks import Item, items_hash, read_items, split_heldout


@dataclass(frozen=True)
class Questions:
    """search: what candidates may be asked; subset: what each is asked; heldout: never seen by the search."""

    search: list[Item]
    subset: list[Item]
    heldout: list[Item]
    weights: dict[str, float]
    heads: dict[str, str]


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
    heldout: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, Any] = field(default_factory=dict)


def load_questions(config: EvolveConfig) -> Questions:
    """Read, split and subset the items of every task."""
    items, weights, heads = [], {}, {}
    for task in config.tasks:
        own = read_items(task.items, task.name)
        if task.name is not None:
            own = [replace(item, task=task.name) for item in own]
        if task.metric is not None and task.metric != "acc,none":  # mergekit-evolve's default for lm-eval
            own = [replace(item, metric=task.metric) for item in own]
        items += own
        weights.update({item.task: task.weight for item in own})
        if task.head:
            heads.update({item.task: task.head for item in own})
    seen = set()
    for item in items:
        if (item.task, item.id) in seen:
            raise ConfigError(f"task {item.task!r}", f"item id {item.id!r} twice", "unique ids within a task")
        seen.add((item.task, item.id))
    seed = config.optimizer.seed
    search, heldout = split_heldout(items, config.heldout.fraction, seed)
    subset = search
    if config.limit is not None:
        subset = _per_task(subset, config.limit, None)
    if config.extract.method == "random":
        subset = _per_task(subset, config.extract.size, np.random.default_rng(seed))
    return Questions(search, subset, heldout, weights, heads)


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
    started = store.begin(_identity(config, engine, space, questions))
    if started and not resume:
        raise ResumeMismatch(store.directory, "this run has begun", "a new directory", "continue it with --resume")
    write_atomically(store.directory / "config.yaml", config.to_yaml())
    report(Progress(stage="statistics", budget=config.optimizer.budget))
    engine.register(space, questions.subset, questions.heads, questions.weights)
    best = _search(config, engine, space, questions, store, report, stop)
    if best is None:
        return None
    candidates = store.candidates()
    recipe = space.recipe(best.genome)
    write_atomically(store.directory / "best.yaml", best_yaml(recipe, config))
    seconds = sum(c.seconds for c in candidates)
    outcome = Outcome(
        best, recipe, len(candidates), sum(c.error is not None for c in candidates),
        len(candidates) * len(questions.subset), seconds,
        sum(c.swap_seconds for c in candidates) / seconds if seconds else 0.0,
    )  # fmt: skip
    measured = questions.heldout or questions.search
    report(Progress(stage="held-out", done=len(candidates), budget=config.optimizer.budget, best=best.value))
    outcome.heldout = _measure(engine, recipe, measured, questions.weights)
    for name, what in _baselines(config, engine):
        outcome.baselines[name] = _measure(engine, what, measured, questions.weights)
    return outcome


def best_yaml(recipe: Recipe, config: EvolveConfig) -> str:
    """The winner as a mergekit recipe."""
    seed = config.optimizer.seed
    head = f"# found by merge3 {__version__} ({config.optimizer.name}, seed {seed})\n"
    if METHODS[recipe.method].stochastic:
        head += f"# random keeps: the searched model is `merge3-client merge best.yaml OUT --seed {seed}`\n"
    return head + recipe.to_yaml()


def _search(config, engine, space, questions, store, report, stop) -> Candidate | None:
    settings = config.optimizer
    low, high = space.bounds()
    start = space.initial()
    if config.random_init:
        start = np.random.default_rng(settings.seed).uniform(*(np.where(np.isfinite(b), b, d) for b, d in ((low, 0), (high, 1))))
    optimizer = optimizers.make(settings.name, start, low, high, settings.sigma, settings.population, settings.seed)
    progress = Progress(budget=settings.budget, full_answers=settings.budget * len(questions.search))
    best, began, generation = None, time.perf_counter(), 0
    while progress.done < settings.budget:
        genomes = optimizer.ask()
        genomes = genomes[: settings.budget - progress.done]
        answered = store.generation(generation)
        _check_replay(store, answered, genomes, generation)
        for candidate in [answered[p] for p in sorted(answered)]:
            best = _note(progress, candidate, best, len(questions.subset), replayed=True)
        pending = [p for p in range(len(genomes)) if p not in answered]
        for evaluation in engine.evaluate([genomes[p] for p in pending]):
            position = pending[evaluation.index]
            candidate = Candidate(
                generation, position, genomes[position], evaluation.recipe_hash, evaluation.responses, evaluation.value,
                evaluation.stderr, evaluation.seconds, evaluation.swap_seconds, "local", evaluation.error,
            )  # fmt: skip
            store.append(candidate)
            answered[position] = candidate
            best = _note(progress, candidate, best, len(questions.subset))
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
        if len(genomes) == optimizer.population:  # a last, shorter generation has nothing to teach
            optimizer.tell(genomes, fitness)
        generation += 1
    return best


def _note(progress: Progress, candidate: Candidate, best: Candidate | None, items: int, replayed=False) -> Candidate | None:
    progress.done += 1
    progress.replayed += replayed
    progress.item_answers += items
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
        "merge3": __version__, "cma": metadata.version("cma"), "numpy": np.__version__,
        "genome": space.definition.hash(),
        "optimizer": config.optimizer.model_dump_json(),
        "search items": items_hash(questions.subset), "held-out items": items_hash(questions.heldout),
        "config": config.hash(),
    }  # fmt: skip
    return identity | {f"checkpoint {name}": digest for name, digest in info.content_hashes.items()}


def _measure(engine: Engine, what: Recipe | str, items: list[Item], weights: dict[str, float]) -> dict[str, Any]:
    """Accuracy on items: {"accuracy", "stderr", "tasks": {task: accuracy}}."""
    responses = engine.answer(what, items)
    value, stderr = mean_over_tasks(responses, items, weights)
    tasks = {}
    for task in dict.fromkeys(item.task for item in items):
        tasks[task] = float(np.mean([r for r, item in zip(responses, items) if item.task == task]))
    return {"accuracy": value, "stderr": stderr, "tasks": tasks}


def _baselines(config: EvolveConfig, engine: Engine):
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


def _per_task(items: list[Item], size: int, rng: np.random.Generator | None) -> list[Item]:
    chosen = []
    for task in dict.fromkeys(item.task for item in items):
        own = [item for item in items if item.task == task]
        at = range(min(size, len(own))) if rng is None else sorted(rng.permutation(len(own))[:size])
        chosen += [own[i] for i in at]
    return chosen
