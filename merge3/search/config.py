"""The evolve configuration: mergekit-evolve's files as they are, and what merge3 adds to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from merge3.errors import BadInput
from merge3.experts import Experts
from merge3.fitness import OBJECTIVES
from merge3.registration import ACCURACY
from merge3.search.genome import Genome, Section
from merge3.search.optimizers import OPTIMIZERS
from merge3.search.succession import check_settings
from merge3.space import PATH, SPACES, SpaceDefinition

# Settings of a task that older runs did not know.
_LATER = ("apply_chat_template", "system_instruction", "num_fewshot", "fewshot_as_multiturn", "gen_kwargs")
_LATER_OF_OPTIMIZERS = ("prior", "asking", "rounds", "elites", "originals")


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
    """The race among the best candidates at the end. share: of the search's answers it may cost at most."""

    candidates: int = Field(8, ge=0)
    share: float = Field(0.1, ge=0, le=1)


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
        unused = {key for key in _LATER_OF_OPTIMIZERS if getattr(self, key) == Optimizer.model_fields[key].default}
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


class EvolveConfig(Section):
    """A whole run. Paths are resolved against the file's folder. stages: one search after another, each from the
    winner of the one before; none: one search of `genome.space`. experts: how they are held in memory; None: as they
    are, or as the daemon that holds them was told. What a run is known by says it, whoever decided it."""

    genome: Genome
    stages: tuple[Stage, ...] = ()
    tasks: tuple[Task, ...] = Field(min_length=1)
    extract: Extract = Extract()
    estimate: Estimate = Estimate()
    optimizer: Optimizer = Optimizer()
    race: RaceSettings = RaceSettings()
    heldout: Heldout = Heldout()
    objective: Literal[tuple(OBJECTIVES)] = ACCURACY
    objectives: tuple[str, ...] = ()  # rows of OBJECTIVES and tasks; none: `objective` alone
    random_init: bool = False  # instead of the uniform merge or `genome.start`
    # mergekit-evolve's lm-eval settings, of every task that has none of its own. limit: of each task's search items,
    # the first or (shuffle) random ones. task_path: folders of lm-eval tasks beside lm-eval's own.
    apply_chat_template: bool = False
    system_instruction: str | None = None
    limit: int | None = Field(None, ge=1)
    shuffle: bool = False
    num_fewshot: int | None = Field(None, ge=0)
    fewshot_as_multiturn: bool = False
    task_path: tuple[str, ...] = ()
    experts: str | None = None  # full, residual[:density] or int8
    logging: tuple[str, ...] = ()  # names of client/loggers.py

    @model_validator(mode="before")
    @classmethod
    def _one_path(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return data | {key: [data[key]] for key in ("task_path", "logging") if isinstance(data.get(key), str)}

    @field_validator("experts")
    @classmethod
    def _held(cls, text: str | None) -> str | None:
        try:
            return None if text is None else str(Experts.parse(text))
        except BadInput as error:
            raise ValueError(f"{error.found}; expected {error.expected}") from None

    @model_validator(mode="after")
    def _one_start(self):
        if self.random_init and self.genome.start is not None:
            raise ValueError(f"random_init: true beside genome.start ({self.genome.start}): expected one of them")
        return self

    @model_validator(mode="after")
    def _stages(self):
        if not self.stages:
            of_path = ("repetitions", "pinned", "max_hops")
            said = [key for key in of_path if getattr(self.genome, key) != Genome.model_fields[key].default]
            if said and self.genome.space != PATH:
                raise ValueError(f"genome.{said[0]}: of a path: expected `space: {PATH}`, or stages with one")
            return self
        found = [stage.space for stage in self.stages]
        if found != [SpaceDefinition.kind, PATH]:
            raise ValueError(f"stages: found {', '.join(found)}, expected {SpaceDefinition.kind}, then {PATH}")
        if self.genome.space != SpaceDefinition.kind:
            raise ValueError(f"genome.space: {self.genome.space} beside stages, which say the spaces: leave it out")
        if self.genome.recipe_tokenizer() or self.genome.tower:
            raise ValueError("stages: beside a tokenizer or tower of the genome's: expected models that share theirs")
        for stage in self.stages:
            self._optimizer(stage)
        return self

    def _optimizer(self, stage: Stage) -> Optimizer:
        """A stage's. A prior is of parameters, and no path's."""
        run = self.optimizer.model_dump() | ({} if stage.space == SpaceDefinition.kind else {"prior": "none"})
        return Optimizer.model_validate(run | stage.optimizer)

    @model_validator(mode="after")
    def _prior_of_parameters(self):
        paths = [self.optimizer] if self.genome.space == PATH else []
        paths += [self._optimizer(stage) for stage in self.stages if stage.space == PATH]
        if any(optimizer.prior != "none" for optimizer in paths):
            raise ValueError("optimizer.prior: norms of a path, which moves no weights; expected none")
        return self

    @model_validator(mode="after")
    def _no_fewshot(self):
        for key in ("num_fewshot", "fewshot_as_multiturn"):
            if getattr(self, key) and any(task.items is not None for task in self.tasks):
                raise ValueError(
                    f"{key}: {getattr(self, key)}: items of a file bring their worked examples in the prompt; "
                    "set it at the tasks of lm-eval's, or leave it out"
                )
        return self

    def of_stage(self, number: int) -> EvolveConfig:
        """With the optimizer of one stage; itself where there are no stages."""
        if not self.stages:
            return self
        return self.model_copy(update={"optimizer": self._optimizer(self.stages[number])})

    @model_validator(mode="after")
    def _objectives(self):
        if self.objectives and self.objective != ACCURACY:
            raise ValueError(f"objective: {self.objective} beside objectives: expected one of them")
        row, count = OPTIMIZERS[self.optimizer.name], len(self.names)
        if count < row.least or (row.most is not None and count > row.most):
            fit = [name for name, one in OPTIMIZERS.items() if one.least <= count <= (one.most or count)]
            given = f"{count} objectives ({', '.join(self.names)})" if count > 1 else f"one objective ({self.names[0]})"
            expected = f"expected {row.takes()}, or another optimizer: {', '.join(fit)}"
            raise ValueError(f"optimizer.name: {self.optimizer.name} with {given}; {expected}")
        return self

    @model_validator(mode="after")
    def _rounds(self):
        check_settings(self)
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Of the objectives, the first one first."""
        return self.objectives or (self.objective,)

    def of_task(self, task: Task, key: str) -> Any:
        """A setting of a task's, or the run's where the task has none. key: apply_chat_template and its like."""
        own = getattr(task, key)
        return getattr(self, key) if own is None else own

    def hash(self) -> str:
        """Names the run this configuration makes, wherever its files lie: models count by their place, and what is in
        files by their content, elsewhere too."""
        data = self.model_dump(mode="json")
        place = {model: f"model {i}" for i, model in enumerate(self.models)}
        data["genome"] |= {
            "models": [place[m] for m in self.genome.models],
            "base_model": place.get(self.genome.base_model),
        }
        if self.genome.space == SpaceDefinition.kind:  # so that runs begun before there were kinds can be continued
            del data["genome"]["space"]
        data["genome"] |= {"tokenizer_source": None, "tokenizer": None}
        if tokenizer := self.genome.recipe_tokenizer():
            data["genome"] |= tokenizer.renamed(lambda model: place.get(model, model)).to_dict()
        if self.genome.start is not None:
            data["genome"]["start"] = _content(Path(self.genome.start))
        for key in ("tokenizer", "chat_template", "tower", "start", "pinned", "max_hops"):  # as above
            if not data["genome"][key]:
                del data["genome"][key]
        _forget_defaults(data["genome"], Genome, ("repetitions",))
        if not self.stages:
            del data["stages"]
        del data["task_path"], data["logging"], data["experts"]
        for task in data["tasks"]:
            task |= {"items": None, "head": place.get(task["head"], task["head"])}
        _forget_defaults(data, EvolveConfig, ("system_instruction",))
        if not self.objectives:
            del data["objectives"]
        _forget_defaults(data["optimizer"], Optimizer, _LATER_OF_OPTIMIZERS)
        for task in data["tasks"]:
            _forget_defaults(task, Task, _LATER)
        if self.estimate.calibration != "auto":
            data["estimate"]["calibration"] = _content(Path(self.estimate.calibration))
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The whole configuration, defaults filled in."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @property
    def models(self) -> tuple[str, ...]:
        """Every model to open, base first."""
        base = (self.genome.base_model,) if self.genome.base_model else ()
        return tuple(dict.fromkeys((*base, *self.genome.models)))


def _forget_defaults(data: dict[str, Any], section: type[Section], keys: Sequence[str]) -> None:
    """Settings that came later name no run anew that does not use them."""
    for key in keys:
        if data[key] == section.model_fields[key].default:
            del data[key]


def _content(path: Path) -> str:
    """A digest of a file, or of a folder's files."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.exists() else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
