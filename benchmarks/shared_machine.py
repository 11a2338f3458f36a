"""Does other work on the same cores slow a command down, or make it collapse? A search on the demo's models, an IRT
fit and a merge, each as a whole process, alone and beside one spinning process per core: wall and processor time.

    python benchmarks/shared_machine.py --before DIR --save       # fifteen minutes on two cores, more if it collapses
    python benchmarks/shared_machine.py --jobs merge --repeats 1

--before: a checkout of an older version with its own .venv, measured in turn with this one. Without it `before` is
this version with the variables that it started with before: threads by the host's count, which spin while they wait.
--folder: keeps what the jobs work on (trained models, answers, checkpoints) for another run.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from measure import median, report, table

from merge3.client import demo
from merge3.irt.bank import sigmoid
from merge3.threads import available
from merge3.world.training import make_models

CANDIDATES, MODELS, ITEMS = 60, 40, 1500
WALL, PROCESSOR = 3.0, 1.3  # limits, as ratios to the time alone
HERE = Path(sys.executable).parent
SPINNING = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(10**6):\n        pass"


class Busy:
    """One spinning process per core that we may use, for the length of a `with`. They also end with their parent."""

    def __enter__(self) -> None:
        self.processes = [subprocess.Popen([sys.executable, "-c", SPINNING]) for _ in range(available())]

    def __exit__(self, *exc) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def search(folder: Path) -> list:
    """Train the demo's models, unless they are there; the search as a command."""
    models = folder / "demo"
    if not (models / "evolve.yaml").exists():
        models.mkdir(parents=True, exist_ok=True)
        make_models(models, seed=0)
        (models / "evolve.yaml").write_text(yaml.safe_dump(demo.configuration(0, CANDIDATES)))
    return ["evolve", models / "evolve.yaml", "--no-export", "--run-dir", folder / "out", "--json", "--quiet"]


def fit(folder: Path) -> list:
    """Simulated answers; a calibration with them as a command."""
    answers = folder / "answers.csv"
    if not answers.exists():
        g = np.random.default_rng(0)
        theta, a, b = g.normal(size=MODELS), np.exp(g.normal(0, 0.4, ITEMS)), g.normal(0, 1, ITEMS)
        right = g.random((MODELS, ITEMS)) < sigmoid(np.outer(theta, a) - b)
        lines = [f"m{m},task/i{i},{int(right[m, i])}" for m in range(MODELS) for i in range(ITEMS)]
        answers.write_text("\n".join(["model,item,score", *lines]) + "\n")
    return ["calibrate", "--responses", answers, "--out", folder / "out", "--json", "--quiet"]


def merge(folder: Path) -> list:
    """A random base of 100 M parameters and two experts; their merge as a command."""
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"vocab_size": 16000, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=11)).to(torch.bfloat16)
        for name in ("base", "e0", "e1"):
            model.save_pretrained(folder / name)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p) * 0.002)
        experts = [
            {"model": str(folder / name), "parameters": {"weight": 0.5, "density": 0.5}} for name in ("e0", "e1")
        ]
        data = {"merge_method": "ties", "dtype": "bfloat16", "base_model": str(folder / "base"), "models": experts}
        recipe.write_text(yaml.safe_dump(data))
    return ["merge", recipe, folder / "out", "--json", "--quiet"]


JOBS = {
    "search": (search, f"demo search, {CANDIDATES} candidates"),
    "fit": (fit, f"IRT fit, {MODELS} x {ITEMS}"),
    "merge": (merge, "merge, 100 M parameters"),
}


def measured(programs: Path, arguments: list, out: Path, environment: dict[str, str]) -> tuple[float, float]:
    """(wall seconds, processor seconds) of merge3-client, with a place for what it writes."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(programs / "merge3-client"), *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
    )
    try:
        errors = process.stderr.read()
    except BaseException:
        process.kill()
        raise
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"merge3-client {arguments[0]} failed: {errors.decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def measure(
    job, folder: Path, before: Path | None, repeats: int, collapse: bool
) -> dict[str, list[tuple[float, float]]]:
    """Before and now alone, now beside others, in turn; before beside others once: it takes long."""
    arguments, out = job(folder), folder / "out"
    older = HERE if before is None else before / ".venv" / "bin"
    # What libgomp and OpenBLAS do when nothing is set.
    cores = str(os.cpu_count())
    spinning = (
        {"OMP_NUM_THREADS": cores, "OPENBLAS_NUM_THREADS": cores, "GOMP_SPINCOUNT": "300000"} if before is None else {}
    )
    found: dict[str, list[tuple[float, float]]] = {"before": [], "alone": [], "beside": [], "before beside": []}
    measured(HERE, arguments, out, {})  # files in the page cache, bytecode compiled
    for turn in range(repeats):
        found["before"].append(measured(older, arguments, out, spinning))
        found["alone"].append(measured(HERE, arguments, out, {}))
        with Busy():
            found["beside"].append(measured(HERE, arguments, out, {}))
            if turn == 0 and collapse:
                found["before beside"].append(measured(older, arguments, out, spinning))
        print({name: [f"{w:.1f} s ({p:.1f} s)" for w, p in times] for name, times in found.items()}, flush=True)
    shutil.rmtree(out, ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--no-collapse", action="store_true", help="leave out the older version beside others: it takes long"
    )
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    rows, data = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.jobs:
            job, title = JOBS[name]
            found = measure(job, folder, options.before, options.repeats, not options.no_collapse)
            wall, processor = (
                {n: median([t[i] for t in times]) for n, times in found.items() if times} for i in (0, 1)
            )
            ratios = {
                "alone": wall["alone"] / wall["before"],
                "wall": wall["beside"] / wall["alone"],
                "processor": processor["beside"] / processor["alone"],
            }
            if not options.no_collapse:
                ratios["before_wall"] = wall["before beside"] / wall["before"]
                ratios["before_processor"] = processor["before beside"] / processor["before"]
            rows.append(
                [
                    title,
                    f"{wall['before']:.1f}",
                    f"{wall['alone']:.1f}",
                    f"**{ratios['alone']:.2f}**",
                    f"{wall['beside']:.1f}",
                    f"**{ratios['wall']:.2f}**",
                    f"**{ratios['processor']:.2f}**",
                    *(
                        []
                        if options.no_collapse
                        else [
                            f"{wall['before beside']:.1f}",
                            f"{ratios['before_wall']:.2f}",
                            f"{ratios['before_processor']:.2f}",
                        ]
                    ),
                ]
            )
            data[name] = {"wall": wall, "processor": processor, "ratios": ratios, "times": found}
    columns = [
        "",
        "alone, before, s",
        "alone, s",
        "ratio",
        "beside, s",
        f"times its wall time (limit {WALL:g})",
        f"times its processor time (limit {PROCESSOR:g})",
        "before: beside, s",
        "wall",
        "processor",
    ]
    columns = columns[:7] if options.no_collapse else columns
    times = f"medians of {options.repeats}" + ("" if options.no_collapse else "; `before` beside them: once")
    title = f"Whole processes, alone and beside {available()} busy processes ({times})"
    report("shared_machine", table(title, columns, rows), data, options.save and len(options.jobs) == len(JOBS))


if __name__ == "__main__":
    main()
