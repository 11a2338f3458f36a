"""The `fit:` section of a recipe, and `surgery:`; read at the file's boundary, frozen, without unknown keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from merge3.errors import RecipeError
from merge3.learn.coefficients import BOUNDS, LEVELS, check_start
from merge3.learn.zip_matching import ALPHA, BETA
from merge3.methods.learned import Learned
from merge3.recipe import nearest

_NUMBER = "a number or a text, as the key has it"
MOST_RATE = 1e6  # steps of Adam are numbers of float32


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _no_yes_for_one(cls, data: Any) -> Any:
        """YAML's `yes` is no number, and numbers have no thousands of digits."""
        if isinstance(data, Mapping):
            for key, value in data.items():
                known = cls.model_fields.get(key)
                if isinstance(value, bool) and known is not None and known.annotation is not bool:
                    raise ValueError(f"{key}: found {str(value).lower()}, expected {_NUMBER}")
                if isinstance(value, int) and abs(value) >= 2**63:
                    raise ValueError(f"{key}: found a number of {len(f'{abs(value):x}')} hexadecimal digits")
        return data


class TaskItems(_Section):
    """Items that a fit learns from. items: a JSONL file. model: the task's own expert, whose head answers and whose
    outputs are matched (default: with as many files as models, the one in the same place). name: of the task."""

    items: str
    model: str | None = None
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"items": data} if isinstance(data, str) else data


class Groups(_Section):
    """Hierarchical SuperMerge. size: models that are merged at once; experts: which ones, instead (lists of models).
    by: how groups of `size` are found, by the cosine of task vectors or in the order of `models`."""

    size: int | None = Field(None, ge=2)
    experts: tuple[tuple[str, ...], ...] | None = None
    by: Literal["cosine", "order"] = "cosine"

    @model_validator(mode="after")
    def _one(self):
        if (self.size is None) == (self.experts is None):
            raise ValueError("expected exactly one of size and experts")
        return self


class _Learning(_Section):
    """per_task: items of each task, drawn by the seed, that are learned from. heldout: the share of every task's items
    that is never learned from and measures the result, as in searches. check_every: steps between two measurements;
    None: ten in all, 0: none but the last."""

    items: tuple[TaskItems, ...] = Field((), max_length=256)
    per_task: int = Field(32, ge=1)
    heldout: float = Field(0.3, ge=0, lt=1)
    seed: int = Field(0, ge=0, lt=2**63)
    apply_chat_template: bool = False
    system_instruction: str | None = None


