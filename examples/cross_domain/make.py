"""Trains the models of this example into a folder, with its evolve.yaml beside them: python make.py FOLDER [SEED]."""

import shutil
import sys
from pathlib import Path

from merge3.threads import configure

configure()  # before torch: as many threads as cores that this process may use

from merge3.world.sight import make_sight  # noqa: E402

folder, seed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
folder.mkdir(parents=True, exist_ok=True)
make_sight(folder, seed, progress=lambda what, step, steps: step == steps and print(f"trained {what}", flush=True))
shutil.copy(Path(__file__).parent / "evolve.yaml", folder / "evolve.yaml")
