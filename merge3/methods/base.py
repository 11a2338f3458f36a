"""What a merge method is: a row of a table, and the one function that turns a job into coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from merge3.errors import RecipeError
from merge3.kernels import DENSITY, FIELDS, HI, HI_SHARE, LO_SHARE, MAX_EXPERTS, RESCALE, WEIGHT, Modes
from merge3.parameters import Setting, lookup
from merge3.recipe import nearest
from merge3.statistics import Statistics

REQUIRED = object()
NOTHING, UNLABELLED, LABELLED = "nothing", "unlabelled inputs", "labelled items"  # what a method needs beside models
RECIPE, DERIVED = "recipe", "recipe over a derived vector"  # what it ends in
PER_TASK, CHECKPOINT = "a model for each task", "checkpoint"
ForModels = float | Callable[[int], float]  # a value, or a function of how many models are merged


def equal_share(models: int) -> float:
    """What each of so many models weighs where all weigh alike and together 1."""
    return 1 / models


def for_models(value: ForModels, models: int) -> float:
    """The value where so many models are merged."""
    return value(models) if callable(value) else value


class Gene(NamedTuple):
    """How a search varies a parameter.

    low, high: bounds; a first step is a share of their distance. start: the value in the uniform merge.
    steps: values are multiples of 1 / steps, so that what they lead to can be known before a search; 0: any value.
    weighs: `allow_negative_weights: false` keeps it at 0 or above.
    folded: the preset `evolve` takes its absolute value, at most 1, and starts at 1, as mergekit-evolve does.
    """

    low: float
    high: float
    start: ForModels
    steps: int = 0
    weighs: bool = False
    folded: bool = False


WEIGHT_OF_MODEL = Gene(-0.5, 2.0, equal_share, weighs=True)  # of every method that weighs its models


class Parameter(NamedTuple):
    """scope: `shared` (one value per tensor), `expert` (one per non-base source), `source` (per source).
    low, high: inclusive bounds; open_low excludes low itself. choices: of a text. gene: None where no search varies it.
    idle: accepted, and changes nothing."""

    kind: type
    scope: str
    default: Any = REQUIRED
    low: float = -float("inf")
    high: float = float("inf")
    open_low: bool = False
    help: str = ""
    gene: Gene | None = None
    idle: bool = False
    choices: tuple[str, ...] = ()

    def validate(self, value: Any, where: str) -> Any:
        """The value in this type, within its bounds. Raises RecipeError. where: ends in the parameter's name."""
        if self.kind is bool:
            if not isinstance(value, bool):
                raise RecipeError(where, f"found {value!r}", "true or false")
            return value
        if self.kind is str:
            if value not in self.choices:
                raise RecipeError(where, f"found {value!r}", " or ".join(self.choices), nearest(value, self.choices))
            return value
        try:
            number = value if isinstance(value, int) and self.kind is int else float(value)
            unsaid = isinstance(value, bool) or math.isnan(number) or not (self.kind is float or number == int(number))
        except OverflowError:  # perhaps too long to be shown
            raise RecipeError(where, "found a number beyond float64", "a smaller one") from None
        except (TypeError, ValueError):
            unsaid = True
        if unsaid:
            raise RecipeError(where, f"found {value!r}", "a whole number" if self.kind is int else "a number")
        number = self.kind(number)
        if not (self.low <= number <= self.high) or (self.open_low and number == self.low):
            bracket = "(" if self.open_low else "["
            raise RecipeError(where, f"found {value!r}", f"a value in {bracket}{self.low:g}, {self.high:g}]")
        return number


class ByHand(NamedTuple):
    """The parameters of a merge that one would pick by hand. own: of every model; common: of the recipe."""

    own: dict[str, ForModels]
    common: dict[str, Any] = {}


@dataclass(frozen=True)
class Job:
    """One output tensor: where its inputs are, and the parameters resolved for it.

    base: None where the method needs none. sources: every other input, in recipe order (methods with
    scope `source` parameters have the base among them). shared: name -> value; per_source: one each.
    """

    name: str
    base: Any
    sources: tuple[Any, ...]
    shared: dict[str, Any]
    per_source: tuple[dict[str, Any], ...]
    shape: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        """Elements of the output."""
        return math.prod(self.shape)

    @property
    def refs(self) -> tuple[Any, ...]:
        """Its inputs, base first."""
        return _inputs(self.base, self.sources)


# Every step says three things. refs: the tensors it reads, base first. kernel: steps that agree in it run in one
# call. sliceable: whether a part of the tensor can be computed from that part of its inputs.


@dataclass
class Fused:
    """A job as the fused merge runs it. coefficients: float64 [K, FIELDS], or [rows, K, FIELDS] to give
    every row of the tensor its own (columns: every column); base None means θ = 0."""

    modes: Modes
    base: Any
    experts: tuple[Any, ...]
    coefficients: np.ndarray
    lambda_: float | np.ndarray = 1.0
    rank_tables: tuple[torch.Tensor, ...] = ()
    columns: bool = False

    @property
    def split(self) -> bool:
        """Whether rows (or columns) have coefficients of their own."""
        return self.coefficients.ndim == 3

    @property
    def refs(self) -> tuple[Any, ...]:
        """Base (if any) and experts."""
        return _inputs(self.base, self.experts)

    @property
    def kernel(self) -> tuple:
        """Its modes, whether there is a base, how many experts, and what has coefficients of its own."""
        return (self.modes, self.base is None, len(self.experts), self.split, self.columns)

    @property
    def sliceable(self) -> bool:
        """Where neither rows nor columns have coefficients of their own."""
        return not self.split and not self.columns


