"""Embeddings and heads with a row for every token of one vocabulary, made of rows of the endpoints' own.

A token that an endpoint has keeps its row. One that it lacks takes the row that the recipe names; else the base's; else
that of the only endpoint that has it; else the mean of those that do. Rows without a token, which pad, are the mean of
an endpoint's others. All in the dtype that the endpoints' promote to. These are mergekit's rules and its arithmetic.

Each remapped tensor is a file of its own, written when it is first read, and from then on a tensor of its checkpoint
like any other: hashed, measured, streamed and given back.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from merge3.checkpoint.layout import Ref, layout
from merge3.checkpoint.naming import by_token
from merge3.checkpoint.read import Checkpoint, TensorInfo
from merge3.checkpoint.vocabulary import Vocabulary, embedding_of
from merge3.errors import CheckpointError
from merge3.files import resource_error

_STRIPE = 16_384  # rows copied at a time
_ZERO, _MEAN = -1, -2  # in the place of an endpoint: a row of zeros, the mean of those that have one


def remapped(
    endpoints: dict[str, Checkpoint],
    vocabulary: Vocabulary,
    stored_as: Callable[[Ref], str | None],
    dtype: torch.dtype | None = None,
) -> dict[str, Checkpoint]:
    """The endpoints, over the rows of one vocabulary, which their configurations describe. Reads and writes no weights
    yet. stored_as: the name that an endpoint stores a tensor by, tied ones too; None where it has none. dtype: what
    every endpoint is converted to (default: what their dtypes promote to).

    An output that some endpoint stores is a tensor of its own in all of them: rows that are missing may come from it.
    Raises CheckpointError where a tensor lacks rows that its tokenizer names, or has others than the base's.
    """
    base = next(iter(endpoints))
    layouts = {model: layout(checkpoint.tensors) for model, checkpoint in endpoints.items()}
    names = {
        name
        for model, checkpoint in endpoints.items()
        for name in checkpoint.tensors
        if by_token(name) and layouts[model].layer_of(name) is None
    }
    for model, checkpoint in endpoints.items():
        _check_left(model, checkpoint, vocabulary, names)
    tensors = {model: dict(checkpoint.tensors) for model, checkpoint in endpoints.items()}
    made: dict[str, dict[Path, _File]] = {model: {} for model in endpoints}
    for index, name in enumerate(sorted(names)):
        stored = {model: stored_as(Ref(model, name)) for model in endpoints}
        group = _Group(vocabulary, {m: (endpoints[m], n) for m, n in stored.items() if n is not None}, dtype)
        group.check(base)
        for place, model in enumerate(group.members):
            file = vocabulary.folder.parent / f"rows-{index}-{place}"
            tensors[model][name] = TensorInfo(name, group.dtype, group.shape, file, 0, group.nbytes)
            made[model][file] = _File(file, group, model)
    donor = endpoints[vocabulary.donor].config
    return {
        model: replace(
            checkpoint,
            config=vocabulary.describes(checkpoint.config, donor),
            tensors=tensors[model],
            made=made[model],
        )
        for model, checkpoint in endpoints.items()
    }


def _check_left(model: str, checkpoint: Checkpoint, vocabulary: Vocabulary, names: Container[str]) -> None:
    """Raises CheckpointError for a tensor that seems to have a row for every token and would keep the old numbers."""
    own = vocabulary.own[model]
    numbered = torch.arange(len(own))[own >= 0]
    embedding = embedding_of(checkpoint)
    if embedding is None or torch.equal(own[own >= 0], numbered):
        return
    rows, stack = checkpoint.tensors[embedding].shape[0], layout(checkpoint.tensors)
    for name, info in checkpoint.tensors.items():
        inside = stack.layer_of(name) is not None
        if name not in names and (by_token(name) if inside else len(info.shape) > 1 and info.shape[0] == rows):
            found = f"tensor {name!r} of {info.shape[0]} rows: one for each token, which get other numbers?"
            expected = "no tables of tokens but embeddings and heads"
            raise CheckpointError(model, found, expected, "models that number their tokens alike")


class _Group:
    """One tensor of every endpoint that has it. members: endpoint -> its checkpoint, the name it is stored by."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        members: Mapping[str, tuple[Checkpoint, str]],
        dtype: torch.dtype | None,
    ):
        self.vocabulary, self.members = vocabulary, members
        infos = [checkpoint.tensors[name] for checkpoint, name in members.values()]
        self._lies = len(infos[0].shape) == 2 and infos[0].shape[0] == 1  # a bias with a column for every token
        promoted = infos[0].dtype
        for info in infos[1:]:
            promoted = torch.promote_types(promoted, info.dtype)
        self.dtype = dtype or (torch.float32 if promoted == torch.float64 else promoted)
        self._rows = (vocabulary.rows, *self._standing(infos[0].shape)[1:])
        self.shape = self._standing(self._rows)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize

    def check(self, base: str) -> None:
        """Raises CheckpointError where an endpoint's tensor cannot give rows to the others."""
        for model, (checkpoint, name) in self.members.items():
            shape = self._standing(checkpoint.tensors[name].shape)
            if shape[1:] != self._rows[1:]:
                expected = f"rows of {list(self._rows[1:])} as in {base}"
                raise CheckpointError(model, f"tensor {name!r} of shape {list(shape)}", expected)
            last = max(int(self.vocabulary.own[model].max()), *self._named(model), -1)
            if last >= shape[0]:
                found = f"tensor {name!r} has {shape[0]} rows, token {last} is one of its tokenizer"
                raise CheckpointError(model, found, "a row for every token")
        named = {self.vocabulary.tokens[row.token] for row in self.vocabulary.tokenizer.tokens}
        nowhere = (self.plan.tokens & (self.plan.donors == _ZERO)).nonzero()[:, 0].tolist()
        if missing := sorted(set(nowhere) - named):
            name = next(iter(self.members.values()))[1]
            found = f"no row of {name!r} for token {missing[0]} of the output in any model that has this tensor"
            raise CheckpointError(base, found, "one")

    @cached_property
    def plan(self) -> _Plan:
        """Where rows come from that endpoints lack."""
        return _plan(self.vocabulary, list(self.members))

    def rows_of(self, model: str) -> torch.Tensor:
        """The tensor of one endpoint over the vocabulary's rows."""
        plan, own = self.plan, self.vocabulary.own[model]
        result = torch.zeros(self._rows, dtype=self.dtype)
        keeps = plan.tokens & (own >= 0) & ~plan.forced
        self._fill(result, keeps, model, own)
        rest = plan.tokens & ~keeps
        for place, other in enumerate(self.members):
            self._fill(result, rest & (plan.donors == place), other, plan.places)
        mean = rest & (plan.donors == _MEAN)
        if mean.any():
            result[mean] = self._mean(mean)
        if not plan.tokens.all():
            result[~plan.tokens] = result[plan.tokens].mean(0)
        for checkpoint, name in self.members.values():
            checkpoint.release(name)
        return result.reshape(self.shape)

    def _fill(self, result: torch.Tensor, wanted: torch.Tensor, model: str, rows: torch.Tensor) -> None:
        """Rows of the result that are wanted, from one endpoint's rows of these numbers."""
        for at in wanted.nonzero()[:, 0].split(_STRIPE):
            result[at] = self._take(model, rows[at])

    def _mean(self, wanted: torch.Tensor) -> torch.Tensor:
        """Summed endpoint by endpoint and divided, each step rounded, as mergekit does."""
        total = torch.zeros((int(wanted.sum()), *self._rows[1:]), dtype=self.dtype)
        count = torch.zeros(len(total), dtype=torch.int64)
        for model in self.members:
            own = self.vocabulary.own[model][wanted]
            has = own >= 0
            total[has] = total[has] + self._take(model, own[has])
            count += has
        for number in count.unique().tolist():
            total[count == number] /= number
        return total

    def _take(self, model: str, rows: torch.Tensor) -> torch.Tensor:
        checkpoint, name = self.members[model]
        stored = checkpoint.get(name)
        return (stored.T if self._lies else stored)[rows].to(self.dtype)

    def _standing(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Rows first."""
        return shape[::-1] if self._lies else tuple(shape)

    def _named(self, model: str) -> list[int]:
        named = [row for row in self.vocabulary.tokenizer.tokens if row.model == model]
        return [row.number for row in named if row.number is not None]


@dataclass(frozen=True)
class _Plan:
    """Of every row: tokens: whether it has a token; forced: whether even endpoints that have it take another row;
    donors, places: the endpoint (by its place) and its row that is taken."""

    tokens: torch.Tensor
    forced: torch.Tensor
    donors: torch.Tensor
    places: torch.Tensor


def _plan(vocabulary: Vocabulary, models: list[str]) -> _Plan:
    """By the rules of this module, among the models that have the tensor."""
    own = torch.stack([vocabulary.own[model] for model in models])
    has = own >= 0
    count = has.sum(0)
    tokens = torch.zeros(vocabulary.rows, dtype=torch.bool)
    tokens[torch.tensor(list(vocabulary.tokens.values()))] = True
    donors = torch.where(count == 0, _ZERO, torch.where(count == 1, has.int().argmax(0), _MEAN))
    base = next(iter(vocabulary.own))
    if vocabulary.tokenizer.base and base in models:
        donors[has[models.index(base)]] = models.index(base)
    places = own.gather(0, donors.clamp(min=0)[None])[0]
    forced = torch.zeros_like(tokens)
    for row in vocabulary.tokenizer.tokens:
        at = vocabulary.tokens[row.token]
        forced[at] = row.force
        donors[at] = _ZERO
        if row.model is not None:
            if row.model not in models:
                raise CheckpointError(
                    row.model, f"no tensor to take token {row.token!r} from", "one as the others have"
                )
            donors[at] = models.index(row.model)
            other = row.token if row.other is None else row.other
            places[at] = vocabulary.numbers[row.model][other] if row.number is None else row.number
    return _Plan(tokens, forced, donors, places)


@dataclass(frozen=True)
class _File:
    """Writes one endpoint's tensor where its TensorInfo says it is, whole or not at all."""

    file: Path
    group: _Group
    model: str

    def __call__(self) -> None:
        rows = self.group.rows_of(self.model).contiguous()
        partial = self.file.with_name(f"{self.file.name}.partial-{os.getpid()}")
        try:
            with open(partial, "wb") as handle:
                handle.write(memoryview(rows.reshape(-1).view(torch.uint8).numpy()))
            os.replace(partial, self.file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise resource_error(self.file, error) from None
