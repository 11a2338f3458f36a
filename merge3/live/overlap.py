"""Swapping layer l + 1 while layer l computes: on a GPU, the merge runs on a stream of its own, stage after stage,
and the forward pass of a layer waits for that layer's weights alone.

On the CPU the stages simply run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from merge3.checkpoint.layout import Layout

Stage = int | None  # a layer; None for everything outside the stack, which comes first


class Overlap:
    """For one live model. What reads weights other than by calling the model must `settle` first."""

    def __init__(self, model: torch.nn.Module, layout: Layout, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending: dict[Stage, torch.cuda.Event] = {}
        self._waiting: set[int] = set()  # layers that wait for themselves
        for name, module in model.named_modules():
            prefix, _, number = name.rpartition(".")
            # A checkpoint of the backbone alone has the stack under a shorter name than the whole model.
            if number.isdigit() and (prefix == layout.prefix or prefix.endswith(f".{layout.prefix}")):
                module.register_forward_pre_hook(partial(self._wait, int(number)))
                self._waiting.add(int(number))
        model.register_forward_pre_hook(self._wait_outside)

    def run(self, stages: Iterable[tuple[Stage, Callable[[], None]]]) -> None:
        """Run each stage's merge, in order; on a GPU this returns before they are done."""
        if self.stream is None:
            for _, merge in stages:
                merge()
            return
        # The pass before still reads the weights that are about to be overwritten.
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            for stage, merge in stages:
                merge()
                self._pending[stage] = torch.cuda.Event()
                self._pending[stage].record(self.stream)

    def settle(self) -> None:
        """Let the current stream wait for all stages."""
        for stage in list(self._pending):
            self._wait(stage)

    def _wait_outside(self, *_) -> None:
        """For what is outside the stack, and for layers that go by another name in the live model."""
        for stage in list(self._pending):
            if stage not in self._waiting:
                self._wait(stage)

    def _wait(self, stage: Stage, *_) -> None:
        event = self._pending.pop(stage, None)
        if event is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(event)
