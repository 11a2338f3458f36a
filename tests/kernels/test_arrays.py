"""The kernels for NumPy and DLPack arrays, in a process that cannot import torch; and the same bits as torch's."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from merge3 import arrays, kernels
from merge3.kernels import Modes
from tests.kernels.test_merge import make_case, random_coefficients


def as_numpy(tensors):
    """bfloat16 as the 16-bit integers that NumPy has for it."""
    return [(t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy() for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sparsify", ["all", "magnitude", "random", "band"])
def test_numpy_and_dlpack_arrays_give_the_bits_of_torch(dtype, sparsify):
    base, experts = make_case([(30, 70), 100_003], 3, dtype)
    c, lam = random_coefficients(2, 3)
    expected = [torch.empty_like(b) for b in base]
    kernels.merge_(
        expected, base, experts, c, lam, Modes(sparsify, "sum", True, 2**63 + 5), torch.tensor([4, 2**32 - 1])
    )
    options = dict(
        sparsify=sparsify, elect="sum", normalize=True, seed=2**63 + 5, ids=np.array([4, 2**32 - 1], dtype=np.uint32)
    )
    for convert in (as_numpy, list):  # torch tensors speak DLPack
        out = [torch.empty_like(b) for b in base]
        arrays.merge(convert(out), convert(base), convert(experts), c.numpy(), lam.numpy(), **options)
        assert all(torch.equal(o, e) for o, e in zip(out, expected))


def test_statistics():
    base, experts = make_case([(30, 70), 1003], 2, torch.float32)
    assert np.array_equal(arrays.gram(as_numpy(base), as_numpy(experts), 2), kernels.gram(base, experts, 2).numpy())
    ranks = torch.tensor([[1, 500], [3, 1003]])
    found, expected = (
        arrays.order_statistics(as_numpy(base), as_numpy(experts), ranks.numpy()),
        kernels.order_statistics(base, experts, ranks),
    )
    for name, value in found.items():
        assert np.array_equal(value, getattr(expected, name).numpy()), name
    assert np.array_equal(arrays.coefficients(2, 3), kernels.coefficients(2, 3).numpy())
    assert arrays.build().split() == kernels.build_info()["devices"]


def test_no_torch_is_imported():
    script = """
import sys
sys.modules["torch"] = None  # any import of it fails
import numpy as np
from merge3 import arrays
base, experts = [np.zeros(5, np.float32)], [np.arange(5, dtype=np.float32), np.ones(5, np.float32)]
out = [np.empty(5, np.float32)]
c = arrays.coefficients(1, 2)
c[0, :, arrays.FIELDS.index("weight")] = 0.5
arrays.merge(out, base, experts, c)
assert out[0].tolist() == [0.5, 1.0, 1.5, 2.0, 2.5], out
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_bad_arrays_are_named():
    good = lambda: np.zeros(8, np.float32)
    c, merge = arrays.coefficients(1, 2), arrays.merge
    frozen = good()
    frozen.flags.writeable = False
    cases = [
        (dict(out=[frozen]), "out\\[0\\]: read-only"),
        (dict(out=[np.zeros(16, np.float32)[::2]]), "out\\[0\\]: not contiguous"),
        (dict(base=[np.zeros(8)]), "base\\[0\\]: dtype float64; expected float32, float16, or bfloat16"),
        (dict(experts=[good(), good().astype(np.float16)]), "experts\\[1\\]: another dtype"),
        (dict(experts=[good(), np.zeros(9, np.float32)]), "experts\\[1\\]: 9 elements; expected 8"),
        (dict(experts=[]), "experts: 0 arrays for 1 tensors"),
        (dict(experts=[good()] * 9), "experts: 9 per tensor; expected 1 to 8"),
        (
            dict(experts=[good(), [0.0] * 8]),
            "experts\\[1\\]: <class 'list'>; expected a NumPy array or one with __dlpack__",
        ),
        (dict(experts=[good(), torch.zeros(16)[::2]]), "experts\\[1\\]: not contiguous"),
        (dict(coefficients=arrays.coefficients(1, 3)), "coefficients: 24 numbers; expected 16"),
        (dict(sparsify="most"), "sparsify: unknown 'most'; expected all, magnitude"),
        (dict(lambda_=np.ones(2, np.float32)), "lambda_: 2 numbers; expected 1"),
    ]
    for change, message in cases:
        arguments = dict(out=[good()], base=[good()], experts=[good(), good()], coefficients=c) | change
        with pytest.raises(ValueError, match=message):
            merge(**arguments)
    same = good()
    with pytest.raises(ValueError, match="overlaps"):
        merge([same], [good()], [same, good()], c)
    merge([same], [same], [good(), good()], c)


def test_arrays_on_several_gpus_are_refused_with_both_named():
    """The arrays only say where they are: they are refused before anything reads them."""

    class Elsewhere:
        def __init__(self, *device):
            self.device, self.array = device, np.zeros(8, np.float32)

        def __dlpack_device__(self):
            return self.device

        def __dlpack__(self, stream=None):
            return self.array.__dlpack__()

    cuda, c = 2, arrays.coefficients(1, 2)
    first, second, host = Elsewhere(cuda, 0), Elsewhere(cuda, 1), np.zeros(8, np.float32)
    for experts, message in (
        ([second, first], "experts\\[1\\]: on cuda:0; expected cuda:1, where experts\\[0\\] is"),
        ([second, host], "experts\\[1\\]: on cpu; expected cuda:1, where experts\\[0\\] is"),
        ([host, second], "experts\\[1\\]: on cuda:1; expected cpu, where experts\\[0\\] is"),
    ):
        with pytest.raises(ValueError, match=message):
            arrays.merge([host], [host], experts, c)
    if "cuda" not in arrays.build():
        with pytest.raises(RuntimeError, match="this build has no CUDA kernels"):
            arrays.merge([second], [second], [second, second], c)
