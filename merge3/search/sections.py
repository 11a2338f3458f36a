"""The sections of an evolve configuration, beside its genome: one for each question that a search has to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from merge3.errors import RecipeError
from merge3.learn.settings import read_fit
from merge3.methods.learned import LEARNED, learned_named
from merge3.search.genome import Section
from merge3.search.optimizers import OPTIMIZERS
from merge3.space import SPACES

# Settings of a task that older runs did not know.
LATER = ("apply_chat_template", "system_instruction", "num_fewshot", "fewshot_as_multiturn", "gen_kwargs")
LATER_OF_OPTIMIZERS = ("prior", "asking", "rounds", "elites", "originals")


# Settings of a recipe's `fit:` that are the search's to say.
_NOT_A_FITS = ("items", "heldout", "seed", "apply_chat_template", "system_instruction", "check_every")


class Task(Section):
    """A set of items: a JSONL file, or by name a task, group or tag of lm-eval's.

    items: the file. head: the model whose head answers (classification). limit: of search items. too_long: what becomes
    of items that the base has no positions for. apply_chat_template, system_instruction, fewshot_as_multiturn,
    num_fewshot: None for the run's own. gen_kwargs: changes to an lm-eval task's generation arguments.
    """

    name: str | None = None
    items: str | None = None
    weight: float = 1.0
    metric: str | None = None
    head: str | None = None
    limit: int | None = Field(None, ge=1)
    too_long: Literal["error", "skip", "truncate_left"] = "error"
    apply_chat_template: bool | None = None
    system_instruction: str | None = None
    num_fewshot: int | None = Field(None, ge=0)
    fewshot_as_multiturn: bool | None = None
    gen_kwargs: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _check(self):
        if self.name is None and self.items is None:
            raise ValueError("neither a name of lm-eval's nor items: expected one of them, or both for a file's items")
        if self.items is not None:
            for key in ("num_fewshot", "fewshot_as_multiturn", "gen_kwargs"):
                if getattr(self, key):
                    raise ValueError(f"{key}: {getattr(self, key)}: items of a file bring their examples in the prompt")
        return self


class Extract(Section):
    """Which search items each candidate answers. size: per task. auto: irt where calibration pays, else all.

    renew: generations after which others are asked, so that a search does not fit itself to a few
    items; 0 for never.
    """

    method: Literal["auto", "all", "random", "irt", "correctness", "entropy", "information"] = "auto"
    size: int = Field(20, ge=1)
    renew: int = Field(1, ge=0)


class Estimate(Section):
    """How responses become fitness. auto: gmp-irt on chosen items, mean on all or random ones.

    calibration: a response file, or auto: the endpoints and `models` random merges answer, each a random
    `share` of the items. dimensions: of the item response model. check_every: generations
    between two spot checks, 0 for none.
    """

    method: Literal["auto", "mean", "p-irt", "gp-irt", "mp-irt", "gmp-irt"] = "auto"
    calibration: str = "auto"
    models: int = Field(24, ge=0)
    share: float = Field(1.0, gt=0, le=1)
    dimensions: int = Field(1, ge=1, le=8)
    check_every: int = Field(5, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class RaceSettings(Section):
    """The race among the best candidates at the end. share: of the search's answers it may cost at most. defend:
    whether a start that was given takes part, and is the result unless it is beaten."""

    candidates: int = Field(8, ge=0)
    share: float = Field(0.1, ge=0, le=1)
    defend: bool = False


class Optimizer(Section):
    """budget: candidates. population: per generation (default 4 + 3 ln d). sigma: share of a gene's range.
    surrogate: whether cma is told what a model of all estimates so far says, rather than each estimate;
    auto: where candidates answer a part of the items. prior: what is taken for granted of genes, see prior.py. asking:
    a generation at a time, or (steady) the next candidate when one is answered; auto: steady where there are several
    workers and the optimizer can. rounds: searches that share the budget, each of merges of the `elites` of the one
    before, and of the models themselves too where `originals`."""

    name: Literal[tuple(OPTIMIZERS)] = "cma"
    budget: int = Field(300, ge=1)
    population: int | None = Field(None, ge=2)
    sigma: float = Field(1 / 6, gt=0, le=1)
    seed: int = Field(0, ge=0)
    surrogate: bool | Literal["auto"] = "auto"
    prior: Literal["none", "norms"] = "none"
    asking: Literal["auto", "generations", "steady"] = "auto"
    rounds: int = Field(1, ge=1)
    elites: int = Field(3, ge=1)
    originals: bool = False

    def identity(self) -> str:
        """Names the optimizer of a run, as JSON: without settings that came later and are not used."""
        unused = {key for key in LATER_OF_OPTIMIZERS if getattr(self, key) == Optimizer.model_fields[key].default}
        return self.model_dump_json(exclude=unused)

    @model_validator(mode="after")
    def _prior(self):
        if self.prior != "none" and not OPTIMIZERS[self.name].steps:
            able = ", ".join(name for name, row in OPTIMIZERS.items() if row.steps)
            raise ValueError(f"prior: {self.prior} with {self.name}, which has no steps; expected {able}")
        return self

    @model_validator(mode="after")
    def _steady(self):
        if self.asking == "steady" and not OPTIMIZERS[self.name].steady:
            able = ", ".join(name for name, row in OPTIMIZERS.items() if row.steady)
            raise ValueError(f"asking: steady with {self.name}; expected generations, or another optimizer: {able}")
        return self


class Heldout(Section):
    """The share of every task's items that the search never sees."""

    fraction: float = Field(0.3, ge=0, lt=1)


class Stage(Section):
    """One of several searches in a run. optimizer: settings that are others than the run's."""

    space: Literal[tuple(SPACES)]
    optimizer: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"space": data} if isinstance(data, str) else data


def fit_section(data: Any) -> dict[str, Any]:
    """`fit:`, checked: `method`, and settings as in a recipe's. Raises ValueError naming the key."""
    if isinstance(data, str):
        data = {"method": data}
    if not isinstance(data, Mapping):
        raise ValueError(f"fit: found {type(data).__name__}, expected a learned method, or a mapping with `method`")
    data = dict(data)
    data["method"] = data.get("method", next(iter(LEARNED)))
    if not isinstance(data["method"], str):
        raise ValueError(f"fit.method: found {type(data['method']).__name__}, expected one of {', '.join(LEARNED)}")
    for key in data:
        if key in _NOT_A_FITS:
            raise ValueError(f"fit.{key}: given, and the search says it: expected settings of how weights are learned")
    if data.get("groups") is not None:
        raise ValueError("fit.groups: in a search: expected none, or `merge3-client fit` and its fitted.yaml as start")
    try:
        method = learned_named(data["method"], "fit.method")
        if method.survivors:
            able = ", ".join(name for name, row in LEARNED.items() if not row.survivors)
            raise ValueError(f"fit.method: {method.name} makes experts of its own: expected one of {able}")
        read_fit({key: value for key, value in data.items() if key != "method"}, "fit").of(method)
    except RecipeError as error:
        raise ValueError(str(error)) from None
    return data


def forget_defaults(data: dict[str, Any], section: type[Section], keys: Sequence[str]) -> None:
    """Settings that came later name no run anew that does not use them."""
    for key in keys:
        if data[key] == section.model_fields[key].default:
            del data[key]
