"""A search's winner, the models that went in and merges one would pick by hand, on items that no search saw."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from merge3.engine import LocalEngine, Subject
from merge3.errors import BadInput
from merge3.files import write_atomically
from merge3.fitness import mean_over_tasks
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.search.baselines import default_merges
from merge3.search.config import EvolveConfig
from merge3.tasks import Item, by_task

EVOLVED = "evolved"


def subjects(config: EvolveConfig, best: Path) -> dict[str, Subject]:
    """Name -> what answers: the winner, every model, the merges by hand of the experts and of all models alike."""
    genome = config.genome
    found: dict[str, Subject] = {EVOLVED: Recipe.from_yaml(best)}
    found |= {Path(model.rpartition("+")[2]).name: model for model in config.models}
    experts = [model for model in genome.models if model != genome.base_model]
    found |= default_merges(genome.base_model, experts)
    found |= default_merges(None, list(config.models))  # the base counts like an expert: half-way, where there is one
    return found


def compare(config: EvolveConfig, best: Path, items: Sequence[Item], metrics: Sequence[str]) -> dict[str, Any]:
    """{"rows": {name: {metric: {task: mean, "mean": over tasks, "stderr": its error, "behind", "behind_stderr": how far
    the winner is ahead, from differences item by item}}}, "items": {task: count}, "left_out": {name: why}}."""
    engine = LocalEngine(Pool.open(config.models[0], config.models[1:]))
    rows: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    first: dict[str, np.ndarray] = {}
    for name, subject in subjects(config, best).items():
        for metric in metrics:
            asked = Registration(tuple(replace(item, metric=metric) for item in items))
            try:
                (evaluation,) = engine.evaluate(asked, [subject])
                responses = evaluation.answers()
            except BadInput as error:
                left_out[name] = str(error)
                continue
            ahead = first.setdefault(metric, responses) - responses
            rows.setdefault(name, {})[metric] = summary(responses, ahead, items)
    counts = {task: len(own) for task, own in by_task(items).items()}
    return {"rows": rows, "items": counts, "left_out": left_out}


def summary(responses: np.ndarray, ahead: np.ndarray, items: Sequence[Item]) -> dict[str, float]:
    """Means by task and over tasks, with standard errors. ahead: the winner's responses less these."""
    found, variance = {}, 0.0
    tasks = np.array([item.task for item in items])
    names = list(by_task(items))
    for task in names:
        found[task] = float(responses[tasks == task].mean())
        variance += float(ahead[tasks == task].var()) / int((tasks == task).sum())
    value, stderr = mean_over_tasks(responses, items)
    behind = mean_over_tasks(ahead, items).value
    more = {"behind": behind, "behind_stderr": math.sqrt(variance) / len(names)}
    return found | {"mean": value, "stderr": stderr} | more


def table(result: dict[str, Any], metrics: Sequence[str], facts: str) -> str:
    """Markdown, the winner first and the others from the best to the worst by the first metric."""
    tasks, main = list(result["items"]), metrics[0]
    others = [f"mean {metric}" for metric in metrics[1:]]
    head = ["merge", *(f"{task}" for task in tasks), f"mean {main}", *others, "evolved is ahead by"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    rows = result["rows"]
    for name in sorted(rows, key=lambda n: (n != EVOLVED, -rows[n][main]["mean"])):
        row = rows[name][main]
        bold = "**" if name == EVOLVED else ""
        cells = [f"{bold}{name}{bold}", *(f"{row[task]:.3f}" for task in tasks)]
        cells += [f"{bold}{row['mean']:.3f}{bold} ± {row['stderr']:.3f}"]
        cells += [f"{rows[name][metric]['mean']:.3f}" for metric in metrics[1:]]
        cells += ["" if name == EVOLVED else f"{row['behind']:+.3f} ± {row['behind_stderr']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", facts, ""])


def save(folder: Path, result: dict[str, Any], text: str) -> None:
    """measured.json and table.md."""
    write_atomically(folder / "measured.json", json.dumps(result, indent=1))
    write_atomically(folder / "table.md", text)
