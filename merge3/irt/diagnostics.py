"""Does the bank fit? Item fit, information, and a picture of both."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merge3.irt.bank import ItemBank
from merge3.irt.responses import Responses


@dataclass(frozen=True, eq=False)
class Fit:
    """Mean squares of standardised residuals, 1 where the model holds: outfit weighs answers alike,
    infit by their variance (Wright and Masters 1982). [N] each for items, [M] for models; NaN where
    nobody answered."""

    item_infit: np.ndarray
    item_outfit: np.ndarray
    model_infit: np.ndarray


def fit_statistics(bank: ItemBank, responses: Responses) -> Fit:
    """Infit and outfit of a bank on the responses it was fitted to."""
    p = bank.probability(bank.theta)
    variance = np.maximum(p * (1 - p), 1e-6)
    answered = responses.answered
    squares = np.where(answered, (np.nan_to_num(responses.values) - p) ** 2, 0.0)
    own = np.where(answered, variance, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        outfit = (squares / variance).sum(0) / answered.sum(0)
        return Fit(squares.sum(0) / own.sum(0), outfit, squares.sum(1) / own.sum(1))


def information(bank: ItemBank, theta: np.ndarray) -> np.ndarray:
    """Test information at abilities [C, D] along the first dimension, all items answered: [C]."""
    p = bank.probability(theta)
    return (p * (1 - p)) @ bank.a[:, 0] ** 2


def plot(bank: ItemBank, responses: Responses, path: str | Path, title: str = "") -> None:
    """Four panels as one image: abilities with 90 % intervals, items, information, reliability."""
    from matplotlib.figure import Figure

    from merge3.files import write_atomically

    figure = Figure(figsize=(11, 8), layout="constrained")
    (abilities, items), (curve, reliability) = figure.subplots(2, 2)
    order = np.argsort(bank.theta[:, 0])
    at = np.arange(len(order))
    abilities.errorbar(bank.theta[order, 0], at, xerr=1.645 * bank.theta_sd[order, 0], fmt="o", markersize=3)
    names = [Path(m).name for m in np.array(bank.models, object)[order]]
    abilities.set(title="abilities, 90 % intervals", xlabel="θ")
    abilities.set_yticks(at, names if len(names) <= 40 else [""] * len(names), fontsize=7)
    statistics = fit_statistics(bank, responses)
    dots = items.scatter(bank.b, bank.a[:, 0], c=np.clip(statistics.item_outfit, 0.5, 1.5), s=8, cmap="coolwarm")
    figure.colorbar(dots, ax=items, label="outfit (1: as the model says)")
    items.set(title=f"{len(bank.items)} items", xlabel="difficulty b", ylabel="discrimination a")
    low, high = bank.theta[:, 0].min() - 1, bank.theta[:, 0].max() + 1
    grid = np.zeros((200, bank.dimensions))
    grid[:, 0] = np.linspace(low, high, 200)
    curve.plot(grid[:, 0], information(bank, grid))
    curve.set(title="information of all items", xlabel="θ")
    p, answered = bank.probability(bank.theta), responses.answered
    edges = np.quantile(p[answered], np.linspace(0, 1, 11))
    which = np.clip(np.searchsorted(edges, p[answered]) - 1, 0, 9)
    y = responses.values[answered]
    bins = [b for b in range(10) if (which == b).any()]
    reliability.plot([0, 1], [0, 1], color="grey", linewidth=1)
    reliability.plot([p[answered][which == b].mean() for b in bins], [y[which == b].mean() for b in bins], "o-")
    reliability.set(title="predicted and observed", xlabel="predicted chance", ylabel="share solved")
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(Path(path), buffer.getvalue())
