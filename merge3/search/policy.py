"""What `auto` means: whether calibration pays, and with it how items are chosen and answers counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from merge3.errors import ConfigError
from merge3.search.config import EvolveConfig
from merge3.tasks import Item, by_task

WEIGHED = ("irt", "correctness", "entropy", "information")  # ways to choose items that are not a fair sample


class Policy(NamedTuple):
    """extract: how each candidate's items are chosen; estimate: how answers become accuracy; why: a line for people."""

    extract: str
    estimate: str
    why: str

    @property
    def subset(self) -> bool:
        """Whether candidates answer a part of the items."""
        return self.extract != "all"


def decide(config: EvolveConfig, items: Sequence[Item]) -> Policy:
    """The configuration's policy with `auto` decided: calibration must cost less than it saves.

    Raises ConfigError for an estimator that takes chosen items for a fair sample.
    """
    how, what, size = config.extract.method, config.estimate.method, config.extract.size
    saved = config.optimizer.budget * sum(max(0, len(group) - size) for group in by_task(items).values())
    cost = (len(config.models) + config.estimate.models) * config.estimate.share * len(items)
    worth = config.estimate.calibration != "auto" or saved > 2 * cost
    if how == "auto":
        how = _extract(what, worth)
    if what == "auto":
        what = "mean" if how in ("all", "random") else "gmp-irt"
    if how in WEIGHED and what == "mean":
        expected, hint = "an estimator that weighs chosen items", "gmp-irt, or extract: random"
        raise ConfigError("estimate.method", f"mean with extract.method {how}", expected, hint)
    return Policy(how, what, _why(config, how, what, worth))


def _extract(estimate: str, worth: bool) -> str:
    if estimate not in ("auto", "mean"):
        return "irt"
    if not worth:
        return "all"
    return "irt" if estimate == "auto" else "random"


def _why(config: EvolveConfig, how: str, what: str, worth: bool) -> str:
    size = config.extract.size
    if what != "mean":
        source = (
            "random merges and the endpoints" if config.estimate.calibration == "auto" else config.estimate.calibration
        )
        return f"candidates answer {size} items per task chosen by `{how}`; fitness is `{what}`, calibrated on {source}"
    why = f"candidates answer {'all items' if how == 'all' else f'{size} random items per task'}; fitness is their mean"
    if how == "all" and not worth and config.extract.method == "auto":
        why += " (too few items or candidates for calibration to pay)"
    return why
