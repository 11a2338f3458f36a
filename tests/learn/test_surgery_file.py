"""surgery.safetensors: what is saved is loaded again, and what is no such file is one line."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge3.errors import BadInput, CheckpointError
from merge3.learn.surgery import Adapters, load, save
from merge3.learn.surgery_file import save_beside
from merge3.live.hooks import Adapter, adapted
from tests.live.test_hooks import random_adapter


@pytest.fixture
def adapters():
    tasks = {task: random_adapter(6, rank=2, seed=i) for i, task in enumerate(("math", "it/aly é"))}
    return Adapters(tasks, {"math": "./math", "it/aly é": "./italian"}, "00112233")


def test_tasks_may_have_one_adapter(tmp_path):
    one = random_adapter(6, rank=2)
    save(Adapters({"a": one, "b": one}), tmp_path)
    assert torch.equal(load(tmp_path).tasks["b"].up, one.up)


def test_what_is_saved_is_loaded_again(adapters, tmp_path):
    assert save(adapters, tmp_path) == tmp_path / "surgery.safetensors"
    for path in (tmp_path, tmp_path / "surgery.safetensors", str(tmp_path)):
        found = load(path)
        assert (found.rank, found.width, found.parameters) == (2, 6, 48)
        assert (dict(found.experts), found.recipe) == (dict(adapters.experts), "00112233")
        assert list(found.tasks) == ["math", "it/aly é"]
        for task, adapter in adapters.tasks.items():
            assert torch.equal(found.tasks[task].down, adapter.down) and torch.equal(found.tasks[task].up, adapter.up)
    assert set(load_file(tmp_path / "surgery.safetensors")) == {
        "math.down", "math.up", "it/aly é.down", "it/aly é.up",
    }  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["surgery.safetensors"]  # nothing temporary is left
    data = (tmp_path / "surgery.safetensors").read_bytes()
    save(found, tmp_path)
    assert (tmp_path / "surgery.safetensors").read_bytes() == data


def about(**changes):
    found = {"format": 1, "rank": 2, "width": 6, "tasks": ["math"], "experts": {"math": "m"}, "recipe": "0"} | changes
    return {"surgery": json.dumps({key: value for key, value in found.items() if value is not None})}


def test_a_checkpoint_and_its_adapters_are_replaced_as_a_whole(adapters, tmp_path):
    model, written = tmp_path / "model", []

    def export(folder):
        assert not folder.exists()
        folder.mkdir()
        written.append(folder)
        (folder / f"weights-{len(written)}").touch()

    save_beside(adapters, model, export)
    save_beside(adapters, model, export)  # the same adapters: nothing is exported
    assert len(written) == 1 and load(model).recipe == "00112233"
    save_beside(Adapters(adapters.tasks, adapters.experts, "44556677"), model, export)
    assert len(written) == 2 and load(model).recipe == "44556677"
    (model / "surgery.safetensors").unlink()
    save_beside(adapters, model, export)
    assert {file.name for file in model.iterdir()} == {"weights-3", "surgery.safetensors"}

    def full(folder):
        export(folder)
        raise BadInput("disk", "full", "room")

    with pytest.raises(BadInput, match="^disk: full"):
        save_beside(Adapters(adapters.tasks), model, full)
    assert load(model).recipe == "00112233" and [file.name for file in tmp_path.iterdir()] == ["model"]


DOWN, UP = torch.ones(2, 6), torch.ones(6, 2)
DAMAGED = [
    ({"math.down": DOWN, "math.up": UP}, None, "nothing in its metadata about surgery"),
    ({"math.down": DOWN, "math.up": UP}, {"surgery": "{"}, "unreadable"),
    ({"math.down": DOWN, "math.up": UP}, {"surgery": "[1]"}, "nothing in its metadata about surgery"),
    ({"math.down": DOWN, "math.up": UP}, about(format=2), "format 2; expected 1, which this merge3 reads"),
    ({"math.down": DOWN, "math.up": UP}, about(rank=None), "metadata that is not complete; expected format, rank"),
    ({"math.down": DOWN, "math.up": UP}, about(tasks=3), "metadata that is not complete"),
    ({"math.down": DOWN, "math.up": UP}, about(rank=3), r"tensor 'math.down' of shape \[2, 6\] in float32; expected"),
    ({"math.down": DOWN, "math.up": DOWN + 1}, about(), r"tensor 'math.up' of shape \[2, 6\] in float32; expected"),
    ({"math.down": DOWN.half(), "math.up": UP}, about(), r"tensor 'math.down' of shape \[2, 6\] in float16"),
    ({"math.down": DOWN}, about(), "no tensor 'math.up'; expected `down` and `up` of every task"),
    ({"math.down": DOWN, "math.up": UP, "x": UP + 1}, about(), "a tensor 'x'; expected `down` and `up`"),
    ({"math.down": DOWN, "math.up": UP * math.nan}, about(), "tensor 'math.up' has NaN or infinite numbers"),
    ({"x": UP}, about(tasks=[]), "a tensor 'x'"),
]


@pytest.mark.parametrize("tensors, metadata, line", DAMAGED)
def test_a_file_that_is_not_right_is_one_line(tensors, metadata, line, tmp_path):
    save_file(tensors, tmp_path / "surgery.safetensors", metadata)
    with pytest.raises(CheckpointError, match=rf"surgery\.safetensors: {line}") as found:
        load(tmp_path)
    assert "\n" not in str(found.value)


def test_a_file_that_is_cut_or_missing_is_one_line(adapters, tmp_path):
    with pytest.raises(CheckpointError, match=r"no such file; expected adapters that `merge3-client fit` wrote"):
        load(tmp_path / "surgery.safetensors")
    file = save(adapters, tmp_path)
    data = file.read_bytes()
    for length in range(0, len(data), 37):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"^[^\n]*surgery\.safetensors: [^\n]+$"):
            load(tmp_path)
    for at in range(8, len(data) - 8, 29):  # any byte of the header, and of numbers: loaded, or one line
        file.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            load(tmp_path)
        except CheckpointError as error:
            assert "\n" not in str(error)


def test_an_adapter_moves_and_computes_in_float32():
    adapter = Adapter(DOWN, UP).to("cpu")
    z = torch.ones(1, 6, dtype=torch.bfloat16)
    assert adapter.changed(z).dtype == torch.float32 and adapter.changed(z).tolist() == [[1 - 12.0] * 6]
    with adapted(torch.nn.Identity(), None):
        pass
