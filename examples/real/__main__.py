"""Real checkpoints from packages, and what `evolve` makes of them:

    python -m examples.real [--directory build/real] [--only encoder|decoder]

Everything lands below the directory. What is there is not made again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from examples.real import convert, measure, skills
from examples.real.items import HAND_WRITTEN, write_encoder_items, write_rows
from merge3.client import run
from merge3.errors import Merge3Error
from merge3.files import write_atomically
from merge3.search.config_files import load_config
from merge3.tasks import read_items
from merge3.threads import configure

ENCODER: dict[str, Any] = {
    "genome": {
        "base_model": "../minilm",
        "models": ["../sre"],
        "merge_method": "task_arithmetic",
        "layer_granularity": 1,
        "allow_negative_weights": True,
        "bounds": {"weight": [-0.5, 1.5]},
    },
    "tasks": [{"items": f"{name}.jsonl", "metric": "mrr"} for name in HAND_WRITTEN],
    "extract": {"method": "all"},
    "heldout": {"fraction": 0.0},  # whole topics are kept apart, see items.py
    "optimizer": {"budget": 90, "population": 9, "sigma": 0.15, "seed": 0},
}
DECODER: dict[str, Any] = {
    "genome": {
        "base_model": "../smollm2",
        "models": [f"../smollm2+../{skill}" for skill in skills.SKILLS],
        "merge_method": "task_arithmetic",
        "layer_granularity": 10,
        "bounds": {"weight": [0.0, 1.5]},
    },
    "tasks": [{"items": f"{skill}.jsonl"} for skill in skills.SKILLS],
    "extract": {"method": "all"},
    "heldout": {"fraction": 0.1},  # the run's own table; the final one has items of its own, and answers are written
    "optimizer": {"budget": 72, "population": 8, "sigma": 0.15, "seed": 0},
}
TRAINING, BATCH, SEARCH, TEST = 384, 8, 100, 120  # examples of each skill, and items


class Steps:
    """Seconds of every step that was really taken, in steps.json. say: prints a line."""

    def __init__(self, folder: Path):
        self.file = folder / "steps.json"

    def take(self, name: str, there: Path, act: Callable[[], object]) -> None:
        """Act unless what it makes is there."""
        if there.exists():
            say(f"{name}: {there} is there")
            return
        say(f"{name} ...")
        start = time.perf_counter()
        act()
        known = json.loads(self.file.read_text()) if self.file.exists() else {}
        known[name] = known.get(name, 0) + time.perf_counter() - start
        write_atomically(self.file, json.dumps(known, indent=1))
        say(f"{name}: {known[name]:.0f} s")


def say(line: str) -> None:
    """To stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def evolved(folder: Path, configuration: dict[str, Any]) -> None:
    """The search of a configuration, in folder/run, resumed where it had begun."""
    (folder / "evolve.yaml").write_text(yaml.safe_dump(configuration, sort_keys=False))
    directory = folder / "run"
    if run.evolve(load_config(folder / "evolve.yaml"), directory, resume=(directory / "run.db").exists()) is None:
        raise SystemExit(130)


def measured(folder: Path, names: list[str], metrics: tuple[str, ...], facts: str) -> None:
    """The final table, on NAME-test.jsonl."""
    items = [item for name in names for item in read_items(folder / f"{name}-test.jsonl", name)]
    result = measure.compare(load_config(folder / "evolve.yaml"), folder / "run" / "best.yaml", items, metrics)
    for name, why in result["left_out"].items():
        say(f"left out: {name}: {why}")
    measure.save(folder, result, measure.table(result, metrics, facts))


def encoder(root: Path, steps: Steps) -> Path:
    """MiniLM and its fine-tune for site reliability engineering."""
    folder = root / "encoder"
    folder.mkdir(parents=True, exist_ok=True)
    for name in convert.ENCODERS:
        steps.take(f"encoder: {name}", root / name, lambda name=name: convert.encoder(name, root))
    write_encoder_items(folder)
    steps.take("encoder: evolve", folder / "run" / "result.json", lambda: evolved(folder, ENCODER))
    facts = f"{ENCODER['optimizer']['budget']} candidates"
    act = lambda: measured(folder, list(HAND_WRITTEN), ("acc", "mrr"), facts)
    steps.take("encoder: measure", folder / "table.md", act)
    return folder / "table.md"


def decoder(root: Path, steps: Steps) -> Path:
    """SmolLM2 and two experts, trained here."""
    folder = root / "decoder"
    folder.mkdir(parents=True, exist_ok=True)
    steps.take("decoder: smollm2", root / "smollm2", lambda: convert.decoder(root))
    for skill in skills.SKILLS:
        found = list(itertools.islice(skills.questions(skill, 0), TRAINING + SEARCH + TEST))
        write_rows(folder / f"{skill}.jsonl", skills.shown_rows(skill, found[TRAINING : TRAINING + SEARCH]))
        write_rows(folder / f"{skill}-test.jsonl", skills.rows(skill, found[TRAINING + SEARCH :]))
        act = lambda skill=skill, found=found: trained(root, skill, found[:TRAINING])
        steps.take(f"decoder: train {skill}", root / skill, act)
    steps.take("decoder: evolve", folder / "run" / "result.json", lambda: evolved(folder, DECODER))
    facts = f"{DECODER['optimizer']['budget']} candidates"
    act = lambda: measured(folder, list(skills.SKILLS), ("exact",), facts)
    steps.take("decoder: measure", folder / "table.md", act)
    return folder / "table.md"


def trained(root: Path, skill: str, examples: list[skills.Question]) -> None:
    """An adapter at root/skill."""
    partial = root / f".{skill}.partial"

    def report(step: int, count: int, loss: float) -> None:
        if step % 10 == 0 or step == count:
            say(f"training {skill}: step {step}/{count}, loss {loss:.3f}")

    skills.train(root / "smollm2", examples, partial, BATCH, report)
    partial.rename(root / skill)


def main() -> int:
    """Both examples, or one; prints their tables."""
    parser = argparse.ArgumentParser(prog="python -m examples.real", description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("build/real"))
    parser.add_argument("--only", choices=("encoder", "decoder"))
    options = parser.parse_args()
    configure()
    root = options.directory.resolve()
    root.mkdir(parents=True, exist_ok=True)
    steps = Steps(root)
    try:
        for name, act in (("encoder", encoder), ("decoder", decoder)):
            if options.only in (None, name):
                print(act(root, steps).read_text())
    except Merge3Error as error:
        say(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
