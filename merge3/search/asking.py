"""What each candidate is asked and how its answers become fitness; checked, and renewed, during the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from merge3.engine import Engine
from merge3.fitness import TaskEstimator, mean_over_tasks
from merge3.search.calibration import Calibration, by_task, calibrate, choose, gather, given, item_key
from merge3.search.config import EvolveConfig
from merge3.search.questions import per_task
from merge3.search.store import Candidate, RunStore
from merge3.space import Space
from merge3.tasks import Item, LogitsError


@dataclass
class Asking:
    """subset: what the next candidates answer; estimator: None for the plain mean.

    draws: how many subsets there were before this one. checks: (generation, estimate, stderr, answers'
    mean, its stderr) of each spot check; drifted: generations whose check asked for another subset.
    """

    search: list[Item]
    subset: list[Item]
    estimator: TaskEstimator | None = None
    calibration: Calibration | None = None
    assumed: tuple[str, str, str] = ("all", "mean", "")
    draws: int = 0
    checks: list[tuple[int, float, float, float, float]] = field(default_factory=list)
    drifted: list[int] = field(default_factory=list)

    def unseen(self) -> list[int]:
        """Positions in `search` that the current subset leaves out."""
        asked = {id(item) for item in self.subset}
        return [i for i, item in enumerate(self.search) if id(item) not in asked]


def prepare(
    config: EvolveConfig, engine: Engine, space: Space, search: list[Item], subset: list[Item], heads, weights,
    assumed: tuple[str, str, str], store: RunStore, report: Callable[[int, int], None], stop: Callable[[], bool],
) -> Asking | None:  # fmt: skip
    """Calibrate where the estimator needs it, choose the subset, tell the engine. None if stopped."""
    how, what, _ = assumed
    if what == "mean":
        asking = Asking(search, subset, assumed=assumed)
    else:
        # Endpoints and merges answer with the heads of the run.
        engine.register(space, search, heads, weights)
        settings, seed = config.estimate, config.optimizer.seed
        if settings.calibration == "auto":
            responses = gather(engine, space, search, config.models, config, store, report, stop)
            if responses is None:
                return None
            groups = {task: [item_key(i) for i in group] for task, group in by_task(search).items()}
            calibration = calibrate(responses, groups, config.models, settings.dimensions, seed)
        else:
            calibration = given(settings.calibration, search, config.models, settings, seed)
        chosen, estimator = choose(calibration, search, how, config.extract.size, what, seed, bool(config.extract.renew))
        asking = Asking(search, chosen, estimator, calibration, assumed)
    engine.register(space, asking.subset, heads, weights, asking.estimator)
    return asking


def check(
    asking: Asking, config: EvolveConfig, engine: Engine, space: Space, weights, store: RunStore, generation: int,
    genomes: Sequence[np.ndarray], answered: dict[int, Candidate],
) -> bool:  # fmt: skip
    """Spot check: a random candidate of the generation answers as many items again that it was not asked.

    Returns whether the last three checks together are further from the estimates than the estimates' own
    standard errors allow (mean z² above 4): then it is time for another subset.
    """
    rng = np.random.default_rng([config.optimizer.seed, 3, generation])
    known = [p for p in range(len(genomes)) if not np.isnan(answered[p].value)]
    position = known[int(rng.integers(len(known)))]
    items, open_ = [], asking.unseen()
    for task in by_task(asking.search):
        own = [i for i in open_ if asking.search[i].task == task]
        items += sorted(rng.permutation(own)[: config.extract.size].tolist())
    if not items:
        return False
    asked = [asking.search[i] for i in items]
    ask = lambda: engine.answer(space.recipe(genomes[position]), asked)
    try:
        mean, error = mean_over_tasks(store.remember("check", f"{generation}", items, ask), asked, weights)
    except LogitsError:  # it has no answer to these items: nothing to compare its estimate with
        return False
    asking.checks.append((generation, answered[position].value, answered[position].stderr, mean, error))
    last = [c for c in asking.checks if not asking.drifted or c[0] > asking.drifted[-1]][-3:]
    squares = [(value - mean) ** 2 / max(stderr**2 + error**2, 1e-9) for _, value, stderr, mean, error in last]
    if len(last) < 3 or np.mean(squares) <= 4:
        return False
    asking.drifted.append(generation)
    return True


def renew(asking: Asking, config: EvolveConfig) -> None:
    """Draw the next subset."""
    asking.draws += 1
    how, what, _ = asking.assumed
    seed = config.optimizer.seed + 7919 * asking.draws
    if asking.calibration is None:
        asking.subset = per_task(asking.search, config.extract.size, np.random.default_rng(seed))
    else:
        asking.subset, asking.estimator = choose(asking.calibration, asking.search, how, config.extract.size, what, seed, True)
