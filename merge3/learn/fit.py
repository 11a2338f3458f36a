"""A learned merge as one value, from its recipe to the recipe with weights that it ends in."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from merge3.errors import RecipeError
from merge3.learn.coefficients import Coefficients
from merge3.learn.fitting import Fitting, State
from merge3.learn.lessons import TaskToLearn, lessons
from merge3.learn.losses import LOSSES
from merge3.learn.room import make_room
from merge3.learn.settings import FitSettings, read_fit
from merge3.learn.weighted import Weighted, check_refs
from merge3.live.slot import Slot
from merge3.methods.learned import RESULT, Learned, learned_named
from merge3.parameters import by_tensor
from merge3.recipe import Recipe, Slice

SAVED = 5.0  # seconds after which a step's state is told, at the latest


@dataclass(frozen=True, eq=False)
class Fit:
    """recipe: of a learned method, with `fit:`. experts: task -> the endpoint whose outputs expert_kl matches."""

    recipe: Recipe
    experts: Mapping[str, str] = field(default_factory=dict)

    @property
    def method(self) -> Learned:
        """The recipe's row. Raises RecipeError."""
        return learned_named(self.recipe.method)

    @property
    def settings(self) -> FitSettings:
        """`fit:`, with the method's own values where it says nothing. Raises RecipeError."""
        return read_fit(self.recipe.fit, "fit").of(self.method)


@dataclass(frozen=True)
class FitStep:
    """What an engine tells of a step; see fitting.Step. state, recipe: after it, now and then and at the end: what a
    fit can be continued from, and what it would end in."""

    number: int
    loss: float
    losses: Mapping[str, float]
    state: State | None = None
    recipe: Recipe | None = None


def check_learned(recipe: Recipe, where: str) -> None:
    """Raises RecipeError for a recipe that no fit can begin with."""
    method = learned_named(recipe.method, f"{where}: merge_method")
    if not recipe.whole:
        raise RecipeError(f"{where}: slices", f"found with {method.name}", "`models`, whole and of equal depth")
    if recipe.base_model is None:
        raise RecipeError(f"{where}: base_model", f"missing; {method.name} weighs changes from a base", "a model")
    levels = [(recipe.parameters, "parameters")]
    levels += [(source.parameters, f"models: {source.model}: parameters") for source in recipe.slices[0].sources]
    for parameters, at in levels:
        for name in parameters:
            found = f"given, and {method.name} learns all weights"
            raise RecipeError(f"{where}: {at}.{name}", found, "settings of `fit:`")
    experts = experts_of(recipe)
    if not experts:
        raise RecipeError(f"{where}: models", "none beside the base", "at least one")
    if len(set(experts)) != len(experts):
        raise RecipeError(f"{where}: models", "a model twice", "different ones")
    read_fit(recipe.fit, f"{where}: fit").of(method)


def experts_of(recipe: Recipe) -> list[str]:
    """Names of its models, in order, without the base."""
    return [str(s.model) for s in recipe.slices[0].sources if s.model != recipe.base_model]


def others_of(recipe: Recipe) -> list[str]:
    """Names of the models of any recipe, slices or not, in order, without its base."""
    return [str(model) for model in recipe.models() if model != recipe.base_model]


def of_experts(recipe: Recipe, experts: Sequence[str]) -> Recipe:
    """The recipe with these of its models alone."""
    sources = tuple(source for source in recipe.slices[0].sources if str(source.model) in experts)
    return replace(recipe, slices=(Slice(sources),))


def merged_with(recipe: Recipe, weights: Mapping[str, float | Sequence[tuple[str, float]]]) -> Recipe:
    """The task_arithmetic recipe with these weights: model -> one weight, or (tensor, weight) of each tensor."""
    sources = []
    for source in recipe.slices[0].sources:
        if source.model == recipe.base_model:
            continue
        own = weights[str(source.model)]
        sources.append(replace(source, parameters={"weight": own if isinstance(own, float) else _weights(own)}))
    return replace(recipe, method=RESULT, slices=(Slice(tuple(sources)),), parameters={}, fit={}, surgery={})


