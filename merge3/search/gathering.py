"""Answers that items are calibrated with: the endpoints' and those of random merges around the search's start."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from merge3.errors import BadInput, Merge3Warning
from merge3.irt import Responses, read_responses
from merge3.irt.responses import ResponsesError
from merge3.search.calibration import Calibration, calibrate
from merge3.search.calibration_files import load
from merge3.search.context import Progress, Search, under_way
from merge3.search.questions import Questions
from merge3.space import Space
from merge3.tasks import by_task, item_key, items_hash, keys_by_task


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
    return _given(path, groups, search)


def gather(search: Search, report: Callable[[int, int], None]) -> Responses | None:
    """Ask the endpoints and random merges their share of the items, as many at once as keep all workers busy; what is
    in the journal is not asked again.

    A merge that fails is left out. report(models done, models in all). None if `stop` asked to leave early.
    """
    settings, items = search.config.estimate, search.questions.search
    models = search.config.models
    seed, sigma = search.seed("calibration merges"), search.config.optimizer.sigma
    genomes = random_genomes(search.space, search.initial, settings.models, seed, sigma)
    subjects = [*((name, name) for name in models), *((f"random-{i}", genome) for i, genome in enumerate(genomes))]
    rng = np.random.default_rng(search.seed("calibration items"))
    share = max(1, round(settings.share * len(items)))
    positions = [np.sort(rng.permutation(len(items))[:share]) for _ in subjects]
    # The journal knows no paths.
    names = [f"model {number}" if number < len(models) else name for number, (name, _) in enumerate(subjects)]
    known = [search.journal.recall("calibration", *one) for one in zip(names, positions)]
    new = [number for number, answers in enumerate(known) if answers is None]
    questions = ((search.asks([items[i] for i in positions[number]]), subjects[number][1]) for number in new)
    with closing(search.engine.evaluate_each(questions, under_way(search.engine.info().workers))) as evaluations:
        for done, evaluation in enumerate(evaluations, len(subjects) - len(new) + 1):
            number = new[evaluation.index]
            one = names[number], positions[number]
            try:
                known[number] = search.journal.remember("calibration", *one, evaluation.answers)
            except BadInput:  # of what is no model's fault the run stops
                if number < len(models):
                    raise
            report(done, len(subjects))
            if search.stop():
                return None
    left = [number for number, answers in enumerate(known) if answers is not None]
    rows = np.full((len(left), len(items)), np.nan)
    for row, number in zip(rows, left):
        row[positions[number]] = known[number]
    return Responses(tuple(subjects[number][0] for number in left), tuple(map(item_key, items)), rows)


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


def digests(questions: Questions) -> dict[str, str]:
    """Task -> a digest of its search items and of how they are put: what a calibration was asked, order included.
    Images count by their names, wherever they lie."""
    found = {}
    for task, items in by_task(questions.search).items():
        items = [replace(item, image=Path(item.image).name) if item.image else item for item in items]
        asked = items_hash(items), questions.chat.get(task)
        found[task] = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
    return found


def _given(folder: Path, groups: dict[str, list[str]], search: Search) -> Calibration:
    """One made by `merge3-client calibrate`, which costs the run nothing. Of an earlier version items are compared by
    name alone."""
    found = load(folder)
    for task, keys in groups.items():
        if task not in found.banks or list(found.banks[task].items) != keys:
            other = f"a calibration of other items than the run's (task {task!r})"
            raise ResponsesError(folder, other, "one made with this configuration")
    if found.asked is None:
        line = "made by an earlier version, which does not say what its items and models held: nothing compares them"
        warnings.warn(f"{folder}: {line}", Merge3Warning, stacklevel=2)
    for task, digest in digests(search.questions).items():
        if found.asked and found.asked.get(task) != digest:
            other = f"made when the items of task {task!r}, or how they are put, were others"
            raise ResponsesError(folder, other, "one made with this configuration as it is")
    known, own = set(found.checkpoints or ()), set(search.engine.info().content_hashes.values())
    if known and not (known <= own or own <= known):  # some of the models, or more of them, are as good
        raise ResponsesError(folder, "made with other models than the run's", "one made with these checkpoints")
    return replace(found, answers=0)
