"""What a study's answers come to: accuracies as shares of each task's own expert, with intervals.

Intervals are a bootstrap over items and subsets together, DRAWS times. Items: every item's id has an exponential weight
(Rubin 1981), the same in all tasks, cells and worlds that ask an item of this id, and the expert that a share is of is
weighed alike: differences are paired. Subsets: of the k that were drawn, k - 1 are drawn again, which makes variances
right for few of them (Rao & Wu 1988); all there are, where none was left out, are not. Worlds are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from merge3.client.study_cells import Questions, key_of
from merge3.client.study_config import StudyConfig, World, subsets_of
from merge3.client.study_findings import findings, interval
from merge3.client.study_journal import StudyJournal, unpacked
from merge3.tasks import places_by_task

DRAWS = 1000
METRICS = ("heldin", "heldout")


@dataclass(frozen=True)
class Numbers:
    """grid: (world, method, number of experts) -> metric -> float64 [1 + DRAWS], the value itself first."""

    config: StudyConfig
    grid: Mapping[tuple[str, str, int], Mapping[str, np.ndarray]]
    base: Mapping[str, np.ndarray]  # world -> its base's accuracy over the experts' tasks, the same


def summary(config: StudyConfig, questions: Mapping[str, Questions], journal: StudyJournal) -> dict[str, Any]:
    """result.json: "worlds", "cells", "means" (each with intervals), "findings"."""
    weights = item_weights(questions, config.seed)
    worlds, cells, base, values = [], [], {}, {}
    for world in config.worlds:
        asked = questions[world.name]
        tasks = _Tasks(asked, weights)
        alone = {line["model"]: line["responses"] for line in journal.lines("model", world.name)}
        own = {task: tasks.of_one(task, unpacked(alone[task])) for task in world.experts}
        of_base = tasks.of_all(unpacked(alone[""]))
        base[world.name] = np.mean([of_base[task] for task in world.experts], axis=0)
        units = own | {task: of_base[task] for task in asked.heldout}
        worlds.append(_told(world, asked, own, of_base))
        for line in journal.lines("method", world.name):
            cell = {key: line[key] for key in ("world", "method", "subset", "parameters", "seconds")}
            if "error" in line:
                cells.append(cell | {"error": line["error"]})
                continue
            found = tasks.of_all(unpacked(line["responses"]))
            values[key_of(line)] = shares = {
                "heldin": _share(found, units, line["subset"]),
                "heldout": _share(found, units, asked.outside(world, line["subset"])),
            }
            told = {name: _number(value[0]) for name, value in shares.items()}
            cells.append(cell | told | {"tasks": {task: float(value[0]) for task, value in found.items()}})
    told = Numbers(config, _grid(config, values), base)
    return {
        "worlds": worlds,
        "cells": cells,
        "means": [_mean(key, told.grid[key], cells) for key in told.grid],
        "findings": findings(told),
        "methods": [method.label for method in config.methods],
        "experts": list(config.experts),
        "subsets": config.subsets,
        "seed": config.seed,
        "draws": DRAWS,
    }


def item_weights(questions: Mapping[str, Questions], seed: int) -> dict[str, np.ndarray]:
    """Id -> float64 [1 + DRAWS], the first 1."""
    ids = sorted({item.id for asked in questions.values() for item in asked.measured})
    drawn = np.random.default_rng([seed, 6]).exponential(size=(len(ids), 1 + DRAWS))
    drawn[:, 0] = 1
    return dict(zip(ids, drawn))


class _Tasks:
    """The measured items of a world, a matrix of weights for each task: columns sum to 1."""

    def __init__(self, asked: Questions, weights: Mapping[str, np.ndarray]):
        self.positions = places_by_task(asked.measured)
        self.weights = {}
        for task, positions in self.positions.items():
            own = np.stack([weights[asked.measured[at].id] for at in positions])
            self.weights[task] = own / own.sum(0)

    def of_one(self, task: str, responses: np.ndarray) -> np.ndarray:
        """Accuracy, float64 [1 + DRAWS], of responses to this task's items alone."""
        return responses @ self.weights[task]

    def of_all(self, responses: np.ndarray) -> dict[str, np.ndarray]:
        """Of every task, from responses to all items."""
        return {task: self.of_one(task, responses[at]) for task, at in self.positions.items()}


def _share(found: Mapping[str, np.ndarray], units: Mapping[str, np.ndarray], tasks: Sequence[str]) -> np.ndarray:
    """The mean over tasks of accuracy as a share of a unit; NaN of no task."""
    if not tasks:
        return np.full(1 + DRAWS, np.nan)
    return np.mean([found[task] / units[task] for task in tasks], axis=0)


def _grid(config: StudyConfig, values: Mapping[tuple, Mapping[str, np.ndarray]]) -> dict[tuple, dict[str, np.ndarray]]:
    """Means over subsets, those weighed as each draw has them. A cell without answers is no part of a mean."""
    grid = {}
    for world in config.worlds:
        for count in config.experts:
            subsets = subsets_of(list(world.experts), count, config.subsets, config.seed)
            more = math.comb(len(world.experts), count) > len(subsets)
            drawn = subset_weights(subsets, more, config.seed)
            for method in config.methods:
                found = [values.get((world.name, method.label, subset)) for subset in subsets]
                grid[world.name, method.label, count] = {metric: _weighed(found, metric, drawn) for metric in METRICS}
    return grid


def subset_weights(subsets: Sequence[tuple[str, ...]], again: bool, seed: int) -> np.ndarray:
    """float64 [subsets, 1 + DRAWS]. again: whether they are drawn anew; the same draws for equal numbers of experts."""
    count = len(subsets)
    weights = np.ones((count, 1 + DRAWS))
    if again and count > 1:
        rng = np.random.default_rng([seed, 7, len(subsets[0])])
        weights[:, 1:] = rng.multinomial(count - 1, np.full(count, 1 / count), size=DRAWS).T
    return weights


def _weighed(found: Sequence[Mapping[str, np.ndarray] | None], metric: str, weights: np.ndarray) -> np.ndarray:
    there = [i for i, values in enumerate(found) if values is not None and not np.isnan(values[metric][0])]
    if not there:
        return np.full(1 + DRAWS, np.nan)
    values, own = np.stack([found[i][metric] for i in there]), weights[there]
    with np.errstate(invalid="ignore"):  # a draw of subsets that have no answers
        return (values * own).sum(0) / own.sum(0)


def _mean(key: tuple[str, str, int], found: Mapping[str, np.ndarray], cells: Sequence[Mapping]) -> dict[str, Any]:
    world, method, count = key
    own = [c for c in cells if (c["world"], c["method"], len(c["subset"])) == key and "error" not in c]
    return {
        "world": world,
        "method": method,
        "experts": count,
        "subsets": len(own),
        **{metric: interval(found[metric]) for metric in METRICS},
    }


def _told(world: World, asked: Questions, own: Mapping, of_base: Mapping) -> dict[str, Any]:
    """What result.json says of a world. base_share: what merging nothing would keep of the experts."""
    experts = {task: float(value[0]) for task, value in own.items()}
    return {
        "name": world.name,
        "width": world.width,
        "quality": world.quality,
        "heldout": list(asked.heldout),
        "base": interval(np.mean([of_base[task] for task in world.experts], axis=0)),
        "base_share": interval(_share(of_base, own, tuple(world.experts))),
        "base_tasks": {task: float(value[0]) for task, value in of_base.items()},
        "experts": experts,
        "items": len(asked.measured),
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
