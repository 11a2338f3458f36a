"""Messages show names and numbers as people write them, not places in lists or numpy's types."""

from collections import OrderedDict

import numpy as np
import pytest
import torch

from merge3 import kernels
from merge3.checkpoint.layout import Ref
from merge3.errors import BadInput
from merge3.irt import Responses, read_responses
from merge3.irt.responses import ResponsesError
from merge3.methods.base import Elementwise, Fused, neutral
from merge3.methods.execute import execute


def world(**changes):
    """(outputs, get): two tensors merged from a base and two experts, some of them replaced."""
    names = ("model.a", "model.b")
    tensors = {Ref(model, name): torch.ones(4, 3) for model in ("base", "x/one", "x/two") for name in names}
    tensors |= {Ref(*key.split(":")): tensor for key, tensor in changes.items()}
    experts = lambda name: (Ref("x/one", name), Ref("x/two", name))
    steps = [(name, Ref("base", name), experts(name)) for name in names]
    return steps, tensors.__getitem__


WRONG = {
    "expert": ({"x/two:model.b": torch.ones(5, 3)}, r"tensor 'model.b' of x/two: found 15 elements, expected 12"),
    "first": ({"x/two:model.a": torch.ones(2, 3)}, r"tensor 'model.a' of x/two: found 6 elements"),
    "base": ({"base:model.b": torch.ones(4, 6)[:, ::2]}, r"tensor 'model.b' of base: "),
    "dtype": ({"x/one:model.b": torch.ones(4, 3, dtype=torch.int64)}, r"tensor 'model.b' of x/one: "),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("how", ["fused", "prepared", "rule"])
def test_kernels_messages_name_tensor_and_model(case, how):
    changes, message = WRONG[case]
    steps, get = world(**changes)
    outputs = []
    for name, base, experts in steps:
        step = Fused(kernels.Modes(), base, experts, neutral([0.5, 0.5]))
        if how == "rule":
            step = Elementwise("ram", base, experts, 0.1, np.ones(2))
        outputs.append((name, step, torch.empty(4, 3)))
    with pytest.raises(BadInput, match=message):
        execute(outputs, get, prepared=OrderedDict() if how == "prepared" else None)


def test_a_row_is_named_by_its_tensor():
    """Coefficients for every row: the kernel merges rows, eight of them here, and complains of the sixth."""
    steps, get = world(**{"x/two:model.b": torch.ones(4, 3, dtype=torch.float64)})
    outputs = [(n, Fused(kernels.Modes(), b, e, neutral(np.full((4, 2), 0.5))), torch.empty(4, 3)) for n, b, e in steps]
    with pytest.raises(BadInput, match="^tensor 'model.b' of x/two: "):
        execute(outputs, get)


def test_an_output_is_named():
    steps, get = world()
    outputs = [
        (n, Fused(kernels.Modes(), b, e, neutral([0.5, 0.5])), torch.empty(4, 3 + i))
        for i, (n, b, e) in enumerate(steps)
    ]
    with pytest.raises(BadInput, match="the merge's tensor 'model.b': found 16 elements, expected 12"):
        execute(outputs, get)


def test_scores_are_shown_as_numbers(tmp_path):
    for score, shown in (("100", "100"), ("1.5", "1.5")):
        (tmp_path / "r.csv").write_text(f"model,item,score\nm,a,1\nm,b,{score}\n")
        with pytest.raises(ResponsesError, match=rf"row 3: score {shown}; expected a number in \[0, 1\]"):
            read_responses(tmp_path / "r.csv")
    with pytest.raises(ResponsesError, match="model 'm', item 'a': score 2; expected"):
        Responses(("m",), ("a",), np.array([[2.0]]))
