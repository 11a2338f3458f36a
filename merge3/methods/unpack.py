"""A task's model out of packed parts: a rule per way of packing, each for many tensors at once, in place.

What the parts mean is settled where they are made, in variants/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from merge3 import kernels
from merge3.kernels import RESCALE, Modes
from merge3.methods.base import Unpacked
from merge3.packed import bits_of

Outs = Sequence[torch.Tensor]
Steps = Sequence[Unpacked]


def _mask(outs: Outs, steps: Steps) -> None:
    """tensors: base, unified, mask. base + scale · mask · (unified − base), one fused pass."""
    bases, unified, masks = ([step.tensors[i] for step in steps] for i in range(3))
    kernels.merge_(outs, bases, unified, _scaled(steps), torch.ones(len(outs)), Modes("mask"), None, masks)


def _signs(outs: Outs, steps: Steps) -> None:
    """tensors: base, bits. base ± scale, one fused pass."""
    bases, bits = ([step.tensors[i] for step in steps] for i in range(2))
    kernels.merge_(outs, bases, [], _scaled(steps), torch.ones(len(outs)), Modes("signs"), None, bits)


def _places(outs: Outs, steps: Steps) -> None:
    """tensors: common, the places that hold another task's values, this task's places, its values; each but the first
    may be None. Touches those places alone, unless the output is to be written whole."""
    for out, step in zip(outs, steps):
        common, old, new, values = step.tensors
        flat = out.view(-1)
        if step.whole:
            out.copy_(common)
        elif old is not None:
            flat[old.long()] = common.view(-1)[old.long()].to(out.dtype)
        if new is not None:
            flat[new.long()] = values.to(out.dtype)


def _bits(outs: Outs, steps: Steps) -> None:
    """tensors: common, this task's places as bits, its values. Always the whole tensor."""
    for out, step in zip(outs, steps):
        common, words, values = step.tensors
        out.copy_(common)
        out.view(-1).masked_scatter_(bits_of(words, out.numel()), values.to(out.dtype))


def _factors(outs: Outs, steps: Steps) -> None:
    """tensors: base [m, d], left [m, rank], right [rank, d]. base + left · right, in float32."""
    for out, step in zip(outs, steps):
        base, left, right = step.tensors
        out.copy_(torch.addmm(base.float(), left.float(), right.float()))


RULES: dict[str, Callable[[Outs, Steps], None]] = {
    "mask": _mask,
    "signs": _signs,
    "places": _places,
    "bits": _bits,
    "factors": _factors,
}


def _scaled(steps: Steps) -> torch.Tensor:
    coefficients = kernels.coefficients(len(steps), 1)
    coefficients[:, 0, RESCALE] = torch.tensor([step.scale for step in steps])
    return coefficients
