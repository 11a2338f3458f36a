"""Log-likelihoods of choices, each distinct token computed once.

A row holds one request: its prompt after the shared prefix, then all its choices side by side. A mask lets
each choice see the prefix, its prompt and itself, and position ids restart at each choice, so one row
gives what a plain loop computes in as many rows as there are choices. The last token of a choice is
never an input: nothing follows it. Ids are made once per run. Masks are made for each forward: they take rows x
width², which over all of a benchmark's items would be more than the models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from merge3.tasks.forward import Places, ahead, right_padded, without_cache
from merge3.tasks.prefix import Prefix
from merge3.tasks.requests import Choices, Likelihoods, Pass, batches, one_by_one
from merge3.tasks.shared_prefix import SharedPrefix

_LEFT, _RIGHT = -2, -1  # padding


@dataclass
class Batch:
    """inputs: of the model's forward, but for the mask; part: what each position belongs to, int16 [rows, width]: 0 the
    prompt, 1, 2, .. a choice, and padding. places: positions whose logits are needed, row after row. at, tokens, owner:
    per scored token, which of the places predicts it, the token, and which choice it belongs to; lengths: tokens per
    choice, choices of all requests. owner and lengths lie on the CPU."""

    asked: list[tuple[int, Choices]]
    inputs: dict[str, torch.Tensor]
    part: torch.Tensor
    places: torch.Tensor
    at: torch.Tensor
    tokens: torch.Tensor
    owner: torch.Tensor
    lengths: torch.Tensor


class SharedRows:
    """One row per request. A Question whose results are Likelihoods, sums in float32.

    once: whether rows read the prefix where it lies (shared_prefix.py) instead of each its copy.
    """

    def __init__(
        self,
        prefix: tuple[int, ...],
        requests: Sequence[Choices],
        device,
        dtype: torch.dtype,
        batch_tokens: int,
        pad: int = 0,
        once: bool = False,
    ):
        self.prefix, self.device, self.once = prefix, device, once and bool(prefix)
        self.dtype = dtype
        self.batches = [self._prepare(batch, pad) for batch in batches(requests, _width, batch_tokens)]

    @torch.inference_mode()
    def __call__(self, model) -> Iterator[tuple[int, Likelihoods | None]]:
        """(index of a request, its likelihoods, None where the logits are NaN or infinite)"""
        yield from one_by_one(self.passes(model))

    def passes(self, model) -> list[Pass]:
        """See InPasses: the prefix, then each batch of rows."""
        prefix = Prefix(model, self.prefix, self.device) if self.prefix else None
        shared = SharedPrefix(model, prefix) if self.once else None
        passes = [Pass(prefix.read, positions=len(self.prefix), keeps=True)] if self.prefix else []
        for batch in self.batches:
            at, once = Places(model, batch.places), shared and shared.anew()
            ask, around = partial(self._ask, batch, at, prefix, once), partial(_around, at, once)
            passes.append(Pass(ask, around, batch.inputs["input_ids"].numel()))
        return passes

    def _ask(
        self, batch: Batch, at: Places, prefix: Prefix | None, once: SharedPrefix | None
    ) -> list[tuple[int, Likelihoods | None]]:
        how = {"use_cache": False}
        if prefix is not None and once is None:
            how = {"use_cache": True, "past_key_values": prefix.before(len(batch.asked))}
        logits = at.logits(**how, **batch.inputs, attention_mask=self._mask(batch))
        if once is not None:
            once.check()
        normalizer = logits.logsumexp(-1)[batch.at]
        log_p = logits[batch.at, batch.tokens] - normalizer
        # An infinite logit leaves the other tokens -inf, which is no likelihood. NaN is NaN already.
        log_p = torch.where(normalizer == torch.inf, torch.nan, log_p)
        # A GPU adds in whatever order its threads come, and to other bits each time.
        sums = torch.zeros(len(batch.lengths)).index_add_(0, batch.owner, log_p.cpu())
        greedy, margins = self._greedy(logits, batch), self._margins(logits, batch)
        results, start = [], 0
        for index, request in batch.asked:
            own = slice(start, start + len(request.choices))
            start = own.stop
            said = greedy[own] if request.greedy else None, margins[own] if request.margins else None
            found = Likelihoods(sums[own], batch.lengths[own], *said)
            results.append((index, None if found.sums.isnan().any() else found))
        return results

    def _greedy(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor | None:
        """Whether each choice is what greedy decoding writes, bool [choices]; None where no request asks."""
        if not any(request.greedy for _, request in batch.asked):
            return None
        others = logits.argmax(-1)[batch.at] != batch.tokens
        counts = torch.zeros(len(batch.lengths), dtype=torch.long)
        return counts.index_add_(0, batch.owner, others.long().cpu()) == 0

    def _margins(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor | None:
        """See Likelihoods, float32 [choices]; None where no request asks."""
        if not any(request.margins for _, request in batch.asked):
            return None
        margins = ahead(logits, batch.at, batch.tokens).cpu()
        return torch.full((len(batch.lengths),), torch.inf).scatter_reduce_(0, batch.owner, margins, "amin")

    def _prepare(self, asked: list[tuple[int, Choices]], pad: int) -> Batch:
        past = len(self.prefix)
        left = max(len(request.tokens) for _, request in asked)
        right = max(_choice_inputs(request) for _, request in asked)
        width = left + right
        ids = torch.full((len(asked), width), pad)
        position_ids = torch.zeros(len(asked), width, dtype=torch.long)
        part = torch.full((len(asked), width), _RIGHT, dtype=torch.int16)
        scored, tokens, owner, lengths = [], [], [], []
        for row, (_, request) in enumerate(asked):
            start = left - len(request.tokens)
            ids[row, start:left] = torch.tensor(request.tokens)
            position_ids[row, start:left] = past + torch.arange(len(request.tokens))
            part[row, :start], part[row, start:left] = _LEFT, 0
            at = left
            for number, choice in enumerate(request.choices, 1):
                inner = len(choice) - 1
                if inner:
                    own = slice(at, at + inner)
                    ids[row, own] = torch.tensor(choice[:-1])
                    position_ids[row, own] = past + len(request.tokens) + torch.arange(inner)
                    part[row, own] = number
                # Token 0 is predicted by the prompt's last position, token j by the choice's j - 1.
                scored += [row * width + position for position in (left - 1, *range(at, at + inner))]
                tokens += choice
                owner += [len(lengths)] * len(choice)
                lengths.append(len(choice))
                at += inner
        to = lambda data: torch.as_tensor(data).to(self.device)
        inputs = {"input_ids": to(ids), "position_ids": to(position_ids)}
        places, at = torch.tensor(scored).unique(return_inverse=True)  # choices of a request begin at one place
        scored = to(places), to(at), to(tokens), torch.tensor(owner)
        return Batch(asked, inputs, to(part), *scored, torch.tensor(lengths))

    def _mask(self, batch: Batch) -> torch.Tensor:
        """What each position sees, as scores to add: of the model's dtype, [rows, 1, width, prefix + width]."""
        part, width = batch.part, batch.part.shape[1]
        at = torch.arange(width, device=self.device)
        own, other = part[:, :, None], part[:, None]  # of who sees, of what is seen
        visible = (own >= 0) & ((other == 0) | (other == own)) & (at <= at[:, None])
        # Padding sees itself alone: a row of nothing but masked scores would be NaN.
        visible |= at == at[:, None]
        if self.prefix and not self.once:
            before = (own > _LEFT).expand(-1, -1, len(self.prefix))
            visible = torch.cat([before, visible], -1)
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~visible, torch.finfo(self.dtype).min)[:, None]


