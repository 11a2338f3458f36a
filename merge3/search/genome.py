"""What to search over: the `genome` section of an evolve configuration."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from merge3.errors import RecipeError
from merge3.methods import METHODS, VARIANTS, gene_names
from merge3.methods.averages import AS_IT_IS
from merge3.recipe import Tokenizer, checks, nearest, read_tokenizer
from merge3.search.places import read_start
from merge3.space import AROUND, PATH, PRESETS, SPACES, SpaceDefinition

_OTHER_NAMES = {"method": "merge_method", "base": "base_model", "kind": "space"}  # of a definition's fields


class Section(BaseModel):
    """A part of a configuration file: frozen, and without keys that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Genome(Section):
    """What to search over; names as in mergekit-evolve, then ours (from `space` on).

    start: a recipe, where a search begins instead of at the uniform merge. repetitions, pinned, max_hops: of a path.
    """

    models: tuple[str, ...] = Field(min_length=1)
    merge_method: str
    base_model: str | None = None
    layer_granularity: int = 0
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: tuple[str, ...] = ()
    smooth: bool = False
    tokenizer_source: str | None = None
    tokenizer: dict[str, Any] | None = None
    chat_template: str | None = None
    space: Literal[tuple(SPACES)] = "parameters"
    preset: Literal[tuple(PRESETS)] = "layerwise"
    genes: tuple[str, ...] = ()
    bounds: dict[str, tuple[float, float]] = {}
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    tower: dict[str, str] = {}
    start: str | None = None
    repetitions: int = Field(1, ge=1)
    pinned: tuple[int, ...] = ()
    max_hops: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        said = {k: v for k, v in data.items() if v is not None}
        return {"merge_method": AS_IT_IS} | said if said.get("space") == PATH else said

    @model_validator(mode="after")
    def _check(self):
        if self.merge_method in VARIANTS:
            found = f"{self.merge_method!r}, which makes a model for each task"
            raise ValueError(f"merge_method: {found}; a search is of one model for all")
        if self.merge_method not in METHODS:
            hint = nearest(self.merge_method, METHODS)
            raise ValueError(f"merge_method: unknown method {self.merge_method!r}" + (f" ({hint})" if hint else ""))
        for gene, (low, high) in self.bounds.items():
            if gene not in gene_names():
                raise ValueError(f"bounds: unknown gene {gene!r}, expected one of {', '.join(gene_names())}")
            if not low < high:
                raise ValueError(f"bounds: {gene} from {low} to {high}, expected low < high")
        try:
            self.recipe_tokenizer()
            checks.chat_template(self.chat_template, "chat_template")
        except RecipeError as error:
            raise ValueError(str(error).removeprefix("genome: ")) from None
        return self

    def recipe_tokenizer(self) -> Tokenizer | None:
        """`tokenizer_source` or `tokenizer`, as recipes have them. Raises RecipeError."""
        said = {key: getattr(self, key) for key in ("tokenizer_source", "tokenizer")}
        found = read_tokenizer({key: value for key, value in said.items() if value is not None}, "genome")
        return found and replace(found, base=self.base_model is not None)

    def definition(self) -> SpaceDefinition:
        """The section as a space is opened with. Raises RecipeError for a start that it has to read and cannot."""
        names = [field.name for field in fields(SpaceDefinition)]
        values = {name: getattr(self, other) for name in names if hasattr(self, other := _OTHER_NAMES.get(name, name))}
        if tokenizer := self.recipe_tokenizer():
            values |= {"tokenizer_source": tokenizer.source, "tokens": tokenizer.tokens}
            values["pad_to_multiple_of"] = tokenizer.pad_to_multiple_of
        if self.space == AROUND and self.start is not None:  # None: a fit will say it
            named = (*self.models, *([self.base_model] if self.base_model else []))
            values["around"] = json.dumps(read_start(self.start, named).to_dict(), sort_keys=True)
        return SpaceDefinition(**values)
