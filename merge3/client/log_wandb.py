"""A search in Weights & Biases, offline unless WANDB_MODE says otherwise: `wandb sync RUN/wandb/offline-run-*`.

Every process that works on a run directory makes a run of its own there, which has all candidates; a group holds those
of one directory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge3.search.config import EvolveConfig
from merge3.search.measure import unseen
from merge3.search.watching import Seen


class Wandb:
    """See loggers.Logger."""

    def __init__(self, directory: Path, config: EvolveConfig):
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")  # a search sends nothing anywhere unless somebody asks for it
        settings = wandb.Settings(console="off", silent=True)  # standard output is the command's own
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "merge3"),
            dir=str(directory),
            mode=mode,
            group=directory.resolve().name,
            config=config.model_dump(mode="json"),
            settings=settings,
        )

    def candidate(self, number: int, seen: Seen, best: float | None) -> None:
        """Estimates, their errors, the best, seconds and answers."""
        row = {"best": best, "seconds": seen.seconds, "answers": seen.answers, "generation": seen.generation}
        for name, value, stderr in zip(seen.objectives, seen.values, seen.stderrs):
            row |= {f"estimate/{name}": value, f"stderr/{name}": stderr}
        self._run.log({name: value for name, value in row.items() if value is not None}, step=number)

    def generation(self, number: int, candidates: int, mean: float | None) -> None:
        """Its mean, with its last candidate."""
        if mean is not None:
            self._run.log({"generation/mean": mean}, step=candidates)

    def end(self, result: Mapping[str, Any] | None) -> None:
        """Held-out accuracies, of the winner and the baselines, in the summary; `searched` where none were held out."""
        if result is not None:
            measured = "heldout" if unseen(result) else "searched"
            self._run.summary[f"{measured}/evolved"] = result["heldout"]
            for name, value in result["baselines"].items():
                self._run.summary[f"{measured}/{name}"] = value
        self._run.finish(exit_code=1 if result is None else 0)


def open_logger(directory: Path, config: EvolveConfig) -> Wandb:
    """Of a run directory."""
    return Wandb(directory, config)
