"""Are item response models recovered from simulated answers, and how long do fits and estimates take?

python benchmarks/irt_fit.py [--save]      two minutes on two cores; also draws results/irt_fit.svg
"""

import argparse
import time
from pathlib import Path

import numpy as np
from measure import report, table

from merge3.irt import ItemBank, Responses
from merge3.irt import estimation as irt
from merge3.irt.bank import sigmoid
from merge3.irt.extraction import extract
from merge3.irt.fitting import fit

CASES = [(60, 300, 1), (60, 1000, 1), (200, 1000, 1), (100, 10_000, 1), (120, 600, 2), (200, 1000, 2)]
REPEATS = 4  # matrices of each shape; all abilities of one share its zero and unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    rows, data, fits = [], [], {}
    for models, items, dimensions in CASES:
        found = [recovery(models, items, dimensions, seed) for seed in range(1 if items > 5000 else REPEATS)]
        fits[models, items, dimensions] = found[0].pop("fit")
        for other in found[1:]:
            other.pop("fit")
        mean = {k: float(np.mean([f[k] for f in found])) for k in found[0]}
        data.append({"models": models, "items": items, "dimensions": dimensions} | mean)
        rows.append(
            [
                models,
                items,
                dimensions,
                f"{mean['ability']:.3f}",
                f"{mean['difficulty']:.3f}",
                f"{mean['discrimination']:.2f}" if dimensions == 1 else "",
                f"{100 * mean['ability_inside']:.0f} %" if dimensions == 1 else "",
                f"{100 * mean['difficulty_inside']:.0f} %",
                f"{mean['seconds']:.1f}",
            ]
        )
        print(rows[-1], flush=True)
    columns = [
        "models",
        "items",
        "D",
        "ability",
        "difficulty",
        "log discrimination",
        "abilities in 90 % interval",
        "difficulties in 90 % interval",
        "fit, s",
    ]
    title = (
        f"Correlations of fitted and true parameters (2PL, means of up to {REPEATS} simulated matrices; "
        "for D = 2 abilities are the smaller canonical correlation)"
    )
    seconds = estimation_seconds()
    text = table(title, columns, rows)
    text += f"\n\n10,000 candidates, 20 answers each, accuracy on 10,000 items by gmp-irt: {seconds:.1f} s."
    report("irt_fit", text, {"rows": data, "estimate_seconds": seconds}, options.save)
    if options.save:
        draw(fits[60, 1000, 1], Path(__file__).with_name("results") / "irt_fit.svg")


def simulate(models: int, items: int, dimensions: int, seed: int):
    g = np.random.default_rng(seed)
    theta = g.normal(size=(models, dimensions))
    a = np.exp(g.normal(0, 0.4, (items, 1))) if dimensions == 1 else g.normal(0.7, 0.8, (items, dimensions))
    b = g.normal(0, 1, items)
    y = (g.random((models, items)) < sigmoid(theta @ a.T - b)).astype(float)
    return theta, a, b, Responses(tuple(f"m{i}" for i in range(models)), tuple(f"i{i}" for i in range(items)), y)


def recovery(models: int, items: int, dimensions: int, seed: int) -> dict:
    theta, a, b, responses = simulate(models, items, dimensions, seed)
    start = time.perf_counter()
    bank = fit(responses, dimensions, seed=seed)
    seconds = time.perf_counter() - start
    correlation = lambda x, y: float(np.corrcoef(np.ravel(x), np.ravel(y))[0, 1])
    inside = lambda found, sd, true: float((np.abs(found - true) < 1.645 * sd).mean())
    common = {
        "difficulty": correlation(bank.b, b),
        "difficulty_inside": inside(bank.b, bank.b_sd, b),
        "seconds": seconds,
    }
    if dimensions == 1:
        own = {"ability": correlation(bank.theta, theta), "ability_inside": inside(bank.theta, bank.theta_sd, theta)}
        return common | own | {"discrimination": correlation(np.log(bank.a), np.log(a)), "fit": (bank, theta, b)}
    x, z = (np.linalg.qr(v - v.mean(0))[0] for v in (bank.theta, theta))
    return common | {"ability": float(np.linalg.svd(x.T @ z)[1].min()), "fit": (bank, theta, b)}


def estimation_seconds(candidates: int = 10_000, items: int = 10_000) -> float:
    """Of one call; the bank comes from a fit to 40 models."""
    _, _, _, responses = simulate(40, items, 1, 9)
    bank = fit(responses)
    subset = extract(bank, responses, "random", 20)
    estimator = irt.prepare(bank, responses, subset, "gmp-irt", responses.models[:4])
    g = np.random.default_rng(0)
    chances = sigmoid(g.normal(size=(candidates, 1)) * bank.a[subset.index, 0] - bank.b[subset.index])
    answers = (g.random(chances.shape) < chances).astype(float)
    start = time.perf_counter()
    irt.estimate(estimator, answers)
    return time.perf_counter() - start


def draw(found: tuple[ItemBank, np.ndarray, np.ndarray], path: Path) -> None:
    """Fitted against true abilities and difficulties, with 90 % intervals."""
    from matplotlib.figure import Figure

    bank, theta, b = found
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.errorbar(theta[:, 0], bank.theta[:, 0], yerr=1.645 * bank.theta_sd[:, 0], fmt="o", markersize=3, linewidth=1)
    right.errorbar(b, bank.b, yerr=1.645 * bank.b_sd, fmt="o", markersize=2, linewidth=0.3)
    for panel, name in ((left, "ability θ"), (right, "difficulty b")):
        panel.axline((0, 0), slope=1, color="grey", linewidth=1)
        panel.set(xlabel=f"true {name}", ylabel=f"fitted {name}, 90 % interval")
    figure.suptitle(f"{len(theta)} models, {len(b)} items")
    figure.savefig(path)


if __name__ == "__main__":
    main()
