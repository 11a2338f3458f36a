"""What must be equal for a journal to be continued."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from merge3 import __version__
from merge3.recipe import ModelRef, Recipe
from merge3.search.context import Search
from merge3.search.optimizers import OPTIMIZERS
from merge3.search.steady import steady_identity
from merge3.space import SpaceDefinition
from merge3.tasks import items_hash


def identity(search: Search) -> dict[str, str]:
    """Name -> what it is for this run. By place, not by path: a folder that was moved is the same run."""
    config, questions, info = search.config, search.questions, search.engine.info()
    found = {
        "merge3": __version__,
        "cma": metadata.version("cma"),
        "numpy": np.__version__,
        "scipy": metadata.version("scipy"),
        "genome": (placeless := _placeless(search)).hash(),
        "optimizer": config.optimizer.identity(),
        "search items": items_hash(questions.search),
        "held-out items": items_hash(questions.heldout),
        "config": config.hash(),
        "experts": info.experts,
    }
    for package in OPTIMIZERS[config.optimizer.name].packages:
        found[package] = metadata.version(package)
    if placeless.around:  # a resumed run reads it here, and its start
        found["around"] = placeless.around
    if search.start is not None:
        found["start"] = json.dumps(search.start.tolist())
    if search.steps is not None:
        found["steps"] = json.dumps(search.steps.tolist())
    found |= steady_identity(search)  # a resumed run reads it too
    if questions.judges:  # what answers are worth is lm-eval's to say
        found["lm-eval"] = metadata.version("lm_eval")
    for place, name in enumerate(info.endpoints):
        found[f"checkpoint {place}"] = info.content_hashes[name]
    return found


def beside(search: Search) -> dict[str, dict[str, str]]:
    """What makes answers beside what `identity` names, {"files", "images", "documents"}: name -> digest each, empty
    where nobody here knows. Runs of earlier versions have none of it."""
    questions, info = search.questions, search.engine.info()
    images: dict[str, Any] = {}
    for item in (*questions.search, *questions.heldout) if info.host == "local" else ():
        if item.image:
            content = hashlib.sha256(Path(item.image).read_bytes()).digest()
            images.setdefault(f"the images of task {item.task!r}", hashlib.sha256()).update(content)
    return {
        "files": dict(info.files),
        "images": {name: found.hexdigest() for name, found in images.items()},
        "documents": {f"what answers to {task} are held against": digest for task, digest in questions.judged.items()},
    }


def versions(search: Search) -> dict[str, str]:
    """Of what computes in this process: others may answer otherwise in the last bit, or by much."""
    if search.engine.info().host != "local":
        return {}
    return {name: metadata.version(name) for name in ("torch", "transformers")}


def _placeless(search: Search) -> SpaceDefinition:
    """The space's definition with places for paths."""
    definition = search.space.definition
    places = {model: f"model {i}" for i, model in enumerate(search.config.models)}
    of = lambda model: places.get(model, model)
    models = tuple(map(of, definition.models))
    tokens = tuple(replace(row, model=of(row.model)) for row in definition.tokens)
    source = of(definition.tokenizer_source)
    around = definition.around
    if around:
        recipe = Recipe.parse(json.loads(around)).renamed(lambda ref: ModelRef.parse(of(str(ref))))
        around = json.dumps(recipe.to_dict(), sort_keys=True)
    named = {"tokenizer_source": source, "tokens": tokens, "around": around}
    return replace(definition, models=models, base=of(definition.base), **named)
