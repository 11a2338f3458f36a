"""Messages <-> what is searched: spaces, and the tokenizers of their recipes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from merge3.errors import ConfigError
from merge3.recipe import Tokenizer, TokenRow, read_tokenizer
from merge3.rpc import merge3_pb2 as pb
from merge3.space import SpaceDefinition


def tokenizer_to(t: Tokenizer | None) -> pb.Tokenizer | None:
    """None is a field that is not set."""
    if t is None:
        return None
    rows = [pb.TokenRow(**asdict(row)) for row in t.tokens]
    return pb.Tokenizer(source=t.source, tokens=rows, pad_to_multiple_of=t.pad_to_multiple_of, no_base=not t.base)


def tokenizer_from(m: pb.Tokenizer) -> Tokenizer:
    """Raises RecipeError for what a recipe's own checks would have caught."""
    multiple = m.pad_to_multiple_of if m.HasField("pad_to_multiple_of") else None
    found = Tokenizer(m.source, tuple(row_from(row) for row in m.tokens), multiple, not m.no_base)
    read_tokenizer(found.to_dict(), "tokenizer")
    return found


def row_from(m: pb.TokenRow) -> TokenRow:
    """What is not set is None."""
    values = {key: getattr(m, key) if m.HasField(key) else None for key in ("model", "other", "number")}
    return TokenRow(m.token, **values, force=m.force)


def space_to(d: SpaceDefinition) -> pb.SpaceDefinition:
    """Field by field, by name; None is a field that is not set."""
    values = {field.name: getattr(d, field.name) for field in pb.SpaceDefinition.DESCRIPTOR.fields}
    values["bounds"] = {gene: pb.Range(low=low, high=high) for gene, (low, high) in d.bounds.items()}
    values["tokens"] = [pb.TokenRow(**asdict(row)) for row in d.tokens]
    return pb.SpaceDefinition(**values)


def space_from(m: pb.SpaceDefinition) -> SpaceDefinition:
    """Field by field, by name; what is not set, or an empty text, is as the definition has it by default.

    Raises ConfigError for what only an evolve configuration's own checks would have caught.
    """
    for gene, r in m.bounds.items():
        if not (np.isfinite(r.low) and np.isfinite(r.high) and r.low < r.high):
            raise ConfigError(f"space: bounds: {gene}", f"from {r.low} to {r.high}", "finite numbers, low < high")
    values: dict[str, Any] = {"method": m.method, "bounds": {gene: (r.low, r.high) for gene, r in m.bounds.items()}}
    values |= {"tokens": tuple(row_from(row) for row in m.tokens), "tower": dict(m.tower)}
    for field in m.DESCRIPTOR.fields:
        value = getattr(m, field.name)
        unset = value == "" or (field.has_presence and not m.HasField(field.name))
        if field.name not in values and not unset:
            values[field.name] = tuple(value) if field.is_repeated else value
    return SpaceDefinition(**values)
