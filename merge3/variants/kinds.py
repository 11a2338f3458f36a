"""The ways of packing, a row each: how parts are made of a source, and how a task's tensor is made of parts.

pack(source) -> Parts. step(get, common, name, task, about, before) -> what writes a task's tensor: get(part) reads a
part (a second argument is given where there is none); common: the common model's tensor; about: what was said of the
task; before: the task whose tensor is there, None for the common one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from merge3.methods import Unpacked
from merge3.variants import factors, largest, masks, signs
from merge3.variants.source import Parts, Source


class Kind(NamedTuple):
    """A row. in_place: whether `before` matters, so that only what differs is written."""

    pack: Callable[[Source], Parts]
    step: Callable[..., Unpacked]
    in_place: bool = False


KINDS: dict[str, Kind] = {
    "masks": Kind(masks.pack, masks.step),
    "signs": Kind(signs.pack, signs.step),
    "largest": Kind(largest.pack, largest.step, in_place=True),
    "factors": Kind(factors.pack, factors.step),
}
