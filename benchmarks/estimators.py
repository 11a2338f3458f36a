"""How far are estimates from a few answers from the accuracy on all items, for real merges?

Gathers every search item's answers of the demo's endpoints, random merges and the candidates of a search
(about ten minutes on two cores; kept with --responses), calibrates on the endpoints and 24 random merges, and
estimates all other merges with every estimator, extractor and n.

python benchmarks/estimators.py --models runs/demo-0/models [--responses FILE.csv] [--save]
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from measure import report, table
from scipy.stats import kendalltau

from merge3.engine import LocalEngine
from merge3.irt import Responses, read_responses, write_responses
from merge3.irt import estimation as irt
from merge3.pool import Pool
from merge3.registration import Registration
from merge3.search import calibration, optimizers
from merge3.search.config_files import load_config
from merge3.search.gathering import random_genomes
from merge3.search.questions import load_questions
from merge3.space import Space
from merge3.tasks import item_key, keys_by_task

CALIBRATION, RANDOM, GENERATIONS, OF_EACH, SEEDS = 24, 160, 24, 5, 10
EXTRACTORS = ("random", "irt", "correctness", "entropy", "information")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="the models folder of a demo run")
    parser.add_argument("--responses", type=Path, help="read the answers from here, or keep them here")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 15, 20, 30, 50, 100])
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    config = load_config(options.models / "evolve.yaml")
    questions = load_questions(config)
    groups = keys_by_task(questions.search)
    if options.responses and options.responses.exists():
        everything = read_responses(options.responses).only([k for keys in groups.values() for k in keys])
    else:
        everything = gather(config, questions)
        if options.responses:
            write_responses(everything, options.responses)
    count = len(config.models) + CALIBRATION
    endpoints, first = everything.models[: len(config.models)], everything.models[:count]
    known = calibration.calibrate(everything.rows(first), groups, endpoints)
    others = everything.rows(everything.models[count:])
    truth = np.mean([others.only(keys).values.mean(1) for keys in groups.values()], 0)
    rows, data, plain = [], [], None
    for size in options.sizes:
        for extractor in EXTRACTORS:
            found = {method: estimates(known, others, groups, extractor, size, method) for method in irt.METHODS}
            if extractor == "random":
                plain = found["mean"]
            cells = []
            for method, (value, stderr) in found.items():
                error = np.abs(value - truth)
                less = np.abs(plain[0] - truth) - error
                # Merges are the sample: subsets of one merge are not independent.
                per_merge = less.mean(0)
                half = 1.96 * per_merge.std(ddof=1) / len(per_merge) ** 0.5
                data.append(
                    {
                        "n": size,
                        "extract": extractor,
                        "estimate": method,
                        "error": error.mean(),
                        "below_mean": per_merge.mean(),
                        "interval": half,
                        "covered": float((error < 2 * stderr).mean()),
                        "tau": float(np.mean([kendalltau(v, truth).statistic for v in value])),
                    }
                )
                # The paper's stability: estimates within ε of the truth choose a merge within 2 ε of the best.
                data[-1] |= {
                    "epsilon": float(error.max(1).mean()),
                    "gap": float(np.mean([truth.max() - truth[v.argmax()] for v in value])),
                }
                share = 100 * per_merge.mean() / np.abs(plain[0] - truth).mean()
                cells.append(
                    f"{error.mean():.4f} ({share:+.0f} %)"
                    if method != "mean" or extractor != "random"
                    else f"{error.mean():.4f}"
                )
            default = next(d for d in reversed(data) if d["estimate"] == "gmp-irt")
            row = [
                size,
                extractor,
                *cells,
                f"{100 * default['covered']:.1f} %",
                f"{default['tau']:.2f}",
                f"{default['epsilon']:.3f}",
                f"{default['gap']:.3f}",
            ]
            print(row, flush=True)
            if extractor in ("random", "irt") or size == 20:
                rows.append(row)
    columns = [
        "n per task",
        "items",
        *irt.METHODS,
        "within 2 se",
        "Kendall τ",
        "largest error ε",
        "best merge minus chosen",
    ]
    title = (
        f"Mean |estimate - accuracy| of {len(others.models)} merges not used in calibration, {SEEDS} subsets each; "
        f"in brackets: less than `mean` on random items; the last four columns are of gmp-irt"
    )
    report("estimators", table(title, columns, rows), {"rows": data}, options.save)
    if options.save:
        draw(data, Path(__file__).with_name("results") / "estimators.svg")


def draw(data: list[dict], path: Path) -> None:
    """Error against n, for random and chosen items."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for panel, extractor in zip(figure.subplots(1, 2, sharey=True), ("random", "irt")):
        for method in irt.METHODS:
            own = [d for d in data if d["extract"] == extractor and d["estimate"] == method]
            panel.plot([d["n"] for d in own], [d["error"] for d in own], "o-", markersize=4, label=method)
        panel.set(xscale="log", xlabel="items asked per task", title=f"{extractor} items")
        panel.set_xticks([d["n"] for d in own], [str(d["n"]) for d in own], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panel.legend()
    figure.axes[0].set_ylabel("mean |estimate - accuracy|")
    figure.savefig(path)


def estimates(
    known, others: Responses, groups, extractor: str, size: int, method: str
) -> tuple[np.ndarray, np.ndarray]:
    """(value, stderr), each [seeds, merges]: means over tasks."""
    values, errors = [], []
    for seed in range(SEEDS):
        subsets = calibration.subsets_of(known, extractor, size, seed)
        value, variance = 0.0, 0.0
        for task, keys in groups.items():
            estimator = irt.prepare(known.banks[task], known.responses[task], subsets[task], method, known.endpoints)
            found = irt.estimate(estimator, others.only(keys).values[:, subsets[task].index])
            value = value + found.value / len(groups)
            variance = variance + (found.stderr / len(groups)) ** 2
        values.append(value)
        errors.append(np.sqrt(variance))
    return np.array(values), np.array(errors)


def gather(config, questions) -> Responses:
    """Endpoints, random merges, and a random part of a search's candidates, on every search item."""
    pool = Pool.open(config.models[0], config.models[1:])
    pool.read_all()
    engine, space = LocalEngine(pool), Space(config.genome.definition(), pool.layouts[pool.base])
    all_items = Registration(tuple(questions.search), space.definition)
    names = [Path(m).name for m in config.models]
    rows = [evaluation.answers() for evaluation in engine.evaluate(all_items, config.models)]
    genomes = random_genomes(space, space.initial(), RANDOM, 1, config.optimizer.sigma)
    for evaluation in engine.evaluate(all_items, genomes):
        names.append(f"random-{evaluation.index}")
        rows.append(evaluation.responses)
    rng = np.random.default_rng(0)
    few = replace(all_items, items=tuple(questions.search[i] for i in rng.permutation(len(questions.search))[:400]))
    optimizer = optimizers.make("cma", space.initial(), *space.bounds(), config.optimizer.sigma, 20, 5)
    for generation in range(GENERATIONS):
        genomes = optimizer.ask()
        evaluations = list(engine.evaluate(few, genomes))
        optimizer.tell(genomes, [e.value for e in evaluations], [e.stderr for e in evaluations])
        for evaluation in engine.evaluate(all_items, [genomes[i] for i in rng.permutation(20)[:OF_EACH]]):
            names.append(f"search-{generation}-{evaluation.index}")
            rows.append(evaluation.responses)
        print(f"generation {generation} of {GENERATIONS}", flush=True)
    return Responses(tuple(names), tuple(map(item_key, questions.search)), np.array(rows))


if __name__ == "__main__":
    main()
