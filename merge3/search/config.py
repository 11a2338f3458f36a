"""The evolve configuration: mergekit-evolve's files as they are, and what merge3 adds to them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from merge3.errors import ConfigError
from merge3.fitness import OBJECTIVES
from merge3.methods import METHODS, gene_names
from merge3.recipe import load_yaml, nearest
from merge3.registration import ACCURACY
from merge3.search.optimizers import OPTIMIZERS
from merge3.space import PRESETS, SPACES, SpaceDefinition

_OTHER_NAMES = {"method": "merge_method", "base": "base_model", "kind": "space"}  # of a definition's fields


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Genome(_Section):
    """What to search over; names as in mergekit-evolve, then ours (space, preset, genes, bounds, dtype, tower)."""

    models: tuple[str, ...] = Field(min_length=1)
    merge_method: str
    base_model: str | None = None
    layer_granularity: int = 0
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: tuple[str, ...] = ()
    smooth: bool = False
    tokenizer_source: str | None = None
    space: Literal[tuple(SPACES)] = "parameters"
    preset: Literal[tuple(PRESETS)] = "layerwise"
    genes: tuple[str, ...] = ()
    bounds: dict[str, tuple[float, float]] = {}
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    tower: dict[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _check(self):
        if self.merge_method not in METHODS:
            hint = nearest(self.merge_method, METHODS)
            raise ValueError(f"merge_method: unknown method {self.merge_method!r}" + (f" ({hint})" if hint else ""))
        for gene, (low, high) in self.bounds.items():
            if gene not in gene_names():
                raise ValueError(f"bounds: unknown gene {gene!r}, expected one of {', '.join(gene_names())}")
            if not low < high:
                raise ValueError(f"bounds: {gene} from {low} to {high}, expected low < high")
        return self

    def definition(self) -> SpaceDefinition:
        """The section as a space is opened with."""
        names = [field.name for field in fields(SpaceDefinition)]
        return SpaceDefinition(**{name: getattr(self, _OTHER_NAMES.get(name, name)) for name in names})


class Task(_Section):
    """A set of items. items: a JSONL file. head: the model whose head answers (classification). limit: of search items.
    too_long: what becomes of items that the base has no positions for."""

    name: str | None = None
    items: str | None = None
    weight: float = 1.0
    metric: str | None = None
    head: str | None = None
    limit: int | None = Field(None, ge=1)
    too_long: Literal["error", "skip", "truncate_left"] = "error"

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data


class Extract(_Section):
    """Which search items each candidate answers. size: per task. auto: irt where calibration pays, else all.

    renew: generations after which others are asked, so that a search does not fit itself to a few
    items; 0 for never.
    """

    method: Literal["auto", "all", "random", "irt", "correctness", "entropy", "information"] = "auto"
    size: int = Field(20, ge=1)
    renew: int = Field(1, ge=0)


class Estimate(_Section):
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


class RaceSettings(_Section):
    """The race among the best candidates at the end. share: of the search's answers it may cost at most."""

    candidates: int = Field(8, ge=0)
    share: float = Field(0.1, ge=0, le=1)


class Optimizer(_Section):
    """budget: candidates. population: per generation (default 4 + 3 ln d). sigma: share of a gene's range.
    surrogate: whether cma is told what a model of all estimates so far says, rather than each estimate;
    auto: where candidates answer a part of the items."""

    name: Literal[tuple(OPTIMIZERS)] = "cma"
    budget: int = Field(300, ge=1)
    population: int | None = Field(None, ge=2)
    sigma: float = Field(1 / 6, gt=0, le=1)
    seed: int = Field(0, ge=0)
    surrogate: bool | Literal["auto"] = "auto"


class Heldout(_Section):
    """The share of every task's items that the search never sees."""

    fraction: float = Field(0.3, ge=0, lt=1)


