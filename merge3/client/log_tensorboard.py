"""A search in TensorBoard: `tensorboard --logdir RUN/tensorboard`. A step is a candidate, from 1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge3.search.config import EvolveConfig
from merge3.search.measure import unseen
from merge3.search.watching import Seen


class TensorBoard:
    """See loggers.Logger."""

    def __init__(self, directory: Path, config: EvolveConfig):
        from torch.utils.tensorboard import SummaryWriter

        # All earlier steps in this folder are void: a resumed run is told whole again.
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=0)
        self._writer.add_text("config", f"```\n{config.to_yaml()}\n```", 0)

    def candidate(self, number: int, seen: Seen, best: float | None) -> None:
        """Estimates, their errors, the best, seconds and answers."""
        for name, value, stderr in zip(seen.objectives, seen.values, seen.stderrs):
            self._scalar(f"estimate/{name}", value, number)
            self._scalar(f"stderr/{name}", stderr, number)
        self._scalar("best", best, number)
        self._scalar("seconds", seen.seconds, number)
        self._scalar("answers", seen.answers, number)

    def generation(self, number: int, candidates: int, mean: float | None) -> None:
        """Its mean, at its last candidate."""
        self._scalar("generation/mean", mean, candidates)
        self._scalar("generation/number", number, candidates)
        self._writer.flush()

    def end(self, result: Mapping[str, Any] | None) -> None:
        """Held-out accuracies, of the winner and the baselines; `searched` where none were held out."""
        if result is not None:
            measured = "heldout" if unseen(result) else "searched"
            self._scalar(f"{measured}/evolved", result["heldout"], result["candidates"])
            for name, value in result["baselines"].items():
                self._scalar(f"{measured}/{name}", value, result["candidates"])
        self._writer.close()

    def _scalar(self, name: str, value: float | None, step: int) -> None:
        if value is not None:
            self._writer.add_scalar(name, value, step)


def open_logger(directory: Path, config: EvolveConfig) -> TensorBoard:
    """Of a run directory."""
    return TensorBoard(directory, config)