def _weights(weights: Sequence[tuple[str, float]]) -> list[dict]:
    first = dict(reversed(weights))  # of a name twice the first counts, as among conditions
    named = by_tensor({name: first[name] for name, _ in weights})
    # What is kept from the base has no weight here; other tools ask for one.
    return [*named, {"filter": "*", "value": 0.0}]


def fitted(fit: Fit, fitting: Fitting, weights: torch.Tensor) -> Recipe:
    """The recipe that weights, float32 [experts, tensors], make: what was fitted, bit for bit."""
    named = {}
    jobs = fitting.weighted.jobs
    for k, model in enumerate(ref.model for ref in jobs[0].sources):
        own = weights[k].tolist()
        if fit.settings.level == "task":
            named[model] = own[0]
        else:
            named[model] = [(job.sources[k].tensor, value) for job, value in zip(jobs, own)]
    return merged_with(fit.recipe, named)


def steps(fit: Fit, fitting: Fitting, state: State | None = None, seconds: float = math.inf) -> Iterator[FitStep]:
    """The steps after `state`'s, up to the first that ends after so many seconds. Those that are measured, the last
    ones, and one every SAVED seconds bring along what is learned so far."""
    settings, began = fitting.settings, time.monotonic()
    every, saved = settings.measured_every, began
    for step in fitting.steps(state):
        now = time.monotonic()
        last = step.number == settings.steps or now >= began + seconds
        marked = last or (every > 0 and step.number % every == 0)
        if not marked and now < saved + SAVED:
            yield FitStep(step.number, step.loss, step.losses)
            continue
        saved = now
        yield FitStep(step.number, step.loss, step.losses, step.state, fitted(fit, fitting, step.weights))
        if last:
            return


def prepare(
    slot: Slot, fit: Fit, tasks: Sequence[TaskToLearn], folder: str | Path, batch_tokens: int = 4096
) -> Fitting:
    """A fit over a live model, its items tokenised and its experts asked. folder: of the tokenizer.

    batch_tokens: padded tokens of a forward pass, at most. Overwrites the live model. Raises RecipeError, ItemsError or
    LogitsError for what cannot be learned, ResourceError or BadInput where memory is too short.
    """
    check_learned(fit.recipe, "recipe")
    method, settings, loss = fit.method, fit.settings, LOSSES[fit.method.loss]
    where = "a driver that makes them first (merge3-client fit)"
    if method.survivors:
        raise RecipeError("fit", f"{method.name}, which learns over experts of its own", where)
    if settings.groups is not None:
        raise RecipeError("fit.groups", "groups of experts, whose merges are experts in turn", where)
    for task, expert in fit.experts.items():
        if expert not in slot.pool.endpoints:
            raise RecipeError(f"fit: items: task {task!r}: model", f"found {expert!r}", ", ".join(slot.pool.endpoints))
    start = merged_with(fit.recipe, dict.fromkeys(experts_of(fit.recipe), float(settings.start)))
    program = slot.compile(start)
    check_refs(program.jobs)
    names = [job.name for job in program.jobs]
    layout = slot.pool.layouts[slot.pool.base]
    weighted = Weighted(slot, program)
    experts = len(program.jobs[0].sources)
    coefficients = Coefficients(experts, names, layout, settings.level, settings.bound, settings.start)
    if not tasks:
        raise RecipeError("fit: items", f"none, and {method.name} learns from items", "files of items")
    taught = lessons(slot, tasks, loss, folder, settings.over, batch_tokens)
    room = make_room(weighted, [one for lesson in taught for one in lesson.asked], batch_tokens)
    return Fitting(weighted, coefficients, taught, loss, settings, room)
