"""study.yaml: which methods, how many experts, which worlds. Read, located, checked as far as no model is needed."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError, field_validator

from merge3.errors import BadInput, ConfigError
from merge3.methods import METHODS, Method, method_named
from merge3.methods.base import DERIVED, NOTHING, RECIPE, ForModels, for_models
from merge3.parameters import scalars
from merge3.recipe import DTYPES, ModelRef, Recipe, Slice, Source, load_yaml, nearest
from merge3.search.baselines import defaults
from merge3.search.genome import Section
from merge3.search.places import model_path
from merge3.search.seeds import seed_of


class StudyMethod(Section):
    """A method as its row has it, or with parameters as a recipe's. name: in tables."""

    merge_method: str
    name: str = Field("", max_length=60)
    parameters: dict[str, Any] = {}

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.name or self.merge_method


class World(Section):
    """A base, an expert for each task, and items. width, quality: what the world is an example of. heldout: tasks that
    measure what merges were not made for; None: all that are no expert's or, where there are none, those of the experts
    that a merge leaves out. heads: task -> the model whose head answers it, of tasks that are no expert's."""

    name: str = Field(min_length=1, max_length=60)
    base: str
    experts: dict[str, str] = Field(min_length=1)
    items: tuple[str, ...] = Field(min_length=1)
    width: float | None = Field(None, gt=0, allow_inf_nan=False)
    quality: str | None = None
    heldout: tuple[str, ...] | None = None
    heads: dict[str, str] = {}

    @field_validator("items", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def models(self) -> list[str]:
        """Every model once, base first."""
        return list(dict.fromkeys([self.base, *self.experts.values(), *self.heads.values()]))


class StudyConfig(Section):
    """subsets: how many sets of experts are drawn for each number of them. tune: parameter -> values, of which each
    merge takes what is best on a share of the items, `tune_share`, which then measures nothing."""

    methods: tuple[StudyMethod, ...] = Field(min_length=1)
    experts: tuple[int, ...] = Field(min_length=1)
    subsets: int = Field(3, ge=1, le=1000)
    worlds: tuple[World, ...] = Field(min_length=1)
    tune: dict[str, tuple[float, ...]] = {}
    tune_share: float = Field(0.3, gt=0, lt=1)
    seed: int = Field(0, ge=0)
    limit: int | None = Field(None, ge=1)
    dtype: str | None = None

    @field_validator("methods", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [{"merge_method": entry} if isinstance(entry, str) else entry for entry in value]

    def hash(self) -> str:
        """Names the study. Paths are no part of it: a folder that was moved is the same."""
        data = self.model_dump(mode="json")
        for world in data["worlds"]:
            world |= {"base": "", "items": [], "experts": list(world["experts"]), "heads": list(world["heads"])}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    def settings(self, method: StudyMethod, count: int) -> list[dict[str, Any]]:
        """The parameters of each merge that is tried: its own, else its row's, with each combination that is tuned."""
        row = METHODS[method.merge_method]
        start = method.parameters or _of_count(defaults(row), count)
        tuned = {name: values for name, values in self.tune.items() if name in row.parameters}
        found = []
        for values in itertools.product(*tuned.values()):
            found.append(start | dict(zip(tuned, values)))
        return found


def _of_count(parameters: Mapping[str, ForModels], count: int) -> dict[str, Any]:
    return {name: for_models(value, count) for name, value in parameters.items()}


def recipe_of(
    config: StudyConfig, method: StudyMethod, world: World, subset: Sequence[str], parameters: dict
) -> Recipe:
    """The merge of some of a world's experts, all alike."""
    needs_base = METHODS[method.merge_method].base == "required"
    sources = tuple(Source(ModelRef.parse(world.experts[task])) for task in subset)
    base = ModelRef.parse(world.base) if needs_base else None
    return Recipe(method.merge_method, (Slice(sources),), base, parameters, config.dtype)


def subsets_of(experts: Sequence[str], count: int, wanted: int, seed: int) -> list[tuple[str, ...]]:
    """`wanted` different sets of so many experts, drawn; all there are where there are no more. Equal for worlds with
    equal experts, whatever their order."""
    names = sorted(experts)
    if wanted >= math.comb(len(names), count):
        return list(itertools.combinations(names, count))
    rng = np.random.default_rng(seed_of("study subset", seed, count))
    found: dict[tuple[str, ...], None] = {}
    while len(found) < wanted:
        found[tuple(names[i] for i in sorted(rng.permutation(len(names))[:count]))] = None
    return list(found)


def read_study(path: str | Path) -> StudyConfig:
    """Raises ConfigError naming file and key."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(path, getattr(error, "strerror", None) or "not UTF-8", "a study's YAML") from None
    data = load_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(path, f"found {type(data).__name__}", "a mapping with `methods`, `experts` and `worlds`")
    try:
        config = StudyConfig.model_validate(data)
    except ValidationError as error:
        raise _readable(path, error) from None
    _check(config, str(path))
    worlds = []
    for world in config.worlds:
        files = tuple(str((path.parent / Path(item).expanduser()).resolve()) for item in world.items)
        located = {key: model_path(model, path.parent) for key, model in world.experts.items()}
        heads = {key: model_path(model, path.parent) for key, model in world.heads.items()}
        paths = {"base": model_path(world.base, path.parent), "experts": located, "heads": heads, "items": files}
        worlds.append(world.model_copy(update=paths))
    return config.model_copy(update={"worlds": tuple(worlds)})


def _check(config: StudyConfig, where: str) -> None:
    """What no file is needed for. Raises ConfigError."""
    _different(f"{where}: methods", [method.label for method in config.methods])
    _different(f"{where}: worlds", [world.name for world in config.worlds])
    _different(f"{where}: experts", config.experts)
    if config.dtype is not None and config.dtype not in DTYPES:
        raise ConfigError(f"{where}: dtype", f"found {config.dtype!r}", ", ".join(DTYPES))
    for world in config.worlds:
        at = f"{where}: world {world.name!r}"
        _different(f"{at}: experts", list(world.experts.values()))
        if world.base in world.experts.values():
            raise ConfigError(f"{at}: base", f"{world.base} is an expert too", "a model that is not merged")
        for count in config.experts:
            if not 1 <= count <= len(world.experts):
                expected = f"1 to {len(world.experts)}, as many as world {world.name!r} has"
                raise ConfigError(f"{where}: experts", f"found {count}", expected)
    rows = [_row(method, config, where) for method in config.methods]
    for name, values in config.tune.items():
        _different(f"{where}: tune.{name}", values)
        if not any(name in row.parameters for row in rows):
            known = dict.fromkeys(p for row in rows for p in row.parameters)
            raise ConfigError(f"{where}: tune.{name}", "no method has it", ", ".join(known), nearest(name, known))
        if not values:
            raise ConfigError(f"{where}: tune.{name}", "no values", "some")


def _row(method: StudyMethod, config: StudyConfig, where: str) -> Method:
    """The method's row. Raises ConfigError, or RecipeError, for what it does not take."""
    at = f"{where}: methods: {method.label}"
    row = method_named(method.merge_method, at)
    if row.needs != NOTHING or row.result not in (RECIPE, DERIVED):
        raise ConfigError(at, f"needs {row.needs}, result: {row.result}", "a method that makes one model of models")
    low, high = row.experts
    for count in config.experts:
        if not low <= count <= high:
            raise ConfigError(at, f"{count} experts", f"{low} to {high} for this method" if low < high else f"{low}")
    row.check_parameters(method.parameters, at)
    for name, setting in method.parameters.items():
        if name in config.tune:
            raise ConfigError(f"{at}.{name}", "given, and tuned", "one of them")
        for value in scalars(setting):
            row.validate(name, value, at)
    for name, values in config.tune.items():
        for value in values if name in row.parameters else ():
            row.validate(name, value, f"{where}: tune")
    return row


def _different(where: str, names: Sequence[Any]) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise ConfigError(where, f"{name!r} twice", "different ones")


def _readable(path: Path, error: ValidationError) -> ConfigError:
    """The first problem as one line."""
    first = error.errors()[0]
    where = f"{path}: {'.'.join(map(str, first['loc']))}"
    if first["type"] == "extra_forbidden":
        section: Any = StudyConfig
        for part, inner in (("worlds", World), ("methods", StudyMethod)):
            section = inner if first["loc"][0] == part and len(first["loc"]) > 1 else section
        fields = section.model_fields
        return ConfigError(where, "unknown key", ", ".join(fields), nearest(str(first["loc"][-1]), fields))
    if first["type"] == "missing":
        return ConfigError(where, "missing", "a value")
    said = first["msg"].removeprefix("Value error, ")
    return ConfigError(where, f"found {first['input']!r}"[:100], said)


def files_of(world: World, where: str) -> Iterator[Path]:
    """The files of a world's items; of a folder all of its. Raises BadInput for a folder without any."""
    for item in world.items:
        place = Path(item)
        if not place.is_dir():
            yield place
            continue
        found = sorted(place.glob("*.jsonl"))
        if not found:
            raise BadInput(f"{where}: items", f"no .jsonl in {place}", "files of items")
        yield from found
