"""A small world with a configuration to search it."""

from __future__ import annotations

from pathlib import Path

import yaml

from merge3.world.training import make_models

ITEMS = 40  # of every task


def make_searched(folder: Path, base_steps: int, expert_steps: int) -> None:
    """Models and 40 questions of every task, and an evolve.yaml that merges three experts for two tasks."""
    make_models(folder, seed=0, base_steps=base_steps, expert_steps=expert_steps, items=ITEMS)
    config = {
        "genome": {
            "models": ["./english", "./italian", "./translation"],
            "base_model": "./base",
            "merge_method": "ties",
            "layer_granularity": 2,
            "allow_negative_weights": True,
        },
        "tasks": [{"items": f"./{task}.jsonl"} for task in ("english", "translation")],
        "optimizer": {"budget": 24, "population": 6, "seed": 3},
    }
    (folder / "evolve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
