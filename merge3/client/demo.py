"""The demo: train a base and four experts, evolve their merge, show what came out."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from merge3.checkpoint import check_free
from merge3.client import run
from merge3.search.config_files import load_config
from merge3.world.numbers import ITEMS_PER_TASK, TASKS
from merge3.world.training import EXPERT_STEPS, make_models

BUDGET = 600


def configuration(seed: int, budget: int = BUDGET) -> dict:
    """The demo's evolve configuration: one weight per layer and expert."""
    experts = list(TASKS)
    return {
        "genome": {
            "models": [f"./{task}" for task in experts],
            "base_model": "./base",
            "merge_method": "task_arithmetic",
            "layer_granularity": 1,
            "allow_negative_weights": True,
            "bounds": {"weight": [-0.5, 1.5]},
        },
        "tasks": [{"items": f"./{task}.jsonl"} for task in experts],
        "extract": {"method": "random", "size": 150},
        "heldout": {"fraction": 0.3},
        "optimizer": {"name": "cma", "budget": budget, "population": 20, "sigma": 0.1, "seed": seed},
    }


def demo(
    seed: int,
    directory: Path,
    as_json: bool,
    quiet: bool,
    budget: int = BUDGET,
    steps: tuple[int, int] | None = None,
    items: int = ITEMS_PER_TASK,
) -> dict[str, Any]:
    """Run it all in a new directory; returns result.json's content with the training's seconds.

    steps: of training, of the base and of each expert; None: the base's until it is half trained. items: of every task.
    """
    place = check_free(directory)
    began = time.perf_counter()
    # Trained beside, moved when whole: a killed demo leaves no half-made models under the final name.
    partial = place.with_name(f".{place.name}.training")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    def progress(what: str, step: int, steps: int) -> None:
        if not quiet and (step % 20 == 0 or step == steps):
            print(
                f"\rtraining {what:<12} {step}/{steps} ", end="" if step < steps else "\n", file=sys.stderr, flush=True
            )

    make_models(partial, seed, *(steps or (None, EXPERT_STEPS)), items, progress)
    text = yaml.safe_dump(configuration(seed, budget), sort_keys=False)
    (partial / "evolve.yaml").write_text(text, encoding="utf-8")
    place.mkdir(parents=True, exist_ok=True)
    partial.rename(directory / "models")
    trained = time.perf_counter() - began
    config = load_config(directory / "models" / "evolve.yaml")
    result = run.evolve(config, directory / "run", as_json=as_json, quiet=quiet)
    if result is not None:
        result |= {"training_seconds": trained, "total_seconds": time.perf_counter() - began}
    return result