class EvolveConfig(_Section):
    """A whole run. Paths are resolved against the file's folder."""

    genome: Genome
    tasks: tuple[Task, ...] = Field(min_length=1)
    extract: Extract = Extract()
    estimate: Estimate = Estimate()
    optimizer: Optimizer = Optimizer()
    race: RaceSettings = RaceSettings()
    heldout: Heldout = Heldout()
    objective: Literal[tuple(OBJECTIVES)] = ACCURACY
    random_init: bool = False
    apply_chat_template: bool = False
    # mergekit-evolve's lm-eval settings. limit: of each task's search items, the first or (shuffle) random ones.
    limit: int | None = Field(None, ge=1)
    shuffle: bool = False
    num_fewshot: int | None = None
    fewshot_as_multiturn: bool = False

    @model_validator(mode="after")
    def _no_fewshot(self):
        for key in ("num_fewshot", "fewshot_as_multiturn"):
            if getattr(self, key):
                raise ValueError(
                    f"{key}: {getattr(self, key)}: items bring their worked examples in the prompt; leave it out"
                )
        return self

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
        if not self.genome.tower:  # likewise
            del data["genome"]["tower"]
        data["genome"]["tokenizer_source"] = place.get(self.genome.tokenizer_source, self.genome.tokenizer_source)
        for task in data["tasks"]:
            task |= {"items": None, "head": place.get(task["head"], task["head"])}
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


def load_config(path: str | Path, skip_too_long: bool = False, **overrides: Any) -> EvolveConfig:
    """Read a configuration file. overrides: optimizer settings from the command line, None to keep.
    skip_too_long: `too_long: skip` for every task that does not say what else.

    Raises ConfigError naming file and key; a clear refusal for lm-eval task names.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(path, error.strerror or str(error), "an evolve configuration") from None
    data = load_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(path, f"found {type(data).__name__}", "a mapping with `genome` and `tasks`")
    changes = {k: v for k, v in overrides.items() if v is not None}
    if changes:
        data["optimizer"] = {**(data.get("optimizer") or {}), **changes}
    try:
        config = EvolveConfig.model_validate(data)
    except ValidationError as error:
        raise _readable(path, error) from None
    return _resolved(config, path.parent, path, skip_too_long)


def _resolved(config: EvolveConfig, folder: Path, path: Path, skip_too_long: bool) -> EvolveConfig:
    data = config.model_dump()
    genome = data["genome"]
    genome["models"] = [_model_path(m, folder) for m in genome["models"]]
    if genome["base_model"]:
        genome["base_model"] = _model_path(genome["base_model"], folder)
    if genome["tokenizer_source"] not in (None, "base", "union"):
        genome["tokenizer_source"] = _model_path(genome["tokenizer_source"], folder)
    for i, task in enumerate(data["tasks"]):
        if task["items"] is None:
            raise ConfigError(
                f"{path}: tasks[{i}]",
                f"{task['name']!r} names an lm-eval task, which merge3 cannot run yet",
                "items: file.jsonl",
            )
        task["items"] = str((folder / task["items"]).resolve())
        if task["head"]:
            task["head"] = _model_path(task["head"], folder)
        if skip_too_long and task["too_long"] == "error":
            task["too_long"] = "skip"
    if data["estimate"]["calibration"] != "auto":
        data["estimate"]["calibration"] = str((folder / data["estimate"]["calibration"]).resolve())
    return EvolveConfig.model_validate(data)


def _content(path: Path) -> str:
    """A digest of a file, or of a folder's files."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.exists() else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _model_path(model: str, folder: Path) -> str:
    """Local paths become absolute, hub ids stay; each side of `model+adapter` by itself."""
    parts = []
    for part in model.split("+"):
        local = (folder / Path(part).expanduser()).resolve()
        parts.append(str(local) if local.exists() or part.startswith((".", "/", "~")) else part)
    return "+".join(parts)


def _readable(path: Path, error: ValidationError) -> ConfigError:
    """The first problem as one line, with the nearest valid key for an unknown one."""
    first = error.errors()[0]
    where = ".".join(str(p) for p in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        section: Any = EvolveConfig
        for part in first["loc"][:-1]:
            if isinstance(part, str):
                section = section.model_fields[part].annotation
        fields = getattr(section, "model_fields", None) or Task.model_fields
        key = first["loc"][-1]
        return ConfigError(f"{path}: {where}", "unknown key", ", ".join(fields), nearest(str(key), fields))
    if first["type"] == "missing":
        return ConfigError(f"{path}: {where}", "missing", "a value")
    if first["type"] == "literal_error":
        hint = "several objectives are not available yet" if where == "objective" else ""
        return ConfigError(f"{path}: {where}", f"found {first['input']!r}", first["ctx"]["expected"], hint)
    if not first["loc"]:
        return ConfigError(path, message)
    found = "" if isinstance(first["input"], dict) else f"found {first['input']!r}: "
    return ConfigError(f"{path}: {where}", f"{found}{message}")
