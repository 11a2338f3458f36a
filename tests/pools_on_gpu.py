"""A pytest plugin (`-p tests.pools_on_gpu`): every pool that a test opens in its process lies on the GPU, and the
tests, which know nothing of devices, run there.

What a test itself gives a model goes where the model is, and comparisons bring both sides to the CPU.
"""

import functools
import sys
from pathlib import Path

import torch

import merge3.pool
from merge3.memory import usable

ROOT = Path(__file__).resolve().parents[1]


def on_the_gpu(device):
    return usable("cuda" if torch.device(device).type == "cpu" else device)


def on_the_cpu(compare):
    @functools.wraps(compare)
    def wrapper(*arguments, **named):
        here = [a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
        return compare(*here, **named)

    return wrapper


def called_by_a_test() -> bool:
    frame = sys._getframe(2)
    while frame is not None and "torch" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and Path(frame.f_code.co_filename).is_relative_to(ROOT / "tests")


def where_the_model_is(call):
    @functools.wraps(call)
    def wrapper(self, *arguments, **named):
        parameter = next(self.parameters(), None)
        if parameter is not None and parameter.is_cuda and called_by_a_test():
            there = lambda x: x.to(parameter.device) if isinstance(x, torch.Tensor) else x
            arguments, named = [there(x) for x in arguments], {name: there(x) for name, x in named.items()}
        return call(self, *arguments, **named)

    return wrapper


torch.nn.Module.__call__ = where_the_model_is(torch.nn.Module.__call__)
merge3.pool.usable = on_the_gpu
torch.equal, torch.allclose = on_the_cpu(torch.equal), on_the_cpu(torch.allclose)
torch.testing.assert_close = on_the_cpu(torch.testing.assert_close)
