"""Every random stream of a run, as a function of the configuration's one seed.

Streams are numbered apart so that no two draw the same numbers where that would show: which items are asked must not
follow from which genomes are. The numbers are part of what a run is: another one, and no journal could be continued.
"""

from __future__ import annotations

from collections.abc import Callable

Seed = int | list[int]

STREAMS: dict[str, Callable[..., Seed]] = {
    # drawn once, at the start
    "held-out": lambda seed: seed,  # which items the search never sees
    "limit": lambda seed: seed,  # which of a task's items are taken where there is a limit
    "start": lambda seed: seed,  # the genome that a search with random_init begins at
    "optimizer": lambda seed, number=0: seed + 6007 * number,  # number: of the round
    "race": lambda seed: seed,  # in which order contenders are asked items
    "study subset": lambda seed, count: [seed, 5, count],  # which experts a study merges
    "hypervolume": lambda seed: [seed, 4],  # which held-out items are drawn again for its interval
    "fit": lambda seed: [seed, 8],  # which items a fit learns from that the search begins at
    "experts": lambda seed: [seed, 6],  # which items compacted experts are asked
    "elites": lambda seed, number: [seed, 6, number],  # which items a round's contenders are asked
    "race of rounds": lambda seed: [seed, 7],  # in which order the rounds' best are asked items
    # calibration
    "calibration merges": lambda seed: seed + 1,
    "calibration items": lambda seed: seed + 2,  # the share of the items that each model answers
    "item bank": lambda seed: seed,
    # by generation, or by how often the subset was renewed
    "subset": lambda seed, draws: seed + 7919 * draws,
    "subset of a task": lambda seed, task: seed + 1000 * task,  # seed: the subset's
    "spot check": lambda seed, generation: [seed, 3, generation],
}


def seed_of(stream: str, seed: int, *at: int) -> Seed:
    """What numpy's generator of a stream is made from. at: the stream's own arguments (draw, task, generation)."""
    return STREAMS[stream](seed, *at)
