"""Forwards of one model that take turns: each goes as far as the next layer of a stack, and waits there.

A forward that waits is a coroutine of its own (greenlet), stopped in a hook before a layer, whatever code the model is
made of. All of them run in the caller's thread, so torch's settings of a thread (its device, streams, whether it
records gradients) are those of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet

from merge3.tasks.requests import Pass


class Turn(greenlet):
    """A forward under way. results: what it told, once it is done."""

    def __init__(self, asked: Pass):
        super().__init__()
        self.asked, self.results = asked, []
        self._around: Any = None

    def run(self) -> None:
        """The forward, from its beginning to its end; greenlet calls it."""
        self._enter()
        try:
            self.results = self.asked.run()
        finally:
            self._leave()

    def go_on(self) -> bool:
        """Up to the next layer, or to the end. Whether it waits there for another turn."""
        self.parent = getcurrent()
        self.switch()
        return not self.dead

    def wait(self) -> None:
        """Called by what it runs: the turn ends here, and what comes is another one's."""
        self._leave()
        self.parent.switch()
        self._enter()

    def _enter(self) -> None:
        around = self.asked.around()
        around.__enter__()
        self._around = around

    def _leave(self) -> None:
        around, self._around = self._around, None
        if around is not None:
            around.__exit__(None, None, None)


@contextmanager
def taking_turns(layers: Sequence[torch.nn.Module], turns: Sequence[Turn]) -> Iterator[None]:
    """While it lasts, turns wait before each of these layers and after the last. Those that are not done at its end are
    abandoned."""
    handles = [layer.register_forward_pre_hook(_wait) for layer in layers]
    handles.append(layers[-1].register_forward_hook(_wait))
    try:
        yield
    finally:
        try:
            for turn in turns:
                if turn and not turn.dead:
                    turn.throw(GreenletExit)
        finally:
            for handle in handles:
                handle.remove()


def _wait(*_: Any) -> None:
    current = getcurrent()
    if isinstance(current, Turn):
        current.wait()