class PlainRows:
    """One row per choice, right padded, no sharing: for models that take no mask of their own.

    A Question whose results are Likelihoods, sums in float64.
    """

    def __init__(
        self,
        prefix: tuple[int, ...],
        requests: Sequence[Choices],
        device,
        dtype: torch.dtype,
        batch_tokens: int,
        pad: int = 0,
    ):
        self.prefix, self.device, self.pad = prefix, device, pad
        widest = lambda r: len(r.choices) * (len(prefix) + len(r.tokens) + max(map(len, r.choices)))
        self.batches = list(batches(requests, widest, batch_tokens))

    @torch.inference_mode()
    def __call__(self, model) -> Iterator[tuple[int, Likelihoods | None]]:
        """(index of a request, its likelihoods, None where the logits are NaN or infinite)"""
        yield from one_by_one(self.passes(model))

    def passes(self, model) -> list[Pass]:
        """See InPasses: a batch of rows each."""
        passes = []
        for asked in self.batches:
            positions = sum(len(request.choices) * (len(self.prefix) + request.length()[0]) for _, request in asked)
            passes.append(Pass(partial(self._ask, model, asked), positions=positions))
        return passes

    def _ask(self, model, asked: list[tuple[int, Choices]]) -> list[tuple[int, Likelihoods | None]]:
        starts = [(*self.prefix, *request.tokens) for _, request in asked]
        rows = []
        for start, (_, request) in zip(starts, asked):
            rows += [(*start, *choice) for choice in request.choices]
        logits = model(**right_padded(rows, self.pad, self.device), **without_cache(model)).logits
        log_p, results = iter(logits.float().log_softmax(-1).cpu()), []
        for start, (index, request) in zip(starts, asked):
            sums, greedy, margins = [], [], []
            for choice, row in zip(request.choices, log_p):
                own = row[len(start) - 1 : len(start) - 1 + len(choice)]
                sums.append(sum(float(own[j, token]) for j, token in enumerate(choice)))
                if request.greedy:
                    greedy.append(own.argmax(-1).tolist() == list(choice))
                if request.margins:
                    margins.append(float(ahead(own, torch.arange(len(choice)), torch.tensor(choice)).min()))
            lengths = torch.tensor([len(choice) for choice in request.choices])
            said = torch.tensor(greedy) if greedy else None, torch.tensor(margins) if margins else None
            found = Likelihoods(torch.tensor(sums, dtype=torch.float64), lengths, *said)
            # log_softmax makes a whole row NaN if a logit is NaN or +inf
            results.append((index, None if any(map(math.isnan, sums)) else found))
        return results


@contextmanager
def _around(at: Places, once: SharedPrefix | None) -> Iterator[None]:
    with at.picked(), once.before_rows() if once is not None else nullcontext():
        yield


def _choice_inputs(request: Choices) -> int:
    return sum(len(choice) - 1 for choice in request.choices)


def _width(request: Choices) -> int:
    return len(request.tokens) + _choice_inputs(request)
