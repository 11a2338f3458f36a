"""What a recipe says of its output's tokenizer: mergekit's `tokenizer_source`, and its newer `tokenizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from merge3.errors import RecipeError
from merge3.recipe.checks import known_keys, mapping
from merge3.recipe.references import ModelRef

UNION, BASE = "union", "base"
_KINDS = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}


@dataclass(frozen=True)
class TokenRow:
    """Which row a token has in models that lack it; with `force` in all models.

    model: None for zeros. other, number: the row of that model's other token, by its text or its number; neither: that
    of the same token.
    """

    token: str
    model: str | None = None
    other: str | None = None
    number: int | None = None
    force: bool = False

    def to_dict(self) -> dict[str, Any]:
        """mergekit's value under `tokens`."""
        source: Any = self.model
        if self.model is None:
            source = {"kind": "zero"}
        elif self.number is not None:
            source = {"kind": "model_token", "model": self.model, "token_id": self.number}
        elif self.other is not None:
            source = {"kind": "model_token", "model": self.model, "token": self.other}
        return {"source": source} | ({"force": True} if self.force else {})


@dataclass(frozen=True)
class Tokenizer:
    """source: union (of all models' tokens), base, or one of the models. tokens: rows that are not found by the rules.
    pad_to_multiple_of: rows are added until their number is one.

    base: whether the first model is a recipe's base: a token that some model lacks takes its row where it has one,
    otherwise the mean of those that have it. No part of the YAML, which says it elsewhere.

        Tokenizer("union", (TokenRow("<|im_end|>", "./chat", "</s>"),), pad_to_multiple_of=64)
    """

    source: str = UNION
    tokens: tuple[TokenRow, ...] = ()
    pad_to_multiple_of: int | None = None
    base: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The keys of a recipe that mean it: `tokenizer_source` where that says everything."""
        if not self.tokens and self.pad_to_multiple_of is None:
            return {"tokenizer_source": self.source}
        block: dict[str, Any] = {"source": self.source}
        if self.tokens:
            block["tokens"] = {row.token: row.to_dict() for row in self.tokens}
        if self.pad_to_multiple_of is not None:
            block["pad_to_multiple_of"] = self.pad_to_multiple_of
        return {"tokenizer": block}

    def describe(self) -> str:
        """In a message."""
        parts = [f"tokenizer_source {self.source}"]
        parts += [f"rows of its own for {', '.join(repr(row.token) for row in self.tokens[:3])}"] if self.tokens else []
        parts += [f"rows in multiples of {self.pad_to_multiple_of}"] if self.pad_to_multiple_of is not None else []
        return ", ".join(parts) + ("" if self.base else ", no base")

    def renamed(self, name: Callable[[str], str]) -> Tokenizer:
        """The same with other names for models."""
        source = self.source if self.source in (UNION, BASE) else name(self.source)
        rows = [row if row.model is None else replace(row, model=name(row.model)) for row in self.tokens]
        return replace(self, source=source, tokens=tuple(rows))

    def check_models(self, models: Iterable[str], where: str = "") -> None:
        """Raises RecipeError where it names a model that is not among these. where: what comes before its keys."""
        models = list(models)
        if self.source not in (UNION, BASE, *models):
            expected = "union, base, or one of " + ", ".join(models)
            raise RecipeError(f"{where}tokenizer_source", f"found {self.source!r}", expected)
        for row in self.tokens:
            if row.model is not None and row.model not in models:
                found = f"model {row.model!r} is not in the recipe"
                raise RecipeError(f"{where}tokenizer.tokens.{row.token}", found, "one of " + ", ".join(models))


def read_tokenizer(data: Mapping[str, Any], where: str) -> Tokenizer | None:
    """From `tokenizer_source` or `tokenizer` of a recipe; None where there is neither. Raises RecipeError."""
    older, newer = data.get("tokenizer_source"), data.get("tokenizer")
    if newer is not None and "tokenizer_source" in data:
        raise RecipeError(where, "both `tokenizer_source` and `tokenizer`", "one of them")
    if newer is None:
        return None if older is None else Tokenizer(_source(older, f"{where}: tokenizer_source"))
    at = f"{where}: tokenizer"
    newer = mapping(newer, at)
    known_keys(newer, ("source", "tokens", "pad_to_multiple_of"), at)
    rows = mapping(newer.get("tokens") or {}, f"{at}.tokens")
    multiple = newer.get("pad_to_multiple_of")
    if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1):
        raise RecipeError(f"{at}.pad_to_multiple_of", f"found {multiple!r}", "a positive whole number")
    source = newer.get("source")
    return Tokenizer(
        UNION if source is None else _source(source, f"{at}.source"),
        tuple(_row(token, entry, f"{at}.tokens.{token}") for token, entry in rows.items()),
        multiple,
    )


def _source(value: Any, where: str) -> str:
    if isinstance(value, Mapping):
        return str(ModelRef.parse(value, where))
    if not (isinstance(value, str) and value.strip()):
        raise RecipeError(where, f"found {value!r}", "union, base, or one of the models")
    return value if value in (UNION, BASE) else str(ModelRef.parse(value, where))


def _row(token: Any, entry: Any, where: str) -> TokenRow:
    if not isinstance(token, str) or not token:
        raise RecipeError(where, f"found {token!r}", "a token's text, in quotes where YAML would read a number")
    entry = mapping(entry, where)
    known_keys(entry, ("source", "force"), where)
    force, source = entry.get("force", False), entry.get("source")
    if not isinstance(force, bool):
        raise RecipeError(f"{where}.force", f"found {force!r}", "true or false")
    if source is None:
        expected = "a model, {kind: zero}, or {kind: model_token, model: .., token: ..}"
        raise RecipeError(f"{where}.source", "missing", expected)
    if not isinstance(source, Mapping) or "kind" not in source:
        return TokenRow(token, str(ModelRef.parse(source, f"{where}.source")), force=force)
    at, kind = f"{where}.source", source["kind"]
    if kind not in _KINDS:
        raise RecipeError(f"{at}.kind", f"found {kind!r}", " or ".join(_KINDS))
    known_keys(source, _KINDS[kind], at)
    if kind == "zero":
        return TokenRow(token, force=force)
    model = str(ModelRef.parse(source.get("model"), f"{at}.model"))
    other, number = source.get("token"), source.get("token_id")
    if (other is None) == (number is None):
        found = "neither `token` nor `token_id`" if other is None else "both `token` and `token_id`"
        raise RecipeError(at, found, "one of them")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 0):
        raise RecipeError(f"{at}.token_id", f"found {number!r}", "a token's number")
    if other is not None and not isinstance(other, str):
        raise RecipeError(f"{at}.token", f"found {other!r}", "a token's text")
    return TokenRow(token, model, other, number, force)
