"""Before a search: learn the items from a few models, choose which to ask, and how answers become accuracy.

Calibration models are the endpoints and random merges around the search's start; a response file can
take their place. Every task has its own item bank, because a merge's abilities differ between tasks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from merge3.engine import Engine
from merge3.errors import ConfigError, Merge3Error
from merge3.files import write_atomically
from merge3.fitness import TaskEstimator
from merge3.irt import ItemBank, Responses, read_responses, write_responses
from merge3.irt import estimation as irt
from merge3.irt.diagnostics import plot
from merge3.irt.extraction import Subset, extract
from merge3.irt.fitting import fit
from merge3.irt.responses import ResponsesError
from merge3.search.config import Estimate, EvolveConfig
from merge3.search.store import RunStore
from merge3.space import Space
from merge3.tasks import Item


@dataclass(frozen=True)
class Calibration:
    """Per task: the responses and the bank fitted to them. endpoints: names of rows that are endpoints;
    answers: what it cost."""

    responses: dict[str, Responses]
    banks: dict[str, ItemBank]
    endpoints: tuple[str, ...]
    answers: int


def item_key(item: Item) -> str:
    """An item's name among all tasks', as response files have it."""
    return f"{item.task}/{item.id}"


def by_task(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Items of each task, in order."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.task, []).append(item)
    return groups


def random_genomes(space: Space, count: int, seed: int, sigma: float) -> list[np.ndarray]:
    """Merges around the search's start, up to two and a half of its steps away: the abilities that a
    search will meet, not those of merges that collapse."""
    low, high = space.bounds()
    span = np.where(np.isfinite(high - low), high - low, 1.0)
    rng = np.random.default_rng(seed)
    start = space.initial()
    return [np.clip(start + rng.normal(size=len(start)) * span * sigma * rng.uniform(0, 2.5), low, high) for _ in range(count)]


def gather(
    engine: Engine, space: Space, items: Sequence[Item], models: Sequence[str], config: EvolveConfig, store: RunStore | None,
    report: Callable[[int, int], None] = lambda done, total: None, stop: Callable[[], bool] = lambda: False,
) -> Responses | None:  # fmt: skip
    """Ask the endpoints and random merges their share of the items; what is in the journal is not asked
    again. A merge that fails is left out. None if `stop` asked to leave early."""
    settings, seed = config.estimate, config.optimizer.seed
    genomes = random_genomes(space, settings.models, seed + 1, config.optimizer.sigma)
    subjects: list[tuple[str, object]] = [(name, name) for name in models]
    subjects += [(f"random-{i}", genome) for i, genome in enumerate(genomes)]
    names, rows = [], []
    rng = np.random.default_rng(seed + 2)
    for done, (name, what) in enumerate(subjects):
        stored = f"model {done}" if done < len(models) else name  # the journal knows no paths
        positions = np.sort(rng.permutation(len(items))[: max(1, round(settings.share * len(items)))])
        ask = lambda what=what, positions=positions: engine.answer(
            what if isinstance(what, str) else space.recipe(what), [items[i] for i in positions]
        )
        try:
            answers = store.remember("calibration", stored, positions, ask) if store else ask()
        except Merge3Error:
            if name in models:
                raise
            continue
        row = np.full(len(items), np.nan)
        row[positions] = answers
        names.append(name)
        rows.append(row)
        report(done + 1, len(subjects))
        if stop():
            return None
    return Responses(tuple(names), tuple(map(item_key, items)), np.array(rows))


def calibrate(
    responses: Responses, groups: dict[str, list[str]], endpoints: Sequence[str], dimensions: int = 1, seed: int = 0,
    cost: int | None = None, report: Callable[[str, int, int], None] = lambda task, step, steps: None,
) -> Calibration:  # fmt: skip
    """Fit a bank per task. groups: task -> keys of its items. cost: answers, default all that are there.

    Raises ResponsesError where the responses do not reach a task's items.
    """
    own, banks = {}, {}
    for task, keys in groups.items():
        own[task] = responses.only(keys, f"responses: task {task!r}")
        progress = lambda step, steps, _, task=task: report(task, step, steps)
        try:
            banks[task] = fit(own[task], dimensions, seed=seed, progress=progress)
        except ResponsesError as error:
            hint = error.hint or "or search without calibration: `estimate: {method: mean}`"
            raise ResponsesError(f"task {task!r}: {error.where}", error.found, error.expected, hint) from None
    answers = int(responses.answered.sum()) if cost is None else cost
    return Calibration(own, banks, tuple(endpoints), answers)


def given(path: str | Path, items: Sequence[Item], endpoints: Sequence[str], settings: Estimate, seed: int) -> Calibration:
    """A calibration that costs the run nothing: a response file, or a folder made by `save`."""
    groups = {task: [item_key(i) for i in group] for task, group in by_task(items).items()}
    if not Path(path).is_dir():
        return calibrate(read_responses(path), groups, endpoints, settings.dimensions, seed, cost=0)
    found = load(path)
    for task, keys in groups.items():
        if task not in found.banks or list(found.banks[task].items) != keys:
            raise ResponsesError(path, f"a calibration of other items than the run's (task {task!r})", "one made with this configuration")
    return replace(found, answers=0)


def key_groups(responses: Responses) -> dict[str, list[str]]:
    """Items by the task before the first slash of their keys; one task where there is none."""
    groups: dict[str, list[str]] = {}
    for key in responses.items:
        groups.setdefault(key.partition("/")[0] if "/" in key else "all", []).append(key)
    return groups


def save(calibration: Calibration, directory: str | Path) -> None:
    """Write responses.csv, a bank and a diagnostic picture per task, and calibration.json, last."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    models = tuple(dict.fromkeys(m for r in calibration.responses.values() for m in r.models))
    keys = tuple(k for r in calibration.responses.values() for k in r.items)
    values, column = np.full((len(models), len(keys)), np.nan), 0
    for responses in calibration.responses.values():
        rows = [models.index(m) for m in responses.models]
        values[rows, column : column + len(responses.items)] = responses.values
        column += len(responses.items)
    write_responses(Responses(models, keys, values), directory / "responses.csv")
    for number, (task, bank) in enumerate(calibration.banks.items()):
        bank.save(directory, f"bank-{number}")
        plot(bank, calibration.responses[task], directory / f"diagnostics-{number}.png", task)
    described = {"tasks": list(calibration.banks), "endpoints": calibration.endpoints, "answers": calibration.answers}
    write_atomically(directory / "calibration.json", json.dumps(described, indent=1))


