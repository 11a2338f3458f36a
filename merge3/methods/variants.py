"""Methods with one result per task, a row each: a merge that all tasks have in common, and what each adds to it.

A row says which ordinary merge is the common one and how a task's difference is kept; variants/ computes it. A recipe
of such a method may name its tasks (`tasks:`, task -> model; else the last part of each model's path).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from merge3.errors import RecipeError
from merge3.methods.base import NOTHING, PER_TASK, Parameter, for_models
from merge3.methods.rules import UNIFIED
from merge3.methods.task_arithmetic import ELECTED, PLAIN_SUM
from merge3.parameters import scalars
from merge3.recipe import ModelRef, Recipe, nearest

MERGER = "merger"  # the parameter that names the common merge's method


@dataclass(frozen=True)
class Variant:
    """parts: of variants/kinds.py, how a difference is kept. parameters: its own, all `shared`; others are the common
    merge's. merger: the common merge's method; mergers: whether a recipe may name another. given: parameters of the
    common merge that are not a recipe's to say. from_base: the parameter that says which tensors the common model has
    from the base, so that all of a tensor's task vector is the variant's; empty: none. fewest: experts it takes.
    adapters: whether they are LoRA adapters on the base."""

    name: str
    summary: str
    reference: str
    parts: str
    parameters: dict[str, Parameter]
    merger: str
    mergers: bool = True
    given: Mapping[str, Any] = field(default_factory=dict)
    from_base: str = ""
    fewest: int = 1
    needs: str = NOTHING
    result: str = PER_TASK
    adapters: bool = False


_ROWS = (
    Variant(
        "emr",
        "one unified model, and per task a mask of one bit per weight and a scale",
        "https://arxiv.org/abs/2405.17461",
        parts="masks",
        parameters={
            "rescale": Parameter(
                str,
                "shared",
                "paper",
                choices=("paper", "code"),
                help="the scale: by sums over the model, or by means of its tensors as the authors' code for tables",
            )
        },
        merger=UNIFIED,
        mergers=False,
        fewest=2,
    ),
    Variant(
        "onebit",
        "per task the signs of its task vector and a scale per tensor; other tensors merged",
        "https://arxiv.org/abs/2502.10743",
        parts="signs",
        parameters={"binary": Parameter(bool, "shared", True, help="of which tensors: a value, or {filter, value}s")},
        merger=ELECTED,
        from_base="binary",
    ),
    Variant(
        "byom_fft",
        "any merge, and per task the largest differences between its expert and the merge",
        "https://arxiv.org/abs/2310.01886",
        parts="largest",
        parameters={"share": Parameter(float, "shared", 0.1, 0.0, 1.0, open_low=True, help="of weights that are kept")},
        merger=PLAIN_SUM,
    ),
    Variant(
        "byom_lora",
        "the base, and per task its LoRA adapter cut to a smaller rank",
        "https://arxiv.org/abs/2310.01886",
        parts="factors",
        parameters={"rank": Parameter(int, "shared", 4, 1, help="of what is kept of every adapter")},
        merger=PLAIN_SUM,
        mergers=False,
        given={"weight": 0.0},  # the base as it is
        adapters=True,
    ),
)
VARIANTS: dict[str, Variant] = {row.name: row for row in _ROWS}


def common_of(recipe: Recipe, methods: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """The ordinary recipe of the merge that all tasks have in common; what the recipe does not say of it is as in the
    merge that one would pick by hand. methods: METHODS. Raises RecipeError."""
    row = VARIANTS[recipe.method]
    own = {*row.parameters, MERGER}
    _check(recipe, row, where)
    for name in recipe.parameters:
        known = name in own or any(name in method.parameters for method in methods.values())
        if not known and (hint := nearest(name, own, 0.75)):
            raise RecipeError(f"{where}: parameters.{name}", f"{row.name} has no such parameter", ", ".join(own), hint)
    named = recipe.parameters.get(MERGER, row.merger)
    if not isinstance(named, str) or named not in methods or (named != row.merger and not row.mergers):
        expected = ", ".join(methods) if row.mergers else f"{row.merger}, as {row.name} has it"
        raise RecipeError(f"{where}: parameters.{MERGER}", f"found {named!r}", expected, nearest(str(named), methods))
    method = methods[named]
    parameters = {name: value for name, value in recipe.parameters.items() if name not in own}
    by_hand = next(iter(method.by_hand.values()), None)
    if by_hand is not None:
        experts = sum(source.model != recipe.base_model for source in recipe.slices[0].sources)
        for name, value in {**by_hand.own, **by_hand.common}.items():
            parameters.setdefault(name, for_models(value, experts))
    return replace(recipe, method=named, parameters=parameters | dict(row.given), tasks={}, router={})


def parameters_of(recipe: Recipe, where: str = "recipe") -> dict[str, Any]:
    """The row's own parameters as the recipe sets them, defaults included: one value each, but for `from_base`, which
    may be said tensor by tensor. Raises RecipeError."""
    found, row = {}, VARIANTS[recipe.method]
    for name, parameter in row.parameters.items():
        setting, at = recipe.parameters.get(name), f"{where}: parameters.{name}"
        setting = parameter.default if setting is None else setting
        if name == row.from_base:
            if _by_layer(setting):
                raise RecipeError(at, f"found {setting!r}"[:120], "a value, or {filter, value}s: no list over layers")
            for value in scalars(setting):
                if value is not None:
                    parameter.validate(value, at)
        elif isinstance(setting, (list, tuple, Mapping)):
            raise RecipeError(at, f"found {setting!r}"[:120], "one value for the whole model")
        else:
            setting = parameter.validate(setting, at)
        found[name] = setting
    return found


def tasks_of(recipe: Recipe, where: str = "recipe") -> dict[str, str]:
    """Task -> the model whose it is. Raises RecipeError for a model that is not merged, or two tasks of one name."""
    models = [str(source.model) for source in recipe.slices[0].sources if source.model != recipe.base_model]
    if not recipe.tasks:
        named: dict[str, str] = {}
        for model in models:
            task = _last(ModelRef.parse(model))
            if not task or task.startswith("."):
                raise RecipeError(
                    f"{where}: tasks", f"no name for {model} in its path", "`tasks:`, a name for each model"
                )
            if task in named:
                found = f"{named[task]} and {model} would both be {task!r}"
                raise RecipeError(f"{where}: tasks", found, "`tasks:`, a name for each model")
            named[task] = model
        return named
    for task, model in recipe.tasks.items():
        if model not in models:
            raise RecipeError(f"{where}: tasks.{task}", f"{model!r} is not merged", ", ".join(models))
    return dict(recipe.tasks)


def _by_layer(setting: Any) -> bool:
    entries = setting if isinstance(setting, (list, tuple)) else [setting]
    if len(entries) and not isinstance(entries[0], Mapping):
        return isinstance(setting, (list, tuple))
    return any(_by_layer(entry["value"]) for entry in entries)


def _last(model: ModelRef) -> str:
    return PurePath((model.lora or model).path).name


def _check(recipe: Recipe, row: Variant, where: str) -> None:
    for section in ("fit", "surgery"):
        if getattr(recipe, section):
            found = f"`{section}:` in a recipe of {row.name}, which makes a model for each task"
            raise RecipeError(f"{where}: {section}", found, "a recipe of one model, or none of it")
    if not recipe.whole:
        raise RecipeError(f"{where}: slices", f"{row.name} over slices", "`models`: whole models, each for its task")
    experts = [source for source in recipe.slices[0].sources if source.model != recipe.base_model]
    if len(experts) < row.fewest:
        raise RecipeError(f"{where}: models", f"{len(experts)} beside the base", f"{row.fewest} or more for {row.name}")
    for i, source in enumerate(recipe.slices[0].sources):
        own = source.model == recipe.base_model
        if (
            row.adapters
            and not own
            and (not source.model.lora or replace(source.model, lora=None) != recipe.base_model)
        ):
            raise RecipeError(f"{where}: models[{i}]", f"{source.model}", "a LoRA adapter on the base: `base+adapter`")
        for name in source.parameters:
            if name in row.parameters or name == MERGER:
                at = f"{where}: models[{i}].parameters.{name}"
                raise RecipeError(at, "stands under a model", f"`{name}` under the recipe's `parameters`")
