"""Ctrl-C while a long command runs."""

from __future__ import annotations

import signal


class StopOnInterrupt:
    """Ctrl-C once: finish the candidate at hand and leave; twice: leave now."""

    def __init__(self):
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    def __enter__(self):
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exc):
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