@dataclass
class Elementwise:
    """A job with a rule of its own; see kernels.elementwise_."""

    rule: str
    base: Any
    experts: tuple[Any, ...]
    scalar: float
    per_expert: np.ndarray = field(default_factory=lambda: np.ones(1))
    rows: torch.Tensor | None = None
    sliceable = False  # rows belong to whole tensors

    @property
    def refs(self) -> tuple[Any, ...]:
        """Base (if any) and experts."""
        return _inputs(self.base, self.experts)

    @property
    def kernel(self) -> tuple:
        """Its rule, and how many experts."""
        return (self.rule, len(self.experts))


@dataclass
class Copy:
    """The tensor as it is."""

    source: Any
    kernel = ()
    sliceable = False  # it is read once in any case

    @property
    def refs(self) -> tuple[Any, ...]:
        """The source alone."""
        return (self.source,)


@dataclass
class Unpacked:
    """A tensor of one task's model, made of packed parts; see unpack.py. rule: of its table; tensors: what the rule
    takes; whole: the output holds nothing yet that may stay."""

    rule: str
    tensors: tuple[torch.Tensor | None, ...]
    scale: float = 1.0
    whole: bool = True
    refs = ()
    sliceable = False

    @property
    def kernel(self) -> tuple:
        """Its rule, and the dtype of what it changes."""
        return self.rule, self.tensors[0].dtype


Step = Fused | Elementwise | Copy | Unpacked


@dataclass(frozen=True)
class Method:
    """A merge method. step(job, statistics) gives what to run; prefetch(jobs, statistics) asks for the
    statistics of many jobs in one go. base: `required`, `optional` (its presence changes the formula) or
    `source` (an input like the others).

    searched: the parameters that a search varies unless told otherwise. prefetch_search: parameter -> as prefetch,
    but for every value that a search can give this parameter. by_hand: name -> a merge that searches are measured
    against. evolve_normalizes: the preset `evolve` sets `normalize`, as mergekit-evolve does for this method.
    like: another method -> the parameters that mean the same there, so that a search can begin at its recipes.

    derive(job, tensors): for methods that first make one expert of all, see derived.py. A pure function of a job and
    its inputs (float32, in the order of job.refs) to a new expert's weight for that tensor, float32 in the job's shape.
    It sees the parameters named in `deriving` alone; step then sees that expert as the job's only source, with the
    shared parameters, so only these can be searched without deriving anew.
    survey(jobs, read): for those where a tensor depends on others, by a threshold over the whole model, say. What it
    returns is given to `derive` as a third argument. Called once, before anything is derived; read(jobs) yields
    (job, inputs), one at a time in memory, for as many jobs and as often as is asked.

    needs: what it takes beside the models; of the words at the top of this module.
    """

    name: str
    summary: str
    reference: str
    parameters: dict[str, Parameter]
    step: Callable[[Job, Statistics], Step]
    base: str = "required"
    experts: tuple[int, int] = (1, MAX_EXPERTS)
    prefetch: Callable[[list[Job], Statistics], None] = lambda jobs, statistics: None
    stochastic: bool = False
    searched: tuple[str, ...] = ()
    prefetch_search: dict[str, Callable[[list[Job], Statistics], None]] = field(default_factory=dict)
    by_hand: dict[str, ByHand] = field(default_factory=dict)
    evolve_normalizes: bool = False
    like: dict[str, tuple[str, ...]] = field(default_factory=dict)

    derive: Callable[..., torch.Tensor] | None = None
    deriving: tuple[str, ...] = ()
    survey: Callable[..., Any] | None = None
    needs: str = NOTHING

    @property
    def result(self) -> str:
        """What it ends in."""
        return RECIPE if self.derive is None else DERIVED

    @property
    def genes(self) -> dict[str, Gene]:
        """The parameters that a search can vary, in the row's order."""
        return {name: parameter.gene for name, parameter in self.parameters.items() if parameter.gene is not None}

    def check_parameters(self, names, where: str) -> None:
        """Refuse parameters the method does not take."""
        for name in names:
            if name not in self.parameters:
                known = ", ".join(self.parameters) or "none"
                raise RecipeError(
                    f"{where}.{name}", f"{self.name} has no such parameter", known, nearest(name, self.parameters)
                )

    def validate(self, name: str, value: Any, where: str) -> Any:
        """The value in the parameter's type, within its bounds."""
        return self.parameters[name].validate(value, f"{where}.{name}")

    def looked_up(self, name: str, levels: Iterable[Mapping[str, Setting]], tensor: str, t: float, where: str) -> Any:
        """What a tensor at position t has of a parameter, in its type: the first level's that says one, else the
        default; REQUIRED where that is none. Between two whole numbers a gradient has the nearest one."""
        parameter = self.parameters[name]
        value = lookup(name, levels, tensor, t, parameter.default)
        if value is parameter.default:
            return value
        if parameter.kind is int and isinstance(value, float):
            value = round(value)
        return self.validate(name, value, where)


def _inputs(base: Any, others: tuple[Any, ...]) -> tuple[Any, ...]:
    return others if base is None else (base, *others)


def neutral(weights) -> np.ndarray:
    """Coefficients that keep everything: [K, FIELDS] from K weights, or [rows, K, FIELDS]."""
    weights = np.asarray(weights, dtype=np.float64)
    c = np.zeros((*weights.shape, FIELDS))
    c[..., WEIGHT] = weights
    c[..., RESCALE] = c[..., LO_SHARE] = c[..., HI_SHARE] = c[..., DENSITY] = 1.0
    c[..., HI] = np.inf
    return c
