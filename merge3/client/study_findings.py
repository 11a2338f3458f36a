"""The five findings of "What Matters for Model Merging at Scale?" (arXiv 2410.03617), asked of a study's numbers.

Each is one number with an interval: shown where the interval lies on the side that the paper tells of, not shown where
0 is in it. Nothing here is decided by eye.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from merge3.client.study_numbers import Numbers

Asked = tuple[np.ndarray | None, str]  # (a value and its draws, float64 [1 + draws]; None: cannot be asked), of what


def _better_base(numbers: Numbers) -> Asked:
    """Held-in share, worlds of the better base over those of the worse, at equal width."""
    qualities = _qualities(numbers)
    if len(qualities) < 2:
        return None, "worlds of two qualities at the same width"
    worse, better = qualities[0], qualities[-1]
    found = []
    for world in numbers.config.worlds:
        for other in numbers.config.worlds:
            if (world.quality, other.quality, world.width) == (better, worse, other.width):
                found.append(_over(numbers, [world.name]) - _over(numbers, [other.name]))
    if not found:
        return None, "worlds of two qualities at the same width"
    return np.mean(found, axis=0), f"held-in share, {better} over {worse} bases"


def _larger(numbers: Numbers) -> Asked:
    """Held-in share, the widest worlds over the narrowest, at equal quality."""
    found, said = _by_width(numbers, lambda world: _over(numbers, [world]))
    return found, f"held-in share, {said}"


def _fewer(numbers: Numbers) -> Asked:
    """Held-in share, the most experts over the fewest."""
    return _by_count(numbers, "heldin", -1)


def _more(numbers: Numbers) -> Asked:
    """Held-out share, the most experts over the fewest that have any."""
    return _by_count(numbers, "heldout", 1)


def _converging(numbers: Numbers) -> Asked:
    """How far the best method is from the worst: narrowest worlds over the widest."""
    if len(numbers.config.methods) < 2:
        return None, "two methods"
    found, said = _by_width(numbers, lambda world: _spread(numbers, world))
    return (None if found is None else -found), f"smaller spread of methods, {said}"


# the paper's finding -> what is asked; above 0: as the paper has it
FINDINGS: dict[str, Callable[[Numbers], Asked]] = {
    "merges of better bases keep more of their experts": _better_base,
    "merges of larger models keep more of their experts": _larger,
    "the more experts, the less of each is kept": _fewer,
    "the more experts, the better on tasks that are no expert's": _more,
    "methods come closer to each other as models grow": _converging,
}


def findings(numbers: Numbers) -> list[dict[str, Any]]:
    """{"finding", "verdict", "of", "value", "low", "high"} each, in the paper's order. A method that is without answers
    somewhere is asked nowhere, so that all that is compared is of the same methods."""
    numbers, without = _balanced(numbers)
    found = []
    for name, ask in FINDINGS.items():
        values, of = ask(numbers) if numbers.config.methods else (None, "a method with answers everywhere")
        if values is None:
            found.append({"finding": name, "verdict": "not asked", "of": f"needs {of}"} | dict.fromkeys(_BOUNDS))
            continue
        told = interval(values)
        found.append({"finding": name, "verdict": verdict(told), "of": of + without} | told)
    return found


def _balanced(numbers: Numbers) -> tuple[Numbers, str]:
    """(what is left of the numbers, which methods are not, as words)"""
    gone = {method for (_, method, _), values in numbers.grid.items() if np.isnan(values["heldin"][0])}
    grid = {key: values for key, values in numbers.grid.items() if key[1] not in gone}
    methods = tuple(method for method in numbers.config.methods if method.label not in gone)
    left = replace(numbers, grid=grid, config=numbers.config.model_copy(update={"methods": methods}))
    return left, f"; without {', '.join(sorted(gone))}" if gone else ""


_BOUNDS = ("value", "low", "high")


def interval(values: np.ndarray) -> dict[str, float | None]:
    """{"value", "low", "high"}: of 95 %. values: float64 [1 + DRAWS]. None where there is no number."""
    if np.isnan(values[0]):
        return {"value": None, "low": None, "high": None}
    low, high = np.nanpercentile(values[1:], (2.5, 97.5))
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def verdict(told: Mapping[str, float]) -> str:
    """Of an interval of 95 %."""
    if told["low"] > 0:
        return "shows"
    return "shows the opposite" if told["high"] < 0 else "does not show"


def _qualities(numbers: Numbers) -> list[str]:
    """From the one whose bases know least of the experts' tasks."""
    of: dict[str, list[float]] = {}
    for world in numbers.config.worlds:
        if world.quality is not None:
            of.setdefault(world.quality, []).append(float(numbers.base[world.name][0]))
    return sorted(of, key=lambda quality: np.mean(of[quality]))


def _over(numbers: Numbers, worlds: Sequence[str], counts: Sequence[int] = (), metric: str = "heldin") -> np.ndarray:
    """The mean over worlds, methods and numbers of experts."""
    found = []
    for (world, _, count), values in numbers.grid.items():
        if world in worlds and (not counts or count in counts):
            found.append(values[metric])
    return np.mean(found, axis=0)


def _by_width(numbers: Numbers, of: Callable[[str], np.ndarray]) -> Asked:
    """The widest worlds over the narrowest of the same quality, where there are both."""
    by_quality: dict[str | None, list[Any]] = {}
    for world in numbers.config.worlds:
        if world.width is not None:
            by_quality.setdefault(world.quality, []).append(world)
    found, said = [], ""
    for worlds in by_quality.values():
        worlds.sort(key=lambda world: world.width)
        if worlds[0].width < worlds[-1].width:
            found.append(of(worlds[-1].name) - of(worlds[0].name))
            said = f"width {worlds[-1].width:g} over {worlds[0].width:g}"
    return (np.mean(found, axis=0), said) if found else (None, "worlds of two widths at the same quality")


def _by_count(numbers: Numbers, metric: str, sign: int) -> Asked:
    worlds = [world.name for world in numbers.config.worlds]
    counts = []
    for count in sorted(numbers.config.experts):
        if not np.isnan(_over(numbers, worlds, [count], metric)[0]):
            counts.append(count)
    if len(counts) < 2:
        return None, "two numbers of experts"
    least, most = counts[0], counts[-1]
    change = _over(numbers, worlds, [most], metric) - _over(numbers, worlds, [least], metric)
    kind = "held-in share lost" if sign < 0 else "held-out share gained"
    return sign * change, f"{kind}, from {least} to {most} experts"


def _spread(numbers: Numbers, world: str) -> np.ndarray:
    """The best method's held-in share less the worst's, the mean over numbers of experts."""
    found = []
    for count in numbers.config.experts:
        own = [values["heldin"] for (name, _, n), values in numbers.grid.items() if (name, n) == (world, count)]
        found.append(np.max(own, axis=0) - np.min(own, axis=0))
    return np.mean(found, axis=0)
