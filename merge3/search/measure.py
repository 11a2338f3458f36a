"""Accuracy on items that the search never saw: of the winner, the endpoints, and the merges one would pick by hand."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from merge3.engine import Subject
from merge3.errors import BadInput
from merge3.fitness import estimates, mean_over_tasks
from merge3.recipe import Recipe
from merge3.search.baselines import default_merges
from merge3.search.context import Search
from merge3.search.journal import Candidate
from merge3.tasks import Item, LogitsError, items_hash

STAGE = "held-out"  # in the journal
# {"accuracy", "stderr", "tasks": {task: accuracy}}; of several objectives "objectives": {name: [value, stderr]} too
Measured = dict[str, Any]
Baseline = tuple[str, Recipe | str]  # its name, and the recipe or endpoint


def remembered(search: Search, name: str, subject: Subject, items: Sequence[Item]) -> np.ndarray:
    """A subject's answers to all of the items a run ends with, the journal's where it has them: float64 [.., items], as
    `Search.read` reads them. name: in the journal, which knows no paths; of a candidate see `name_of`. Raises
    LogitsError where it has no answers."""
    ask = search.answered if search.fronts else search.answers
    found = search.journal.remember(STAGE, name, range(len(items)), lambda: ask(subject, items))
    return found.reshape(-1, len(items))


def name_of(candidate: Candidate) -> str:
    """A candidate's, in the journal."""
    return f"{candidate.generation}-{candidate.position}"


def measure(search: Search, name: str, subject: Subject, items: Sequence[Item]) -> Measured:
    """Accuracy of one subject, as it is exported. name: see `remembered`. Raises LogitsError if it has no answers."""
    subject = search.exported(subject)
    return detailed(search, remembered(search, name, subject, items), items, subject)


def detailed(search: Search, answers: np.ndarray, items: Sequence[Item], subject: Subject) -> Measured:
    """What a subject's answers come to, of several objectives their values too. answers: as they are `remembered`."""
    found = measured(search.read(answers, len(items)).responses, items, search.weights)
    return found | ({"objectives": valued(search, answers, items, subject)} if search.fronts else {})


def valued(search: Search, answers: np.ndarray, items: Sequence[Item], subject: Subject) -> dict[str, list[float]]:
    """Objective -> [value, standard error] of a subject's answers, as `Search.answered` gives them."""
    pairs = zip(*estimates(search.asks(items), search.read(answers, len(items), subject)))
    return {name: [float(value), float(stderr)] for name, (value, stderr) in zip(search.objectives, pairs)}


def measured(responses: np.ndarray, items: Sequence[Item], weights: Mapping[str, float] | None = None) -> Measured:
    """Accuracy of responses, float64 [items]. weights: of tasks, default equal."""
    value, stderr = mean_over_tasks(responses, items, weights)
    tasks = {}
    for task in dict.fromkeys(item.task for item in items):
        tasks[task] = float(np.mean([r for r, item in zip(responses, items) if item.task == task]))
    return {"accuracy": value, "stderr": stderr, "tasks": tasks}


def measure_all(search: Search, baselines: Sequence[Baseline], items: Sequence[Item]) -> dict[str, Measured] | None:
    """Accuracy of every baseline that has answers; one without is named and left out, as the search has its winner.
    None if stopped. Raises LogitsError if none has."""
    found: dict[str, Measured] = {}
    for number, (name, subject) in enumerate(baselines, 1):
        if search.stop():
            return None
        known_as = f"model {search.config.models.index(subject)}" if isinstance(subject, str) else name
        try:
            found[name] = measure(search, known_as, subject, items)
        except LogitsError as error:
            if number == len(baselines) and not found:
                raise
            warnings.warn(f"baseline {name} is left out: {error}", stacklevel=2)
    return found


def possible_baselines(search: Search) -> list[Baseline]:
    """The baselines that these models allow; a default merge that they do not is named once, and left out."""
    found = []
    for name, subject in _baselines(search):
        try:
            if isinstance(subject, Recipe):
                search.engine.check(subject)
        except BadInput as error:
            warnings.warn(f"baseline {name} is left out: {error}", stacklevel=2)
            continue
        found.append((name, subject))
    return found


def _baselines(search: Search) -> Iterator[Baseline]:
    genome, models = search.config.genome, search.config.models
    experts = [m for m in genome.models if m != genome.base_model]
    merges = dict(default_merges(genome.base_model, experts, genome.dtype, genome.tower))
    names = short_names(models, merges)
    for model in models:
        yield names[model], model
    definition = search.space.definition
    for name, recipe in merges.items():
        yield name, replace(recipe, tokenizer=definition.tokenizer, chat_template=definition.chat_template)


def short_names(models: Sequence[str], taken: Collection[str] = ()) -> dict[str, str]:
    """The last part of each path, or the whole where that is not unique, or taken by another row."""
    last = [*(Path(m).name for m in models), *taken]
    return {m: n if last.count(n) == 1 else m for m, n in zip(models, last)}


def unseen(result: Mapping[str, Any]) -> bool:
    """Whether result.json's numbers are of items that the search never saw; with none held out they are of its own."""
    return result.get("heldout_name") != ""


def items_name(items: Sequence[Item]) -> str:
    """Names a set of items whatever their order: measurements of the same can stand side by side."""
    return items_hash(sorted(items, key=lambda item: (item.task, item.id)))
