"""Which optimizer finds a good merge with the fewest answers? On replay tables, where a search takes seconds.

For each world: a table of real merges (replay.py), and a stand-in fitted to it. Every optimizer then searches it from
several seeds, with all items for every candidate or a few random ones, new ones each generation. Its result is the
genome that it would name when it stops: its favorite, else the best it has seen. Told: answers until that is, for good,
at 95 % of what a search on all items finds (plain or with a surrogate, whichever is better, 1,000 candidates), median
over seeds; and how far it is after a fiftieth and a hundredth of that search's answers.

python benchmarks/optimizers.py [--worlds 0 1] [--seeds 5] [--folder DIR] [--save]    DIR keeps models and tables

These worlds are for tuning. What is claimed is measured on others: headline.py.
"""

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from measure import report, table
from replay import Stand, Table, gather

from merge3.client.demo import configuration
from merge3.search import optimizers
from merge3.search.config_files import load_config
from merge3.search.prior import steps_of
from merge3.world.training import make_models

ITEMS, FULL_ITEMS, BUDGET = 100, 250, 1000  # search items per task in a table, of a full search; its candidates


class Way(NamedTuple):
    """name: of the optimizer; size: items per task, 0 for all; assisted: whether estimates go through a surrogate;
    several: whether tasks are objectives."""

    name: str
    size: int
    population: int
    assisted: bool = False
    prior: bool = False
    several: bool = False


FULL = {
    "cma, all items": Way("cma", 0, 20),
    "cma + surrogate, all items": Way("cma", 0, 20, assisted=True),
}
FEW = {
    "random": Way("random", 9, 10),
    "cma": Way("cma", 9, 20),
    "cma + surrogate": Way("cma", 9, 10, assisted=True),
    "cma + surrogate, norms": Way("cma", 9, 10, assisted=True, prior=True),
    "cma + surrogate, 3 items": Way("cma", 3, 10, assisted=True),
    "cma + surrogate, 25 items": Way("cma", 25, 10, assisted=True),
    "cma + surrogate, of 5": Way("cma", 9, 5, assisted=True),
    "cma + surrogate, of 20": Way("cma", 9, 20, assisted=True),
    "catcma": Way("catcma", 9, 20),
    "nsga2 of tasks + surrogates": Way("nsga2", 9, 20, assisted=True, several=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=tuple(FEW), default=list(FEW))
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    rows, data = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for world in options.worlds:
            stand = Stand(tabled(world, options.folder or Path(temporary)))
            print(world, stand.fidelity, flush=True)
            rows += judged(world, stand, options.seeds, options.only, data)
    columns = ["world", "search", "of the full search at 1/100", "at 1/50", "answers to 95 %", "reached by"]
    title = f"Searches over stand-ins for the demo's merges, medians of {options.seeds} seeds"
    report("optimizers", table(title, columns, rows), {"rows": data, "seeds": options.seeds}, options.save)


def tabled(world: int, folder: Path) -> Table:
    """A world's, made unless the folder has it."""
    models, file = folder / f"world-{world}", folder / f"table-{world}.npz"
    if not file.exists():
        if not (models / "base").exists():
            models.mkdir(parents=True)
            make_models(models, world, progress=lambda *_: None)
        (models / "table.yaml").write_text(yaml.safe_dump(configuration(world) | {"limit": ITEMS}))
        gather(load_config(models / "table.yaml"), world, lambda text: print(world, text, flush=True)).save(file)
    return Table.load(file)


def judged(world: int, stand: Stand, seeds: int, only: list[str], data: list[dict]) -> list[list]:
    """A row of every way to search."""
    items = 4 * FULL_ITEMS
    best = {name: [search(stand, way, seed, BUDGET * items) for seed in range(seeds)] for name, way in FULL.items()}
    full = max(float(np.mean([run[-1][1] for run in runs])) for runs in best.values())
    searches = best | {
        name: [search(stand, FEW[name], seed, BUDGET * items // 40) for seed in range(seeds)] for name in only
    }
    rows = []
    for name, runs in searches.items():
        shares = [np.median([reached(run, BUDGET * items // part) for run in runs]) / full for part in (100, 50)]
        answers = [needed(run, 0.95 * full) for run in runs]
        found = float(np.median(answers))
        told = f"{found:,.0f} (1/{BUDGET * items / found:.0f})" if np.isfinite(found) else "not reached"
        got = f"{np.isfinite(answers).sum()} of {seeds}"
        rows.append([world, name, *(f"{share:.3f}" for share in shares), told, got])
        print(rows[-1], flush=True)
        data.append({"world": world, "search": name, "shares": shares, "answers": answers, "full": full})
        data[-1]["fidelity"] = stand.fidelity
    return rows


Course = list[tuple[int, float]]  # (answers so far, accuracy of what would be named)


def search(stand: Stand, way: Way, seed: int, budget: int) -> Course:
    """One search, to the end of its answers."""
    t = stand.table
    rng = np.random.default_rng([seed, 17])
    thresholds = rng.uniform(size=len(t.tasks))
    tasks = t.tasks.max() + 1
    steps = steps_of(t.norms) if way.prior else None
    how = 0.1, way.population, seed, way.assisted, False, None, tasks if way.several else 1, steps
    optimizer = optimizers.make(way.name, t.start, t.low, t.high, *how)
    asked, course, seen = 0, [], (-np.inf, t.start)
    while asked < budget:
        genomes = optimizer.ask()
        items = np.arange(len(t.tasks)) if not way.size else drawn(t.tasks, way.size, rng)
        solved = stand.chances(genomes)[:, items] > thresholds[items]
        own = t.tasks[items]
        values = np.stack([solved[:, own == task].mean(1) for task in range(tasks)], axis=1)
        errors = np.stack([solved[:, own == task].std(1) / (own == task).sum() ** 0.5 for task in range(tasks)], axis=1)
        mean, error = values.mean(1), np.sqrt((errors**2).sum(1)) / tasks
        optimizer.tell(genomes, *((values, errors) if way.several else (mean.tolist(), error.tolist())))
        asked += len(genomes) * (len(items) if way.size else 4 * FULL_ITEMS)
        seen = max(seen, (mean.max(), genomes[int(mean.argmax())]), key=lambda one: one[0])
        course.append((asked, float(stand.accuracy([named(optimizer, genomes, seen[1], way)])[0])))
    return course


def named(optimizer, genomes: list[np.ndarray], seen: np.ndarray, way: Way) -> np.ndarray:
    """What the search would name if it ended now."""
    favorite = optimizer.favorite()
    if favorite is not None:
        return favorite
    beliefs = optimizer.beliefs(genomes)
    if beliefs is None:
        return seen
    return genomes[int(np.reshape(beliefs[0], (len(genomes), -1)).mean(1).argmax())]


def drawn(tasks: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Random items, as many of every task."""
    return np.concatenate([rng.permutation(np.flatnonzero(tasks == t))[:size] for t in range(tasks.max() + 1)])


def reached(course: Course, answers: int) -> float:
    """With so many answers."""
    return max((point for point in course if point[0] <= answers), default=course[0], key=lambda point: point[0])[1]


def needed(course: Course, value: float) -> float:
    """Answers until it is there for good; infinite where it never is."""
    below = [i for i, (_, found) in enumerate(course) if found < value]
    after = below[-1] + 1 if below else 0
    return course[after][0] if after < len(course) else float("inf")


if __name__ == "__main__":
    main()
