"""Answers that items are calibrated with: the endpoints' and those of random merges around the search's start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from merge3.errors import BadInput
from merge3.irt import Responses, read_responses
from merge3.irt.responses import ResponsesError
from merge3.search.calibration import Calibration, calibrate
from merge3.search.calibration_files import load
from merge3.search.context import Progress, Search
from merge3.space import Space
from merge3.tasks import item_key, keys_by_task


def calibrated(search: Search) -> Calibration | None:
    """The run's calibration, as `estimate.calibration` says: asked for now, or given. None if `stop` asked to leave."""
    settings, seed = search.config.estimate, search.config.optimizer.seed
    groups = keys_by_task(search.questions.search)
    if settings.calibration == "auto":
        told = lambda done, total: search.report(Progress(stage="calibration", done=done, budget=total))
        responses = gather(search, told)
        if responses is None:
            return None
        return calibrate(responses, groups, search.config.models, settings.dimensions, seed)
    path = Path(settings.calibration)
    if not path.is_dir():
        return calibrate(read_responses(path), groups, search.config.models, settings.dimensions, seed, cost=0)
    return _given(path, groups)


def gather(search: Search, report: Callable[[int, int], None]) -> Responses | None:
    """Ask the endpoints and random merges their share of the items; what is in the journal is not asked again.

    A merge that fails is left out. report(models done, models in all). None if `stop` asked to leave early.
    """
    settings, items = search.config.estimate, search.questions.search
    models = search.config.models
    seed, sigma = search.seed("calibration merges"), search.config.optimizer.sigma
    genomes = random_genomes(search.space, search.initial, settings.models, seed, sigma)
    subjects = [*((name, name) for name in models), *((f"random-{i}", genome) for i, genome in enumerate(genomes))]
    names, rows = [], []
    rng = np.random.default_rng(search.seed("calibration items"))
    for done, (name, subject) in enumerate(subjects):
        stored = f"model {done}" if done < len(models) else name  # the journal knows no paths
        positions = np.sort(rng.permutation(len(items))[: max(1, round(settings.share * len(items)))])
        asked = [items[i] for i in positions]
        ask = lambda subject=subject, asked=asked: search.answers(subject, asked)
        try:
            answers = search.journal.remember("calibration", stored, positions, ask)
        except BadInput:  # of what is no model's fault the run stops
            if name in models:
                raise
            continue
        row = np.full(len(items), np.nan)
        row[positions] = answers
        names.append(name)
        rows.append(row)
        report(done + 1, len(subjects))
        if search.stop():
            return None
    return Responses(tuple(names), tuple(map(item_key, items)), np.array(rows))


def random_genomes(space: Space, start: np.ndarray, count: int, seed: int, sigma: float) -> list[np.ndarray]:
    """Merges around the search's start [size], up to two and a half of its steps away: the abilities that a
    search will meet, not those of merges that collapse."""
    low, high = space.bounds()
    span = np.where(np.isfinite(high - low), high - low, 1.0)
    rng = np.random.default_rng(seed)
    genomes = []
    for _ in range(count):
        step = rng.normal(size=len(start)) * span * sigma * rng.uniform(0, 2.5)
        genomes.append(np.clip(start + step, low, high))
    return genomes


def _given(folder: Path, groups: dict[str, list[str]]) -> Calibration:
    """One made by `merge3-client calibrate`, which costs the run nothing."""
    found = load(folder)
    for task, keys in groups.items():
        if task not in found.banks or list(found.banks[task].items) != keys:
            other = f"a calibration of other items than the run's (task {task!r})"
            raise ResponsesError(folder, other, "one made with this configuration")
    return Calibration(found.responses, found.banks, found.endpoints, answers=0)