def load(directory: str | Path) -> Calibration:
    """Read what `save` wrote. Raises ResponsesError naming what is missing or damaged."""
    path = Path(directory) / "calibration.json"
    try:
        described = json.loads(path.read_text())
        tasks, endpoints, answers = (described[k] for k in ("tasks", "endpoints", "answers"))
    except (OSError, ValueError, KeyError) as error:
        raise ResponsesError(path, f"{type(error).__name__}: {error}"[:200], "a folder made by `merge3-client calibrate`") from None
    banks = {task: ItemBank.load(directory, f"bank-{number}") for number, task in enumerate(tasks)}
    responses = read_responses(Path(directory) / "responses.csv")
    own = {task: responses.only(bank.items).rows(bank.models) for task, bank in banks.items()}
    return Calibration(own, banks, tuple(endpoints), answers)


def choose(
    calibration: Calibration, items: Sequence[Item], method: str, size: int, estimator: str, seed: int, anywhere: bool = False
) -> tuple[list[Item], TaskEstimator]:
    """(the items to ask, what makes accuracy of the answers); `size` per task, all of a smaller task."""
    subsets, estimators = subsets_of(calibration, method, size, seed, anywhere), {}
    chosen = []
    for task, group in by_task(items).items():
        bank, responses = calibration.banks[task], calibration.responses[task]
        estimators[task] = irt.prepare(bank, responses, subsets[task], estimator, calibration.endpoints)
        chosen += [group[i] for i in subsets[task].index]
    return chosen, TaskEstimator(estimators)


def subsets_of(calibration: Calibration, method: str, size: int, seed: int, anywhere: bool = False) -> dict[str, Subset]:
    """`size` items of every task, all of a smaller one."""
    return {
        task: extract(bank, calibration.responses[task], method, min(size, len(bank.items)), seed + 1000 * n, calibration.endpoints, anywhere)
        for n, (task, bank) in enumerate(calibration.banks.items())
    }


def assumptions(config: EvolveConfig, items: Sequence[Item]) -> tuple[str, str, str]:
    """(extract method, estimate method, why), with `auto` decided: calibration must cost less than it saves."""
    how, what = config.extract.method, config.estimate.method
    groups = by_task(items)
    saved = config.optimizer.budget * sum(max(0, len(g) - config.extract.size) for g in groups.values())
    cost = (len(config.models) + config.estimate.models) * config.estimate.share * len(items)
    worth = config.estimate.calibration != "auto" or saved > 2 * cost
    if how == "auto" and what in ("auto", "mean"):
        how = ("irt" if what == "auto" else "random") if worth else "all"
    elif how == "auto":
        how = "irt"
    if what == "auto":
        what = "mean" if how in ("all", "random") else "gmp-irt"
    if how in ("irt", "correctness", "entropy", "information") and what == "mean":
        raise ConfigError(
            "estimate.method", f"mean with extract.method {how}", "an estimator that weighs chosen items", "gmp-irt, or extract: random"
        )
    size = config.extract.size
    if what == "mean":
        why = f"candidates answer {'all items' if how == 'all' else f'{size} random items per task'}; fitness is their mean"
        if how == "all" and not worth and config.extract.method == "auto":
            why += " (too few items or candidates for calibration to pay)"
        return how, what, why
    source = "random merges and the endpoints" if config.estimate.calibration == "auto" else config.estimate.calibration
    return how, what, f"candidates answer {size} items per task chosen by `{how}`; fitness is `{what}`, calibrated on {source}"
