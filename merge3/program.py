"""A recipe compiled: what becomes of every output tensor, as one value.

Everything that runs merges runs programs: the live model, the export, a dry run (which only compiles), other tools.
Compiling reads no weights. Steps, which need statistics of them, are made for those tensors that are asked for.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from merge3.checkpoint.layout import Layout, Ref
from merge3.errors import RecipeError
from merge3.methods import METHODS, VARIANTS, Copy, Job, Method, Step, method_named
from merge3.methods.execute import Output, execute
from merge3.methods.plan import Kept, Layer, Rest, Tied, View, resolve
from merge3.methods.variants import common_of, parameters_of, tasks_of
from merge3.parameters import lookup
from merge3.recipe import BASE, Recipe
from merge3.statistics import Statistics

BATCH = 24_000_000  # elements merged at once, where a model is merged to be stored


@dataclass(frozen=True)
class Program:
    """jobs: what is merged. copies: output -> the tensor it is as it stands; kept: the reason of each. ties: output
    -> the output it shares, where every source ties it and none stores it. origins: output layer -> the model and its
    layer whose configuration it has. shapes: of every output that is stored, jobs first. rests: output -> the rows
    that stay as they are, of one whose first rows alone are merged. varied: of a method with a result per task, the
    outputs that may differ between them, as jobs over all experts; what the program itself writes is what they have in
    common. tasks: task -> the model it belongs to.

        program = compile(Recipe.from_yaml("ties.yaml"), pool)
        tensors = {name: torch.empty(shape) for name, shape in program.shapes.items()}
        execute(program.outputs(tensors, pool.statistics), pool.get)
    """

    method: Method
    jobs: tuple[Job, ...]
    copies: dict[str, Ref] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    origins: tuple[tuple[str, int], ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rests: dict[str, Ref] = field(default_factory=dict)
    varied: tuple[Job, ...] = ()
    tasks: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """How many the output has."""
        return len(self.origins)

    def steps(self, names: Container[str], statistics: Statistics) -> dict[str, Step]:
        """What to run for each of these outputs, in the order of `shapes`; their statistics are fetched in one go."""
        jobs = [job for job in self.jobs if job.name in names]
        self.method.prefetch(jobs, statistics)
        steps: dict[str, Step] = {job.name: self.method.step(job, statistics) for job in jobs}
        for name, source in self.copies.items():
            if name in names:
                steps[name] = Copy(source)
        return steps

    def outputs(self, tensors: Mapping[str, torch.Tensor], statistics: Statistics) -> list[Output]:
        """What to run to write these outputs, whole. tensors: name -> where to."""
        found: list[Output] = []
        for name, step in self.steps(tensors, statistics).items():
            out, rest = tensors[name], self.rests.get(name)
            if rest is not None:
                first, _ = rest.rows
                found.append((name, Copy(rest), out[first:]))
                out = out[:first]
            found.append((name, step, out))
        return found


def compile(recipe: Recipe, view: View, where: str = "recipe") -> Program:
    """Resolve every output tensor. where: names the recipe in messages.

    Raises RecipeError for what does not fit: an unknown method, parameters, layers, tensors.
    """
    return _with_variants(recipe, view, where) if recipe.method in VARIANTS else _compiled(recipe, view, where)[0]


def jobs_of_experts(recipe: Recipe, view: View) -> list[Job]:
    """What is merged of the models themselves, also where a method merges what it derives of them. Raises as compile
    does."""
    return _compiled(recipe, view, "recipe")[1]


def _compiled(recipe: Recipe, view: View, where: str) -> tuple[Program, list[Job]]:
    """(the program of one merge, its jobs over the experts themselves)"""
    method = method_named(recipe.method, f"{where}: merge_method")
    for key in ("tasks", "router"):
        if getattr(recipe, key):
            found = f"`{key}:` in a recipe of {method.name}, which makes one model for all tasks"
            raise RecipeError(f"{where}: {key}", found, f"one of {', '.join(VARIANTS)}")
    for section in ("fit", "surgery"):
        if getattr(recipe, section):
            found = f"`{section}:` in a recipe of {method.name}, to be fitted first"
            raise RecipeError(f"{where}: {section}", found, "a recipe without", "`merge3-client fit RECIPE`")
    _check_tokenizer(recipe, view, where)
    if dict(recipe.tower) != dict(view.tower):
        found, expected = dict(recipe.tower) or "none", dict(view.tower) or "none"
        raise RecipeError(f"{where}: tower", f"found {found}", f"{expected}, with which the models were opened")
    jobs, copies, kept, ties, origins, rests = [], {}, {}, {}, [], {}
    for found in resolve(recipe, method, view, where):
        match found:
            case Job():
                jobs.append(found)
            case Kept(name, source, reason):
                copies[name], kept[name] = source, reason
            case Rest(name, source):
                rests[name] = source
            case Tied(name, source):
                ties[name] = source
            case Layer():
                origins.append(tuple(found))
    if not jobs and not copies:
        raise RecipeError(where, "no tensor to merge", "models with weights")
    merged = jobs
    if method.derive is not None:
        jobs = _over_one_expert(method, merged, view)
    shapes = {job.name: job.shape for job in jobs}
    shapes |= {name: view.shape(source.whole) for name, source in rests.items()}
    shapes |= {name: view.shape(source) for name, source in copies.items()}
    return Program(method, tuple(jobs), copies, kept, ties, tuple(origins), shapes, rests), merged


def _with_variants(recipe: Recipe, view: View, where: str) -> Program:
    """The program of what all tasks have in common, and which outputs differ between them."""
    row, tasks = VARIANTS[recipe.method], tasks_of(recipe, where)
    program, varied = _compiled(common_of(recipe, METHODS, where), view, where)
    if program.rests:
        found = f"{next(iter(program.rests))!r} is merged in part"
        raise RecipeError(where, found, "whole tensors, where every task has a model of its own")
    setting = parameters_of(recipe, where)
    if row.from_base:
        varied = [_based(job, recipe, view, where) for job in varied if _is(row.from_base, setting, job)]
        based = {job.name: job.base for job in varied}
        jobs = tuple(job for job in program.jobs if job.name not in based)
        program = replace(program, jobs=jobs, copies=program.copies | based)
    if not varied:
        raise RecipeError(where, "no tensor that differs between tasks", "at least one")
    return replace(program, varied=tuple(varied), tasks=tasks)


def _is(name: str, setting: Mapping[str, Any], job: Job) -> bool:
    """Whether a parameter that may be said tensor by tensor is true of this one."""
    return bool(lookup(name, (setting,), job.name, 0.0, True))


def _based(job: Job, recipe: Recipe, view: View, where: str) -> Job:
    """The job over the base too, which an average, say, does without."""
    base = job.base
    if base is None and recipe.base_model is not None:
        base = Ref(str(recipe.base_model), job.name)
    if base is None or not view.has(base):
        raise RecipeError(f"{where}: base_model", f"none for tensor {job.name!r}", "a base, from which variants differ")
    return replace(job, base=base)


@torch.no_grad()
def merged(
    program: Program, specs: Mapping[str, tuple], pool: Any, seed: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every output of `specs` (name -> dtype, shape), in their order, on the pool's device; about BATCH elements are in
    memory at a time. seed: of random keeps."""
    batch: dict[str, torch.Tensor] = {}
    size, left = 0, len(specs)
    for name, (dtype, shape) in specs.items():
        batch[name] = torch.empty(shape, dtype=dtype, device=pool.device)
        size, left = size + batch[name].numel(), left - 1
        if size >= BATCH or not left:
            execute(program.outputs(batch, pool.statistics), pool.get, seed)
            yield from batch.items()
            batch, size = {}, 0


