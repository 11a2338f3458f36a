"""A hierarchical fit: a run of its own for every group, in `groups/`, whose result is an expert of the next."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from merge3.checkpoint.layout import Ref
from merge3.client.fit import Outcome, Run, begin, learned, registration
from merge3.client.fit_files import FitFiles
from merge3.client.fit_items import Taught
from merge3.engine import LocalEngine
from merge3.export import check_recipe
from merge3.learn.fit import Fit, experts_of, merged_with, of_experts
from merge3.learn.hierarchy import Node, Weights, composed, task_vector_cosine, tree, weights_of
from merge3.live.heads import own_heads
from merge3.pool import Pool
from merge3.recipe import ModelRef, Recipe, Slice

# Where merges of groups are merged their weights start nearly whole: within them experts were weighed already.
_START = {"tanh": 0.8, "clamp": 1.0, "none": 1.0}
_SMALL = 2**28  # bytes: nothing is streamed to save less


def fit_groups(run: Run) -> Outcome | None:
    """See fit.fitted_host. What is in memory while weights are learned is a base, one group, and the live model; the
    result is measured with as much, the rest streamed, unless a budget says otherwise."""
    recipe, settings = run.recipe, Fit(run.recipe).settings
    models = [str(model) for model in recipe.models()]
    hashes = {model: Pool.open(model, []).content_hashes()[model] for model in models}
    begin(run, hashes)
    grouping = tree(experts_of(recipe), settings.groups, partial(task_vector_cosine, recipe))
    lender = Pool.open(models[0], models[1:], tokenizer=recipe.tokenizer, tower=recipe.tower)  # reads no weights
    # What is merged at the end is all experts at once; what would be refused then is refused now.
    check_recipe(merged_with(recipe, dict.fromkeys(experts_of(recipe), float(settings.start))), lender)
    _check_items(run, lender)
    ties: dict[str, str] = {}
    for output in lender.outputs:
        for source in {lender.shared_with(Ref(model, output)) for model in models} - {None}:
            ties[output] = source
    inside: dict[str, Weights | None] = {expert: None for expert in models}
    places = {expert: expert for expert in models}
    steps = asked = 0
    seconds = 0.0
    history: list[dict[str, Any]] = []
    for node in grouping.inner():
        names = ", ".join(Path(part.name).name for part in node.parts)
        if not run.quiet:
            print(f"group {node.name}: {names}", file=sys.stderr)
        found = _merge_group(run, node, {part.name: places[part.name] for part in node.parts}, lender)
        if found is None:
            return None
        outcome, weights, places[node.name] = found
        inside[node.name] = composed(inside, weights, ties)
        steps, asked, history = steps + outcome.steps, asked + outcome.asked, outcome.history
        seconds += outcome.seconds
        del outcome, found  # they hold the group's models
        gc.collect()
    result = merged_with(recipe, inside[grouping.name])
    budget = None
    if run.memory_budget is None:
        copy = sum(info.nbytes for info in lender.base_checkpoint.tensors.values())
        budget = str(max(_SMALL, copy * (2 + max(len(node.parts) for node in grouping.inner()))))
    return Outcome(result, history, run.open(recipe, budget), run.taught, steps, asked, seconds)


def _check_items(run: Run, lender: Pool) -> None:
    """What any group would refuse of its items, before the first one is fitted."""
    engine = LocalEngine(lender)
    for items in (run.taught.learned, run.taught.heldout):
        engine.prepare(registration(items, run.taught, own_heads(lender)), run.recipe)


def _merge_group(run: Run, node: Node, places: Mapping[str, str], lender: Pool) -> tuple[Outcome, Weights, str] | None:
    """(the fit, the weights within, where its merge is), or None when interrupted. places: part -> its model."""
    directory = run.files.directory / "groups" / node.name
    recipe, taught = _group(run.recipe, places), _taught(run.taught, node)
    if directory.exists():
        files = FitFiles(directory, (directory / "fit.json").exists())
    else:
        files = FitFiles(directory, False)
    own = replace(run, recipe=recipe, taught=taught, files=files)
    with closing(own.open(recipe)) as engine:
        begin(own, engine.info().content_hashes)
        found = learned(engine, recipe, taught, own, _lend(engine, lender))
        if found is None:
            return None
        fitted = found.recipe
        if not (directory / "model").exists() and node.name != "root":
            engine.export(replace(fitted, dtype="float32", out_dtype=None), directory / "model")
    back = {place: name for name, place in places.items()}
    weights = {back[model]: own for model, own in weights_of(fitted).items()}
    return found, weights, str((directory / "model").resolve())


def _lend(engine: LocalEngine, lender: Pool) -> bool:
    """Give the live model the heads of experts that are not there; whether experts have heads of their own."""
    own = own_heads(lender)
    if own:
        for model in lender.endpoints:
            if model not in engine.pool.endpoints:
                engine.slot.lent_heads[model] = lender.endpoints[model], lender.heads.get(model, ())
    return own


def _group(recipe: Recipe, places: Mapping[str, str]) -> Recipe:
    """The recipe over a group's parts: experts, and merges of experts."""
    sources = []
    for name, place in places.items():
        (source,) = of_experts(recipe, [name]).slices[0].sources or (recipe.slices[0].sources[0],)
        sources.append(replace(source, model=ModelRef.parse(place)))
    fit = {**recipe.fit, "groups": None}
    if any(name != place for name, place in places.items()):
        fit["start"] = _START[Fit(recipe).settings.bound]
    return replace(recipe, slices=(Slice(tuple(sources)),), fit=fit)


def _taught(taught: Taught, node: Node) -> Taught:
    """The tasks of a node's experts."""
    tasks = {task for task, expert in taught.experts.items() if expert in node.experts}
    of = lambda items: [item for item in items if item.task in tasks]
    experts = {task: expert for task, expert in taught.experts.items() if task in tasks}
    return replace(taught, learned=of(taught.learned), heldout=of(taught.heldout), experts=experts)
