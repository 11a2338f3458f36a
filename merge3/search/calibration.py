"""What is learned of the items before a search: a bank per task, which items to ask, how answers become accuracy.

Calibration models are the endpoints and random merges around the search's start (gathering.py), or those of a response
file. Every task has its own item bank, because a merge's abilities differ between tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from merge3.irt import ItemBank, Responses
from merge3.irt.estimation import Estimator, prepare
from merge3.irt.extraction import Subset, extract
from merge3.irt.fitting import fit
from merge3.irt.responses import ResponsesError
from merge3.search.seeds import seed_of
from merge3.tasks import Item, by_task


@dataclass(frozen=True)
class Calibration:
    """Per task: the responses and the bank fitted to them. endpoints: names of rows that are endpoints;
    answers: what it cost. asked: task -> a digest of its items, see gathering.digests; checkpoints: content hashes of
    the endpoints; both empty of those that a file of responses does not tell, None where an earlier version made it."""

    responses: dict[str, Responses]
    banks: dict[str, ItemBank]
    endpoints: tuple[str, ...]
    answers: int
    asked: Mapping[str, str] | None = None
    checkpoints: Sequence[str] | None = None


def calibrate(
    responses: Responses,
    groups: dict[str, list[str]],
    endpoints: Sequence[str],
    dimensions: int = 1,
    seed: int = 0,
    cost: int | None = None,
    report: Callable[[str, int, int], None] = lambda task, step, steps: None,
) -> Calibration:
    """Fit a bank per task. groups: task -> keys of its items. cost: answers, default all that are there.

    Raises ResponsesError where the responses do not reach a task's items.
    """
    own, banks = {}, {}
    for task, keys in groups.items():
        own[task] = responses.only(keys, f"responses: task {task!r}")
        progress = lambda step, steps, _, task=task: report(task, step, steps)
        try:
            banks[task] = fit(own[task], dimensions, seed=seed_of("item bank", seed), progress=progress)
        except ResponsesError as error:
            hint = error.hint or "or search without calibration: `estimate: {method: mean}`"
            raise ResponsesError(f"task {task!r}: {error.where}", error.found, error.expected, hint) from None
    answers = int(responses.answered.sum()) if cost is None else cost
    return Calibration(own, banks, tuple(endpoints), answers)


def key_groups(responses: Responses) -> dict[str, list[str]]:
    """Items by the task before the first slash of their keys; one task where there is none."""
    groups: dict[str, list[str]] = {}
    for key in responses.items:
        groups.setdefault(key.partition("/")[0] if "/" in key else "all", []).append(key)
    return groups


def choose(
    calibration: Calibration,
    items: Sequence[Item],
    method: str,
    size: int,
    estimator: str,
    seed: int,
    anywhere: bool = False,
) -> tuple[list[Item], dict[str, Estimator]]:
    """(the items to ask, task -> what makes accuracy of the answers); `size` per task, all of a smaller task.

    method: of irt.extract; estimator: of irt.prepare; anywhere: of each cluster any item, so that in time all are
    asked.
    """
    subsets, estimators = subsets_of(calibration, method, size, seed, anywhere), {}
    chosen = []
    for task, group in by_task(items).items():
        bank, responses = calibration.banks[task], calibration.responses[task]
        estimators[task] = prepare(bank, responses, subsets[task], estimator, calibration.endpoints)
        chosen += [group[i] for i in subsets[task].index]
    return chosen, estimators


def subsets_of(
    calibration: Calibration, method: str, size: int, seed: int, anywhere: bool = False
) -> dict[str, Subset]:
    """`size` items of every task, all of a smaller one."""
    subsets = {}
    for number, (task, bank) in enumerate(calibration.banks.items()):
        responses, own = calibration.responses[task], seed_of("subset of a task", seed, number)
        subsets[task] = extract(
            bank, responses, method, min(size, len(bank.items)), own, calibration.endpoints, anywhere
        )
    return subsets