def tied_outputs(view: View, layout: Layout) -> tuple[str, ...]:
    """Tensors outside the stack that every model shares with one other tensor: no merge of all of them is theirs."""
    found = []
    for name in (*layout.pre, *layout.post):
        shared = {view.shared_with(Ref(model, name)) for model in view.layouts}
        if len(shared) == 1 and None not in shared:
            found.append(name)
    return tuple(found)


def _check_tokenizer(recipe: Recipe, view: View, where: str) -> None:
    """Rows are a pool's: a recipe that asks for others would be merged into something else without a word."""
    found, asked = view.vocabulary, recipe.tokenizer
    if found is None and asked is None:
        return
    if asked is not None and found is not None:  # whose rows come first is the pool's, as which models there are
        source = next(iter(view.layouts)) if asked.source == BASE else asked.source
        asked = replace(asked, source=source, base=found.tokenizer.base)
    if found is None or asked is None or asked != found.tokenizer:
        said = "says nothing of a tokenizer" if asked is None else f"asks for {asked.describe()}"
        there = "rows as they are stored" if found is None else found.tokenizer.describe()
        expected = f"{there}, as this pool was opened"
        raise RecipeError(f"{where}: tokenizer", said, expected, "open a pool with the recipe's tokenizer")


def _over_one_expert(method: Method, jobs: list[Job], view: View) -> list[Job]:
    """The jobs over the one expert that the method derives of theirs. Only what it is derived by enters its name."""
    inputs = []
    for job in jobs:
        per_source = tuple(_only(method.deriving, own) for own in job.per_source)
        inputs.append(replace(job, shared=_only(method.deriving, job.shared), per_source=per_source))
    model = view.derive(method.name, method.derive, inputs, method.survey)
    return [replace(job, sources=(Ref(model, job.name),), per_source=()) for job in jobs]


def _only(names: tuple[str, ...], values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}
