"""How long do two workers wait for each other? By generations, and with the next candidate asked when one is answered.

python benchmarks/steady.py [--seeds 0 1 2] [--budget 120] [--items 1000] [--save]    some ten minutes on two cores

A daemon with two Ray workers of one thread each, and searches over two experts of one skill, one of which answers at
once and the other says the question again (merge3/world/wordy.py). Merges of them write between two words and as many
as they may, so candidates take unequally long. A worker is idle when it merges and asks nothing: the search's seconds,
from the first question to the last answer, times two, without the seconds that candidates took. Both ways take turns on
the same daemon, after a short search that is not counted.
"""

import argparse
import json
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import yaml
from daemon import WORLDS, Daemon
from measure import median, report, table

from merge3.client.remote import RemoteEngine
from merge3.search.config import EvolveConfig
from merge3.search.config_files import load_config
from merge3.search.journal import Journal
from merge3.search.questions import load_questions
from merge3.search.run import run
from merge3.world.kept import made
from merge3.world.wordy import make_wordy

WORKERS, MOST = 2, 20  # words of an answer at most
WAYS = {"a generation at a time": "generations", "steady": "steady"}
# (layer_granularity, whether there is a surrogate): few genes make small generations, after each of which workers wait.
KINDS = {
    "a weight a model: generations of 6": (0, False),
    "a weight a layer: generations of 11": (1, False),
    "the same, with the surrogate": (1, True),
}


class Timed:
    """An engine, and when its evaluations came: (time, seconds that it took), since `began`."""

    def __init__(self, engine: RemoteEngine):
        self._engine, self.began, self.came = engine, 0.0, []

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def evaluate(self, registration, subjects):
        return self._noted(self._engine.evaluate(registration, subjects))

    def evaluate_each(self, questions, in_flight):
        return self._noted(self._engine.evaluate_each(questions, in_flight))

    def _noted(self, evaluations):
        self.began = self.began or time.perf_counter()
        with closing(evaluations):
            for evaluation in evaluations:
                self.came.append((time.perf_counter(), evaluation.seconds))
                yield evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=120)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    world = made(WORLDS, make_wordy)
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Daemon(world, "--workers", f"ray:{WORKERS}", "--threads", "1") as daemon,
    ):
        place = Path(folder)
        items = longer(world / "sums.jsonl", place / "items.jsonl", options.items)
        for kind, (granularity, surrogate) in KINDS.items():
            settings = {"surrogate": surrogate, "budget": 12, "seed": 99}
            searched(daemon, configured(world, items, place, granularity, settings), place)
            for seed in options.seeds:
                for way, asking in WAYS.items():
                    settings |= {"budget": options.budget, "seed": seed, "asking": asking}
                    one = searched(daemon, configured(world, items, place, granularity, settings), place)
                    found.append({"kind": kind, "way": way, "seed": seed} | one)
                    print(found[-1], flush=True)
    rows = []
    for kind in KINDS:
        for way in WAYS:
            own = [one for one in found if (one["kind"], one["way"]) == (kind, way)]
            of = lambda key, own=own: [one[key] for one in own]
            idle = [f"{100 * share:.1f}" for share in of("idle")]
            lengths = " / ".join(f"{1000 * median(of(key)):.0f}" for key in ("p10", "p50", "p90"))
            rows.append([kind, way, f"**{100 * median(of('idle')):.1f}**", ", ".join(idle), lengths])
            rows[-1] += [f"{median(of('per_minute')):.0f}", f"{median(of('best')):.3f}"]
    title = f"Idle share of {WORKERS} Ray workers, %: {options.budget} candidates of {options.items} questions"
    columns = ["genome", "asked", "idle", "of each seed", "a candidate, ms (p10 / p50 / p90)", "candidates a minute"]
    columns.append("best, held out")
    report("steady", table(title, columns, rows), vars(options) | {"found": found}, options.save)


def longer(questions: Path, file: Path, count: int) -> Path:
    """Questions with room for `MOST` words, so that merges which do not come to an end take their time."""
    rows = [json.loads(line) | {"max_tokens": MOST} for line in questions.read_text().splitlines()[:count]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def configured(world: Path, items: Path, folder: Path, granularity: int, optimizer: dict) -> EvolveConfig:
    """Every candidate answers all items, so that what differs is how much it writes."""
    experts = [str(world / name) for name in ("terse", "verbose")]
    genome = {"base_model": str(world / "base"), "models": experts, "merge_method": "task_arithmetic"}
    data = {
        "genome": genome | {"layer_granularity": granularity, "bounds": {"weight": [-0.5, 1.5]}},
        "tasks": [{"items": str(items)}],
        "extract": {"method": "all"},
        "estimate": {"method": "mean"},
        "race": {"candidates": 0},
        "optimizer": optimizer,
    }
    (folder / "evolve.yaml").write_text(yaml.safe_dump(data))
    return load_config(folder / "evolve.yaml")


def searched(daemon: Daemon, config: EvolveConfig, folder: Path) -> dict[str, float]:
    """Of one search: its workers' idle share, how fast it was, how long candidates took, what came of it."""
    budget = config.optimizer.budget
    with (
        closing(RemoteEngine(daemon.address, config.models)) as engine,
        closing(Journal(tempfile.mkdtemp(dir=folder))) as journal,
    ):
        timed = Timed(engine)
        outcome = run(config, load_questions(config), timed, journal)
    took = [seconds for _, seconds in timed.came[:budget]]
    wall = timed.came[budget - 1][0] - timed.began
    quantiles = dict(zip(("p10", "p50", "p90"), np.quantile(took, (0.1, 0.5, 0.9)).tolist()))
    idle = 1 - sum(took) / (WORKERS * wall)
    found = {"idle": idle, "per_minute": 60 * budget / wall, "wall_s": wall, "best": outcome.heldout["accuracy"]}
    return found | quantiles


if __name__ == "__main__":
    main()
