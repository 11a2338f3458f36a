"""Is a run still the run it was? An older version of this project and this one search the same five configurations;
genomes, responses, values, failures, the winner's recipe, result.json and the exported bytes must be equal, bit for
bit.

    python benchmarks/same_run.py 716eaa6                       # clones and installs that commit: five minutes more
    python benchmarks/same_run.py 716eaa6 --checkout ../before  # one that is there already, with its own .venv

Ends with 1 where anything differs. For a refactoring, which changes nothing that a user can see.
"""

import argparse
import json
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from measure import report, table

from merge3.world.numbers import TASKS
from merge3.world.training import make_models

ROOT = Path(__file__).resolve().parent.parent
ITEMS = 60  # of each task
GENOME = {
    "models": ["./english", "./italian", "./translation"],
    "base_model": "./base",
    "merge_method": "ties",
    "layer_granularity": 2,
    "allow_negative_weights": True,
}
PLAN = {"budget": 24, "population": 6, "seed": 1}
CONFIGURATIONS = {
    "all items": {},
    "random items, renewed": {"extract": {"method": "random", "size": 8, "renew": 1}},
    "calibrated, checks, race": {
        "extract": {"method": "irt", "size": 8},
        "estimate": {"method": "gmp-irt", "models": 8, "check_every": 1},
        "race": {"share": 0.5},
    },
    # DELLA refuses some densities: candidates fail, and with the same words
    "DELLA, failing": {"genome": {"merge_method": "della", "genes": ["weight", "density"]}},
    "DARE, bfloat16": {"genome": {"merge_method": "dare_ties", "dtype": "bfloat16"}, "optimizer": {"seed": 9}},
}
TIMES = ("seconds", "swap_share")  # of result.json: differ from run to run


def checkout(commit: str, folder: Path) -> Path:
    """A clone at that commit with its own virtual environment."""
    if not (folder / ".git").exists():
        subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    subprocess.run(["git", "checkout", "--quiet", commit], cwd=folder, check=True)
    subprocess.run(["make", "install"], cwd=folder, check=True)
    return folder


def make_configurations(folder: Path) -> dict[str, Path]:
    """Trained models, and a file for each of CONFIGURATIONS."""
    if not (folder / "base").exists():
        make_models(folder, seed=0, base_steps=160, expert_steps=15)
        for task in TASKS:
            items = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()[:ITEMS]]
            items = _as_choices(items) if task == "english" else items
            (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    files = {}
    for number, (name, changes) in enumerate(CONFIGURATIONS.items()):
        data = {
            "genome": GENOME,
            "tasks": [{"items": f"./{task}.jsonl"} for task in ("english", "translation")],
            "optimizer": PLAN,
        }
        data |= {key: data.get(key, {}) | value for key, value in changes.items()}
        files[name] = folder / f"evolve-{number}.yaml"
        files[name].write_text(yaml.safe_dump(data))
    return files


def _as_choices(items: list[dict]) -> list[dict]:
    """The same questions with four answers to choose from: the right one and the next three that differ."""
    asked = []
    for at, item in enumerate(items):
        answers = dict.fromkeys(items[(at + i) % len(items)]["answer"] for i in range(len(items)))
        rest = {"kind": "choice", "choices": [f" {answer}" for answer in list(answers)[:4]], "answer": 0}
        asked.append({key: item[key] for key in ("id", "task", "prompt")} | rest)
    return asked


def evolve(programs: Path, config: Path, run: Path) -> None:
    """A whole run by the command of one version."""
    command = [programs / "merge3-client", "evolve", config, "--run-dir", run, "--json", "--quiet"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{programs}: {config.name} failed: {done.stderr[-2000:]}")


def found(run: Path) -> dict[str, object]:
    """Everything that must be equal, by name."""
    result = json.loads((run / "result.json").read_text())
    return {
        **journal(run),
        "best.yaml": yaml.safe_load((run / "best.yaml").read_text()),
        "result.json": {key: value for key, value in result.items() if key not in TIMES},
        **{file.name: file.read_bytes() for file in sorted((run / "model").iterdir()) if file.name != "README.md"},
    }


def journal(run: Path) -> dict[str, object]:
    """Columns of the journal in either of its two forms: values in a candidate's row, or in rows of their own."""
    with sqlite3.connect(f"file:{run / 'run.db'}?mode=ro", uri=True) as db:
        columns = [row[1] for row in db.execute("PRAGMA table_info(candidates)")]
        order = "ORDER BY generation, position"
        rows = db.execute(f"SELECT genome, responses, recipe_hash, error FROM candidates {order}").fetchall()
        table = "candidates" if "value" in columns else "estimates"
        values = db.execute(f"SELECT generation, position, value, stderr FROM {table} {order}").fetchall()
        answers = db.execute("SELECT * FROM answers ORDER BY stage, name").fetchall()
    genomes, responses, hashes, errors = zip(*rows)
    return {
        "genomes": genomes,
        "responses": responses,
        "recipe hashes": hashes,
        "errors": errors,
        "values": values,
        "answers outside the search": answers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the version to compare with")
    parser.add_argument("--checkout", type=Path, help="a clone of it with its own .venv")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    rows, differing = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        before = options.checkout or checkout(options.commit, folder / "checkout")
        here = Path(sys.executable).parent
        for name, config in make_configurations(folder / "world").items():
            runs = {"before": folder / f"{config.stem}-before", "now": folder / f"{config.stem}-now"}
            evolve(before.resolve() / ".venv" / "bin", config, runs["before"])
            evolve(here, config, runs["now"])
            old, new = found(runs["before"]), found(runs["now"])
            different = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            differing += len(different)
            failed = sum(error is not None for error in new["errors"])
            candidates = len(new["genomes"])
            size = sum(len(value) for value in new.values() if isinstance(value, bytes))
            verdict = "equal" if not different else ", ".join(different)
            rows.append([name, candidates, failed, len(new["answers outside the search"]), size, verdict])
            print(*rows[-1], sep=" | ", flush=True)
    columns = [
        "configuration",
        "candidates",
        "failed",
        "answers outside the search",
        "bytes exported",
        "against the version before",
    ]
    report("same_run", table(f"The same runs as at {options.commit}", columns, rows), {"rows": rows}, options.save)
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
