"""What a zip is worth beside each model, the average and the other way of matching, and what a person reads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merge3.client.fit_result import peak_memory
from merge3.client.zip_work import Done, Work
from merge3.errors import ItemsError, Merge3Warning
from merge3.learn.zip import same_question
from merge3.learn.zip_file import FILE
from merge3.methods.zipped import ZIPPED
from merge3.search.measure import Measured, items_name, measured
from merge3.tasks import Scorer, by_task


def _answers(ready: Work, models: Mapping[str, torch.nn.Module]) -> Measured | None:
    """Held-out accuracy, every task asked of its own model's result; None where none can be asked. Tasks that a model
    has no labels for are left out."""
    taught, responses, answered = ready.asked.taught, [], []
    names = dict(zip((str(model) for model in ready.asked.recipe.models()), ready.asked.names))
    folders = dict(zip(ready.asked.names, ready.folders))
    for task, items in by_task(taught.heldout).items():
        name = names.get(taught.experts.get(task, ""))
        if name is None and len({id(model) for model in models.values()}) == 1:
            name = next(iter(models))
        if name is None:
            found = f"task {task} is not measured: no model for it, and two results"
            warnings.warn(f"{found} (`model` in `fit: items` says whose it is)", Merge3Warning, stacklevel=2)
        model = models.get(name)
        if model is None:
            continue
        system = taught.chat.get(task)
        try:
            found = Scorer(items, model, folders[name], system is not None, system=system or "").score(model)
        except ItemsError as error:
            warnings.warn(f"task {task} is not measured: {error}", Merge3Warning, stacklevel=2)
            continue
        responses.append(found)
        answered += items
    return measured(np.concatenate(responses), answered) if answered else None


def _table(ready: Work, done: Done) -> tuple[dict[str, Measured], dict[str, Measured]]:
    """(the zip, what stands beside it), by name; without what has no answers."""
    asked = ready.asked
    ours = {asked.row.name: _answers(ready, done.models)}
    beside = {}
    for name, model in zip(asked.names, ready.models):
        if same_question(ready.models):
            beside[name] = _answers(ready, dict.fromkeys(asked.names, model))
        else:
            beside[name] = _answers(ready, {name: model})
    for row in ZIPPED.values():
        if row.name != asked.row.name:
            beside[row.name] = _answers(ready, ready.zipped(row.match).models)
    beside["average"] = _answers(ready, ready.zipped("as_they_are").models)
    keep = lambda found: {name: detail for name, detail in found.items() if detail is not None}
    return keep(ours), keep(beside)


def summary(ready: Work, done: Done, others: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """result.json."""
    asked, taught = ready.asked, ready.asked.taught
    ours, beside = _table(ready, done)
    size = sum(len(batch) for batch in ready.batches)
    result: dict[str, Any] = {
        "method": asked.row.name,
        "models": [str(model) for model in asked.recipe.models()],
        "seed": asked.settings.seed,
        "learned_items": len(taught.learned),
        "labels": False,
        "settings": asked.settings.model_dump(mode="json"),
        "zip": {
            "layers": ready.seen.depth,
            "of": ready.seen.map.layers,
            "one": done.zipped.one,
            "correlation": {space: _numbers(pair) for space, pair in done.zipped.correlation.items()},
            "not_one_to_one": sorted(s for s, g in done.zipped.groupings.items() if not g.one_to_one),
        },
        "passes": {"forward": 2 * size},
        "others": dict(others),
        "seconds": seconds,
        "peak_memory": peak_memory(),
    }
    if ours:
        result |= {
            "heldout": ours[asked.row.name]["accuracy"],
            "heldout_detail": ours[asked.row.name],
            "heldout_items": len(taught.heldout),
            "heldout_name": items_name(taught.heldout),
            "baselines": {name: detail["accuracy"] for name, detail in beside.items()},
            "baselines_detail": beside,
            "best_baseline": max(beside, key=lambda name: beside[name]["accuracy"]),
        }
    return result


def _numbers(pair: tuple[float, float]) -> list[float | None]:
    """None where no two units of both models are in one place."""
    return [None if value != value else value for value in pair]


def print_zip(result: Mapping[str, Any], directory: Path) -> None:
    """The table a person reads at the end."""
    from rich.console import Console

    from merge3.client.run import accuracy_table

    console, zipped = Console(), result["zip"]
    if "heldout" in result:
        rows = [(result["method"], result["heldout_detail"])]
        rows += [(name, other["detail"]) for name, other in result["others"].items()]
        rows += sorted(result["baselines_detail"].items(), key=lambda row: -row[1]["accuracy"])
        console.print(accuracy_table(rows, result["heldout_items"], "the zip", result["method"]))
    pairs = [pair for pair in zipped["correlation"].values() if None not in pair]
    before, after = np.mean(pairs, axis=0) if pairs else (0.0, 0.0)
    console.print(
        f"{zipped['layers']} of {zipped['of']} layers, {len(zipped['correlation'])} spaces: matched units correlate by "
        f"{before:.3f} before, {after:.3f} after; {result['learned_items']} unlabelled items, {result['seconds']:.0f} s"
    )
    if (directory / "model" / FILE).exists():
        said = json.loads((directory / "model" / FILE).read_text(encoding="utf-8"))
        console.print(told_sizes(said, directory / "model"))


def told_sizes(told: Mapping[str, Any], directory: Path) -> str:
    """Where results lie, and how much of them is the same."""
    size = told["bytes"]
    places = dict.fromkeys(str(directory / place) for place in told["results"].values())
    line = f"{told['layers']} of {told['of']} layers are one: {', '.join(places)}"
    if len(places) == 1:
        return line
    shared = f"{len(told['shared'])} tensors in common, {size['shared']:,} bytes"
    return f"{line}; {shared}; {size['together']:,} bytes with those stored once, {size['apart']:,} as they lie"
