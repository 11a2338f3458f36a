"""Which tensors of a checkpoint belong to which layer, by their names alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

_INDEXED = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|tok_embeddings|word_embeddings|shared)\.weight$")
# What looks, listens or watches beside a language model, by a part of its name.
_SIDE = re.compile(r"(^|\.)((vision|visual|image|audio|speech|video)\w*|img|vit)(\.|$)")
_INPUT_SIDE = ("embed", "wte", "wpe", "tok_", "patch")


class Ref(NamedTuple):
    """One tensor of one endpoint. rows: [first, last) of its first dimension; None: all."""

    model: str
    tensor: str
    rows: tuple[int, int] | None = None

    @property
    def whole(self) -> Ref:
        """The tensor with all its rows."""
        return self if self.rows is None else Ref(self.model, self.tensor)


@dataclass(frozen=True)
class Layout:
    """prefix: what stands before a layer's number (`model.layers`); layers: how many;
    layer_names: what follows the number; pre and post: tensors before and after the stack."""

    prefix: str
    layers: int
    layer_names: tuple[str, ...]
    pre: tuple[str, ...]
    post: tuple[str, ...]

    def layer_tensor(self, layer: int, name: str) -> str:
        """The whole name of a layer's tensor. name: one of layer_names."""
        return f"{self.prefix}.{layer}.{name}"

    def layer_of(self, tensor: str) -> int | None:
        """The layer a tensor is in; None for embeddings, norms and heads."""
        match = _INDEXED.match(tensor)
        return int(match[2]) if match and match[1] == self.prefix else None


def beside_text(name: str) -> bool:
    """Whether a tensor is of a model's eyes or ears, and not of its language model."""
    return bool(_SIDE.search(name))


def layout(names: Iterable[str]) -> Layout:
    """Find the main stack: the numbered prefix that most tensors share.

    Of a model that has eyes or ears beside a language model it is the language model's, however deep those are.
    """
    names = sorted(names)
    matches = {n: m for n in names if (m := _INDEXED.match(n))}
    counts = Counter(m[1] for m in matches.values())
    prefix, _ = counts.most_common(1)[0] if matches else ("", 0)
    if beside_text(prefix):
        embedded = {n[: m.start()] for n in names if (m := EMBEDDING.search(n))}
        texts = [p for p, _ in counts.most_common() if not beside_text(p) and p.rpartition(".")[0] in embedded]
        prefix = texts[0] if texts else prefix
    in_stack = {n: m for n, m in matches.items() if m[1] == prefix}
    rest = [n for n in names if n not in in_stack]
    return Layout(
        prefix,
        max((int(m[2]) for m in in_stack.values()), default=-1) + 1,
        tuple(sorted({m[3] for m in in_stack.values()})),
        tuple(n for n in rest if any(mark in n for mark in _INPUT_SIDE)),
        tuple(n for n in rest if not any(mark in n for mark in _INPUT_SIDE)),
    )