class FitSettings(_Learning):
    """steps, learning_rate, bound, start: None for the method's own. batch: items of each task in a step. over: what
    expert_kl compares where a text is continued, every token of the expert's answer or the next one alone. trim: the
    share of task vectors that adamerging++ keeps."""

    steps: int | None = Field(None, ge=1)
    learning_rate: float | None = Field(None, gt=0, le=MOST_RATE)
    level: Literal[tuple(LEVELS)] = "tensor"
    bound: Literal[tuple(BOUNDS)] | None = None
    start: float | None = Field(None, allow_inf_nan=False)
    batch: int = Field(16, ge=1)
    over: Literal["answer", "next"] = "answer"
    trim: float = Field(0.2, gt=0, le=1)
    check_every: int | None = Field(None, ge=0)
    groups: Groups | None = None

    @model_validator(mode="after")
    def _one_level(self):
        if self.groups is not None and self.level == "task":
            raise ValueError("level: task: with groups every tensor has a weight of its own; expected tensor or layer")
        return self

    @model_validator(mode="before")
    @classmethod
    def _groups(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("groups"), list):
            return data | {"groups": {"experts": data["groups"]}}
        return data

    def of(self, method: Learned) -> FitSettings:
        """With the method's own values where nothing is said. Raises RecipeError for a start out of the bound."""
        own = {key: getattr(method, key) for key in ("steps", "learning_rate", "bound", "start")}
        said = {key: value for key in own if (value := getattr(self, key)) is not None}
        check_start(said.get("bound", method.bound), said.get("start", method.start), "fit: start")
        return self.model_copy(update=own | said)

    @property
    def measured_every(self) -> int:
        """Steps between two measurements; 0: none on the way."""
        return max(1, self.steps // 10) if self.check_every is None else self.check_every


class SurgerySettings(_Learning):
    """rank: of the adapter of each task, at most the width of the representation. steps: of Adam, `batch` inputs
    each. over: as of a fit, the places of a text whose representations are matched."""

    rank: int = Field(16, ge=1)
    steps: int = Field(1000, ge=1)
    learning_rate: float = Field(1e-3, gt=0, le=MOST_RATE)
    batch: int = Field(16, ge=1)
    over: Literal["answer", "next"] = "answer"

    def after(self, fit: FitSettings) -> SurgerySettings:
        """On top of what `fit:` learns: its items and how they are asked and split, where nothing else is said."""
        unsaid = [key for key in _Learning.model_fields if key not in self.model_fields_set]
        return self.model_copy(update={key: getattr(fit, key) for key in unsaid})


class ZipSettings(_Learning):
    """alpha: what the correlation of units that were merged before is multiplied with; beta: the share of merges within
    one model; see learn/zip_matching.py. depth: the share of the layers that become one, from the first on; layers:
    how many, instead."""

    per_task: int = Field(64, ge=1)
    alpha: float = Field(ALPHA, ge=0, le=1)
    beta: float = Field(BETA, ge=0, le=1)
    depth: float = Field(1.0, ge=0, le=1)
    layers: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _one_depth(self):
        if self.layers is not None and "depth" in self.model_fields_set:
            raise ValueError("expected one of depth and layers")
        return self

    @property
    def reach(self) -> int | float:
        """Layers where it is a whole number, a share of them where it is a float."""
        return self.depth if self.layers is None else self.layers


def read_zip(data: Mapping[str, Any] | None, where: str) -> ZipSettings:
    """Raises RecipeError naming the key."""
    return _read(ZipSettings, data, where)


class RouterSettings(_Section):
    """The `router:` of a recipe with a result per task. per_task: prompts of each that a mean is taken of, drawn by the
    seed; their answers are never read."""

    items: tuple[TaskItems, ...] = Field((), max_length=256)
    per_task: int = Field(16, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    apply_chat_template: bool = False
    system_instruction: str | None = None


def read_fit(data: Mapping[str, Any] | None, where: str) -> FitSettings:
    """Raises RecipeError naming the key."""
    return _read(FitSettings, data, where)


def read_surgery(data: Mapping[str, Any] | None, where: str) -> SurgerySettings:
    """Raises RecipeError naming the key."""
    return _read(SurgerySettings, data, where)


def read_router(data: Mapping[str, Any] | None, where: str) -> RouterSettings:
    """Raises RecipeError naming the key."""
    return _read(RouterSettings, data, where)


def located(settings: _Learning, folder: Path) -> _Learning:
    """With the paths of item files resolved against a folder."""
    found = []
    for entry in settings.items:
        found.append(entry.model_copy(update={"items": str((folder / Path(entry.items).expanduser()).resolve())}))
    return settings.model_copy(update={"items": tuple(found)})


def _read(section: type[_Section], data: Any, where: str):
    if not isinstance(data, Mapping):
        found = "nothing" if data is None else f"found {type(data).__name__}"
        raise RecipeError(where, found, "a mapping with `items`, files of JSONL")
    try:
        return section.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join([where, *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            fields = section.model_fields
            raise RecipeError(at, "unknown key", ", ".join(fields), nearest(str(first["loc"][-1]), fields)) from None
        if first["type"] == "missing":
            raise RecipeError(at, "missing", "a value") from None
        said = first["msg"].removeprefix("Value error, ")
        found = "" if isinstance(first["input"], (Mapping, list)) else f"found {first['input']!r}: "
        raise RecipeError(at, f"{found}{said}") from None
