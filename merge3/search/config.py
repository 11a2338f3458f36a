"""The evolve configuration: mergekit-evolve's files as they are, and what merge3 adds to them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from merge3.errors import BadInput
from merge3.experts import Experts
from merge3.fitness import OBJECTIVES
from merge3.methods.learned import RESULT
from merge3.registration import ACCURACY, check_weights
from merge3.search.genome import Genome, Section
from merge3.search.optimizers import OPTIMIZERS
from merge3.search.sections import (
    LATER,
    LATER_OF_OPTIMIZERS,
    Estimate,
    Extract,
    Heldout,
    Optimizer,
    RaceSettings,
    Stage,
    Task,
    fit_section,
    forget_defaults,
)
from merge3.search.succession import check_settings
from merge3.space import AROUND, PATH, SpaceDefinition

NEAR = 0.03  # sigma of a search that begins at a fit


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
    fit: dict[str, Any] | None = None  # what the search begins at, learned from its items; see fit_first.py
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

    @model_validator(mode="before")
    @classmethod
    def _around_a_fit(cls, data: Any) -> Any:
        """What a fit has found is kept, and left in small steps, where nothing else is said; and where the first
        candidate is what it has found, it is defended."""
        if not isinstance(data, dict) or data.get("fit") is None or data.get("stages"):
            return data
        data = data | {"fit": fit_section(data["fit"])}
        genome = data.get("genome")
        itself = isinstance(genome, dict) and genome.get("merge_method") == RESULT
        itself = itself and genome.get("space") in (None, AROUND)
        usual = ("genome", "space", AROUND), ("optimizer", "sigma", NEAR), ("race", "defend", itself)
        for section, key, value in usual:
            said = {} if data.get(section) is None else data[section]
            if isinstance(said, dict) and said.get(key) is None:
                data[section] = said | {key: value}
        return data

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
        if self.genome.space == AROUND and self.genome.start is None and self.fit is None:
            expected = "a recipe, such as the fitted.yaml of a fit, or `fit:`"
            raise ValueError(f"genome.space: {AROUND}, and no start: expected {expected}")
        if self.fit is None:
            return self
        for where, given in (("genome.start", self.genome.start), ("random_init", self.random_init or None)):
            if given is not None:
                raise ValueError(f"fit: beside {where}: expected one of them")
        if self.stages or self.genome.space == PATH:
            raise ValueError("fit: in a search for a path: expected a search over parameters")
        if self.optimizer.rounds > 1:
            raise ValueError(f"fit: beside optimizer.rounds ({self.optimizer.rounds}): expected one of them")
        if self.genome.base_model is None:
            raise ValueError("fit: without genome.base_model, whose changes are weighed: expected one")
        return self

    @model_validator(mode="after")
    def _weights(self):
        weights = {f"tasks.{place}": task.weight for place, task in enumerate(self.tasks)}
        check_weights(weights, weights)
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
        if self.fit is not None:  # it says what the start is
            data["genome"]["start"] = None
        elif self.genome.start is not None:
            data["genome"]["start"] = _content(Path(self.genome.start))
        for key in ("tokenizer", "chat_template", "tower", "start", "pinned", "max_hops"):  # as above
            if not data["genome"][key]:
                del data["genome"][key]
        forget_defaults(data["genome"], Genome, ("repetitions",))
        if not self.stages:
            del data["stages"]
        forget_defaults(data, EvolveConfig, ("fit",))
        del data["task_path"], data["logging"], data["experts"]
        for task in data["tasks"]:
            task |= {"items": None, "head": place.get(task["head"], task["head"])}
        forget_defaults(data, EvolveConfig, ("system_instruction",))
        if not self.objectives:
            del data["objectives"]
        forget_defaults(data["optimizer"], Optimizer, LATER_OF_OPTIMIZERS)
        forget_defaults(data["race"], RaceSettings, ("defend",))
        for task in data["tasks"]:
            forget_defaults(task, Task, LATER)
        if self.estimate.calibration != "auto":
            data["estimate"]["calibration"] = _content(Path(self.estimate.calibration))
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The whole configuration, defaults filled in; without the start that a fit has found."""
        data = self.model_dump(mode="json")
        if self.fit is not None:
            data["genome"]["start"] = None
        return yaml.safe_dump(data, sort_keys=False)

    @property
    def models(self) -> tuple[str, ...]:
        """Every model to open, base first."""
        base = (self.genome.base_model,) if self.genome.base_model else ()
        return tuple(dict.fromkeys((*base, *self.genome.models)))


def _content(path: Path) -> str:
    """A digest of a file, or of a folder's files."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.exists() else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
