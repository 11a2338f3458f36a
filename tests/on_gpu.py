"""A pytest plugin (`-p tests.on_gpu`): every pool that a test opens in its process lies on the GPU, and the tests, which
know nothing of devices, run there.

Comparisons bring both sides to the CPU. MERGE3_TEST_REPORT names a file that gets a line for every failure: the test,
the last line of this project that it went through, what was raised.
"""

import functools
import os
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


merge3.pool.usable = on_the_gpu
torch.equal, torch.allclose = on_the_cpu(torch.equal), on_the_cpu(torch.allclose)
torch.testing.assert_close = on_the_cpu(torch.testing.assert_close)


def pytest_exception_interact(node, call, report):
    file = os.environ.get("MERGE3_TEST_REPORT")
    if not file or not report.failed:
        return
    own = [e for e in call.excinfo.traceback if Path(str(e.path)).is_relative_to(ROOT) and "site" not in str(e.path)]
    where = " < ".join(f"{Path(str(e.path)).relative_to(ROOT)}:{e.lineno + 1}" for e in reversed(own[-3:]))
    line = f"{node.nodeid} | {where} | {call.excinfo.typename}: {' '.join(str(call.excinfo.value).split())[:300]}\n"
    with open(file, "a") as out:
        out.write(line)
