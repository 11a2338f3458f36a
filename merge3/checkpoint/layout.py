"""Which tensors of a checkpoint belong to which layer, by their names alone.

A model may have several stacks of layers: an encoder and a decoder, a tower that sees and a language model. One of them
is the main one, whose layers gradients, slices and spaces count: the one that writes text, where there is one, else the
one with most tensors. The others count as what stands before and after it.
"""

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
# Stacks that read, and those that write text with what was read.
_READERS = re.compile(r"encoder|vision|visual|image|mask|audio|speech")
_WRITERS = re.compile(r"language|text|llm|(^|\.)(model|transformer|gpt_neox|backbone|decoder)\.(layers?|h|blocks?)$")


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


def stack_of(name: str) -> tuple[str, int] | None:
    """The stack that a tensor is in, the main one or another, by what stands before the first number in its name, and
    that number; None for a name without one."""
    match = _INDEXED.match(name)
    return (match[1], int(match[2])) if match else None


def beside_text(name: str) -> bool:
    """Whether a tensor is of a model's eyes or ears, and not of its language model."""
    return bool(_SIDE.search(name))


def layout(names: Iterable[str]) -> Layout:
    """Find the main stack, and what is before and after it."""
    names = sorted(names)
    matches = {n: m for n in names if (m := _INDEXED.match(n))}
    prefix = _main(list(matches.values()))
    in_stack = {n: m for n, m in matches.items() if m[1] == prefix}
    rest = [n for n in names if n not in in_stack]
    return Layout(
        prefix,
        max((int(m[2]) for m in in_stack.values()), default=-1) + 1,
        tuple(sorted({m[3] for m in in_stack.values()})),
        tuple(n for n in rest if any(mark in n for mark in _INPUT_SIDE)),
        tuple(n for n in rest if not any(mark in n for mark in _INPUT_SIDE)),
    )


def _main(matches: list[re.Match]) -> str:
    """The numbered prefix that most tensors share; where that one reads, the one that most of a writer share."""
    stacks = [prefix for prefix, _ in Counter(m[1] for m in matches).most_common()]
    if not stacks or not _READERS.search(stacks[0]):
        return stacks[0] if stacks else ""
    writers = [prefix for prefix in stacks if _WRITERS.search(prefix) and not _READERS.search(prefix)]
    return (writers or stacks)[0]
