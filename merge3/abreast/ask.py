"""Several candidates merged and asked at one read of the models: layer by layer, each a step behind the other.

A candidate's questions go through the live model as far as a layer and wait there. Meanwhile base and experts of that
layer are read once, and merged into as many blocks as there are candidates; then each candidate's block is the layer
for as long as its own questions pass. So what is streamed is streamed once for all of them, and of the model no more
than one layer a candidate is in memory. Answers are those of one candidate after the other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch

from merge3.abreast.course import Unfit, course_of, storage_of
from merge3.abreast.turns import Turn, taking_turns
from merge3.live.slot import Slot
from merge3.program import Program
from merge3.tasks.requests import Pass

_ALIGNED = 64  # bytes
View = tuple[torch.dtype, int, torch.Size, tuple[int, ...]]  # dtype, bytes from a block's beginning, size, strides


class _Stage(NamedTuple):
    """What is merged at once: a layer, or what stands before or after all of them. size: bytes of a candidate's block.
    outputs: checkpoint name -> where in it; live: parameters and buffers of the model, and where theirs are."""

    size: int
    outputs: dict[str, View]
    live: list[tuple[torch.Tensor, View]]


class Abreast:
    """For one slot. passes: of a question, by which it is tried whether its model can be asked so, and which are used
    up by that. Raises Unfit.

        abreast = Abreast(slot, scorer.passes(slot.model)[0])
        told, seconds = abreast.ask(programs, [scorer.passes(slot.model) for _ in programs])
    """

    def __init__(self, slot: Slot, passes: Sequence[Pass]):
        self.slot = slot
        weights = {storage_of(tensor) for tensor in slot.placed().values()}
        # The prefix, where there is one, and rows after it.
        self._course = course_of(slot.model, self._layers(), weights, passes[:2])
        self._stages = [self._stage(tensors) for tensors in self._course.stages()]
        self._blocks: list[torch.Tensor] = []  # of each candidate: room for the largest stage

    @property
    def outputs(self) -> set[str]:
        """Checkpoint names that a program has to write."""
        return {name for stage in self._stages for name in stage.outputs}

    def give_up(self) -> None:
        """The room that blocks take."""
        self._blocks.clear()

    @property
    def size(self) -> int:
        """Bytes that each candidate takes beside the live model."""
        return max(stage.size for stage in self._stages)

    def ask(
        self, programs: Sequence[Program], asked: Sequence[Sequence[Sequence[Pass]]], seed: int = 0
    ) -> tuple[list[list[list[Any]]], float]:
        """(what each question of each candidate was told, seconds of merging). asked: of every program, the passes of
        each of its questions. seed: of random keeps."""
        while len(self._blocks) < len(programs):
            self._blocks.append(torch.empty(self.size, dtype=torch.uint8, device=self.slot.pool.device))
        merging, candidates = 0.0, []
        for questions in asked:
            candidates.append([[Turn(single) for single in passes] for passes in questions])
        rows = [list(chain.from_iterable(questions)) for questions in candidates]
        with torch.inference_mode(), taking_turns(self._course.layers, list(chain.from_iterable(rows))):
            for number, stage in enumerate(self._stages):
                before = time.perf_counter()
                self._merge(stage, programs, seed)
                merging += time.perf_counter() - before
                waits = number + 1 < len(self._stages)
                for block, own in zip(self._blocks, rows):
                    with _lent(stage, block):
                        for turn in own:
                            if turn.go_on() != waits:
                                raise RuntimeError(f"a forward did not stop where it should, of {self._course}")
        told = []
        for questions in candidates:
            told.append([list(chain.from_iterable(turn.results for turn in turns)) for turns in questions])
        return told, merging

    def _layers(self) -> torch.nn.ModuleList:
        """The live model's, which need not be called as in the checkpoint."""
        layout = self.slot.pool.layouts[self.slot.pool.base]
        first = {storage_of(tensor) for name, tensor in self.slot.placed().items() if layout.layer_of(name) == 0}
        for module in self.slot.model.modules():
            if not isinstance(module, torch.nn.ModuleList) or len(module) != layout.layers:
                continue
            if first and first <= {storage_of(tensor) for tensor in module[0].parameters()}:
                return module
        raise Unfit(type(self.slot.model).__name__, "no list of layers", "a stack of layers")

    def _merge(self, stage: _Stage, programs: Sequence[Program], seed: int) -> None:
        outputs = []
        for program, block in zip(programs, self._blocks):
            places = {name: _view(block, view) for name, view in stage.outputs.items()}
            outputs.append(program.outputs(places, self.slot.pool.statistics))
        with torch.inference_mode(False):  # what the pool reads now, it may keep
            self.slot.write_together(outputs, seed)

    def _stage(self, used: Sequence[torch.Tensor]) -> _Stage:
        """Blocks are laid out storage by storage, so that what is a view of another tensor is one of a block too."""
        live: dict[int, dict[int, torch.Tensor]] = {}
        names: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in self.slot.placed().items():
            names.setdefault(storage_of(tensor), {})[name] = tensor
        for tensor in used:
            live.setdefault(storage_of(tensor), {})[id(tensor)] = tensor
        size, outputs, own = 0, {}, []
        for storage, tensors in live.items():
            written = names.get(storage, {})
            if not written:
                continue
            self._course.check_whole(written.values(), tensors.values())
            outputs |= {name: _place(tensor, size) for name, tensor in written.items()}
            own += [(tensor, _place(tensor, size)) for tensor in tensors.values()]
            size += -(-next(iter(tensors.values())).untyped_storage().nbytes() // _ALIGNED) * _ALIGNED
        return _Stage(size, outputs, own)


def _place(tensor: torch.Tensor, begin: int) -> View:
    return tensor.dtype, begin + tensor.storage_offset() * tensor.itemsize, tensor.shape, tensor.stride()


def _view(block: torch.Tensor, view: View) -> torch.Tensor:
    dtype, begin, size, strides = view
    return block.view(dtype).as_strided(size, strides, begin // dtype.itemsize)


@contextmanager
def _lent(stage: _Stage, block: torch.Tensor) -> Iterator[None]:
    """While it lasts, a candidate's block is what the live model computes with."""
    own = [tensor.data for tensor, _ in stage.live]
    try:
        for tensor, view in stage.live:
            tensor.data = _view(block, view)
        yield
    finally:
        for (tensor, _), data in zip(stage.live, own):
            tensor.data = data
