"""A fit on a daemon: the stream of its steps, and how one that breaks is taken up again.

What the daemon is sent again is the last state that came from it. The steps after that one are fitted a second time, to
the same bits, and those that the driver has seen are not told again.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import grpc

from merge3.client.channel import translated
from merge3.client.remote_stream import PASSING
from merge3.errors import BadInput, Merge3Error, Unavailable
from merge3.learn.fit import Fit, FitStep
from merge3.learn.fitting import State
from merge3.registration import Registration
from merge3.rpc import fits
from merge3.rpc import merge3_pb2 as pb
from merge3.tasks.items import located

_AGAIN = 1.0  # seconds until a daemon may have missed the stream that broke
Begin = Callable[[pb.FitRequest], grpc.Call]
Recover = Callable[[Merge3Error, float, int], None]


def fit_steps(
    registration: Registration,
    fit: Fit,
    state: State | None,
    begin: Begin,
    recover: Recover,
    address: str,
    patience: float,
) -> Iterator[FitStep]:
    """Steps after `state`'s, each once, however often the daemon went away.

    begin: sends the request, with the pool and the registration in it. recover(error, until, attempt): waits until it
    makes sense to begin again, or raises the error. patience: seconds that the daemon may be away. Raises Unavailable
    where the daemon ends before the last step as if it were done.
    """
    tasks = registration.tasks()
    experts = {task: expert for task, expert in fit.experts.items() if task in tasks}  # others have nothing to say
    request = fits.fit_to(replace(fit, experts=experts))
    seen = state.step if state else 0
    failures, until, broken = 0, 0.0, False
    while True:
        if state is not None:
            request.state.CopyFrom(fits.state_to(state))
        stream = begin(request)
        try:
            with translated(address), closing(_read_ahead(stream)) as messages:
                for message in messages:
                    failures = 0
                    step = fits.step_from(message, fit, tasks)
                    state = step.state or state
                    if step.number > seen:
                        seen = step.number
                        yield step
        except PASSING as error:
            until = until if failures else time.monotonic() + patience
            occupied = broken and isinstance(error, fits.Occupied)  # by our stream before, which it takes for alive
            if occupied and time.monotonic() < until:
                time.sleep(_AGAIN)
            else:
                recover(error, until, failures)
            broken, failures = True, failures + 1
        except BadInput as error:
            raise located(error, registration.items) from None
        else:
            break
    reached, steps = state.step if state else 0, fit.settings.steps
    if reached < steps:  # said to be well, so it would end there again
        raise Unavailable(f"daemon {address}", f"ended a fit of {steps} steps after step {reached}", "all of them")


def _read_ahead(stream: grpc.Call) -> Iterator[pb.FitStep]:
    """A stream's messages, read by a thread of its own: a driver that measures something between two steps is no reader
    that has stalled."""
    found: queue.SimpleQueue = queue.SimpleQueue()

    def read() -> None:
        try:
            for message in stream:
                found.put(message)
            found.put(None)
        except Exception as error:  # told to whoever waits for the next message, who would wait for ever
            found.put(error)

    threading.Thread(target=read, daemon=True, name="fit").start()
    try:
        while (message := found.get()) is not None:
            if isinstance(message, Exception):
                raise message
            yield message
    finally:
        stream.cancel()
