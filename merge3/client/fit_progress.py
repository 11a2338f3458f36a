"""What a person or a machine sees while a fit runs: a line now and then, or a JSON object for every step."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

_EVERY = 2.0  # seconds between two lines where nothing is measured


@contextmanager
def chosen(as_json: bool, quiet: bool, steps: int, replayed: int):
    """A function that is told every line of the history. replayed: steps that the run had before."""
    yield _silent if quiet else _machine(steps) if as_json else _lines(steps, replayed)


def _silent(line: Mapping[str, Any]) -> None:
    pass


def _machine(steps: int) -> Callable[[Mapping[str, Any]], None]:
    """Lines that stand beside a search's, which begins at the fit."""

    def show(line: Mapping[str, Any]) -> None:
        told = {"stage": "fit", "done": line["step"], "budget": steps} | dict(line)
        print(json.dumps(told), file=sys.stderr, flush=True)

    return show


def _lines(steps: int, replayed: int) -> Callable[[Mapping[str, Any]], None]:
    began, said = time.perf_counter(), -_EVERY

    def show(line: Mapping[str, Any]) -> None:
        nonlocal said
        now = time.perf_counter() - began
        if "heldout" not in line and now < said + _EVERY:
            return
        said, done = now, line["step"]
        left = int(now / max(1, done - replayed) * (steps - done))
        text = f"step {done}/{steps}  loss {line['loss']:.4f}"
        if "heldout" in line:
            text += f"  held-out {line['heldout']['accuracy']:.4f} ± {line['heldout']['stderr']:.4f}"
        print(f"{text}  {left // 60}:{left % 60:02d} left", file=sys.stderr, flush=True)

    return show
