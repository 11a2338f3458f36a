"""The ways of packing, a row each: how parts are made of a source, and how a task's tensor is made of parts.

pack(source) -> Parts. step(get, common, name, task, about, before) -> what writes a task's tensor: get(part) reads a
part (a second argument is given where there is none); common: the common model's tensor; about: what was said of the
task; before: the task whose tensor is there, None for the common one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from merge3.methods import Job, Unpacked
from merge3.pool import Pool
from merge3.program import Program
from merge3.variants import factors, largest, masks, signs
from merge3.variants.source import Parts, Source


class Kind(NamedTuple):
    """A row. most(job, itemsize, tasks, settings): bytes that the parts of one tensor take for so many tasks, or more;
    itemsize: of the common model's tensor; settings: of the recipe's row. check(program, pool): raises what packing
    would refuse, and headers alone can tell."""

    pack: Callable[[Source], Parts]
    step: Callable[..., Unpacked]
    most: Callable[[Job, int, int, Mapping[str, Any]], int]
    check: Callable[[Program, Pool], Any] = lambda program, pool: None


KINDS: dict[str, Kind] = {
    "masks": Kind(masks.pack, masks.step, masks.most),
    "signs": Kind(signs.pack, signs.step, signs.most),
    "largest": Kind(largest.pack, largest.step, largest.most),
    "factors": Kind(factors.pack, factors.step, factors.most, factors.adapters),
}
