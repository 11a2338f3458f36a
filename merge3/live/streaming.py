"""Swapping what does not lie on the device: window after window of slices passes through two buffers, one being
filled while the kernel reads the other.

Tensors are cut at multiples of a chunk, which never changes a result. On the CPU the slices are views of the
mapped files, and a window is a bound on the pages that are in memory at one time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from merge3 import kernels
from merge3.memory import PADDING
from merge3.methods.base import Fused
from merge3.methods.execute import Output, execute
from merge3.pool import Pool


class Piece(NamedTuple):
    """Elements [begin, end) of one output, and what they are computed from."""

    name: str
    step: Fused
    out: torch.Tensor
    begin: int
    end: int

    def of(self, step: Fused, out: torch.Tensor) -> Piece:
        """The same of another candidate."""
        return self._replace(step=step, out=out)


def execute_streamed(outputs: Iterable[Output], pool: Pool, seed: int = 0) -> None:
    """As methods.execute.execute, for outputs whose inputs are not all resident."""
    sliceable = []
    for output in outputs:
        if output[1].sliceable:
            sliceable.append((output,))
        else:  # whole tensors, one output at a time
            execute([output], pool.get, seed)
    stream_together(sliceable, pool, seed)


def stream_together(outputs: Iterable[tuple[Output, ...]], pool: Pool, seed: int = 0) -> None:
    """Outputs of several candidates, of sliceable steps over the same inputs: each window is read once for all."""
    alike: dict[tuple, list[tuple[Output, ...]]] = {}
    for together in outputs:
        alike.setdefault(tuple(step.kernel for _, step, _ in together), []).append(together)
    for group in alike.values():
        candidates = [{name: (step, out) for name, step, out in own} for own in zip(*group)]
        modes = [replace(step.modes, seed=seed) for _, step, _ in group[0]]
        buffers = _Buffers(pool)
        for window in windows((together[0] for together in group), pool, pool.memory.window // 2):
            inputs = buffers.fill(window)
            for own, how in zip(candidates, modes):
                _merge([piece.of(*own[piece.name]) for piece in window], inputs, how)
            buffers.read(window)


def windows(outputs: Iterable[Output], pool: Pool, limit: int) -> Iterator[list[Piece]]:
    """Pieces in order, as many at a time as `limit` bytes of streamed inputs allow (at least one chunk)."""
    window, left = [], limit
    for name, step, out in outputs:
        refs = step.refs
        per_element = sum(pool.common_dtype(ref).itemsize for ref in refs)
        begin = 0
        while begin < out.numel():
            room = (left - PADDING * len(refs)) // per_element // kernels.CHUNK * kernels.CHUNK
            if room <= 0 and window:
                yield window
                window, left = [], limit
                continue
            end = min(begin + max(room, kernels.CHUNK), out.numel())
            window.append(Piece(name, step, out, begin, end))
            left -= (end - begin) * per_element + PADDING * len(refs)
            begin = end
    if window:
        yield window


def _merge(window: list[Piece], inputs: list[torch.Tensor], modes: kernels.Modes) -> None:
    """One call of the fused kernel. inputs: of every piece in turn, base first."""
    width = len(inputs) // len(window)
    outs, bases, experts, columns, tables = [], [], [], [], []
    for i, (_, step, out, begin, end) in enumerate(window):
        own = inputs[i * width : (i + 1) * width]
        if step.base is not None:
            bases.append(own.pop(0))
        experts += own
        tables += step.rank_tables
        outs.append(out.view(-1)[begin:end])
        columns.append(out.shape[-1] if out.dim() >= 2 else out.numel())
    kernels.merge_(
        outs,
        bases,
        experts,
        torch.from_numpy(np.stack([piece.step.coefficients for piece in window]).astype(np.float32)),
        torch.tensor([float(piece.step.lambda_) for piece in window], dtype=torch.float32),
        modes,
        torch.tensor([kernels.tensor_id(piece.name) for piece in window]),
        tables,
        torch.tensor([piece.begin for piece in window]),
        torch.tensor(columns),
    )


class _Buffers:
    """Two buffers on the device, filled on a stream of their own. On the CPU: nothing but the order of events."""

    def __init__(self, pool: Pool):
        self.pool, self.turn = pool, 0
        self.cuda = pool.device.type == "cuda"
        if self.cuda:
            self.copying = torch.cuda.Stream(pool.device)
            half = pool.memory.window // 2
            self.memory = [torch.empty(half, dtype=torch.uint8, device=pool.device) for _ in range(2)]
            self.filled, self.consumed = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
            # Whatever used this memory before is done with it before the first copy.
            self.copying.wait_stream(torch.cuda.current_stream(pool.device))

    def fill(self, window: list[Piece]) -> list[torch.Tensor]:
        """The window's inputs on the device, piece by piece, base first."""
        wanted = []
        for piece in window:
            wanted += [(ref, piece.begin, piece.end) for ref in piece.step.refs]
        if not self.cuda:
            return [self.pool.part(*part) for part in wanted]
        memory, at, views = self.memory[self.turn], 0, []
        self.copying.wait_event(self.consumed[self.turn])
        with torch.cuda.stream(self.copying):
            for part in wanted:
                here = self.pool.part(*part)
                # What was expanded is copied too: it goes with this stream, and the kernel runs on another.
                if here.device != self.pool.device or not self.pool.resident(part[:1]):
                    view = memory[at : at + here.numel() * here.itemsize].view(here.dtype)
                    view.copy_(here, non_blocking=True)
                    at += -(-here.numel() * here.itemsize // PADDING) * PADDING
                    here = view
                views.append(here)
        self.filled[self.turn].record(self.copying)
        torch.cuda.current_stream(self.pool.device).wait_event(self.filled[self.turn])
        return views

    def read(self, window: list[Piece]) -> None:
        """The kernel that reads this window has been launched."""
        if self.cuda:
            self.consumed[self.turn].record(torch.cuda.current_stream(self.pool.device))
            self.turn ^= 1
            return
        for piece in window:
            self.pool.give_back(piece.step.refs)
