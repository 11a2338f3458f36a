"""Trains the demo's models into a folder, with an evolve.yaml beside them: python make_models.py FOLDER [SEED]."""

import sys
from pathlib import Path

import yaml

from merge3.client.demo import configuration
from merge3.world.training import make_models

folder, seed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
folder.mkdir(parents=True, exist_ok=True)
make_models(folder, seed, progress=lambda what, step, steps: step == steps and print(f"trained {what}", flush=True))
(folder / "evolve.yaml").write_text(yaml.safe_dump(configuration(seed), sort_keys=False))
