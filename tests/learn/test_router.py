"""A router: the nearest mean of what the common model makes of prompts."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge3 import Pool, Slot
from merge3.errors import BadInput, CheckpointError, ItemsError
from merge3.learn.router import Router, fit_router, load_router, prompt_states, save_router
from merge3.tasks import Item
from merge3.world.digits import make_digits
from merge3.world.family import make_family
from merge3.world.tokenizer import make_tokenizer
from tests.worlds import shared

PROMPTS = ["one plus two", "two", "three plus one", "four plus four equals", "five", "six plus one plus two", "seven"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama with words."""
    folder, tokenizer = tmp_path_factory.mktemp("words"), make_tokenizer()
    make_family(folder, experts=0, layers=2, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def model(folder):
    return Slot(Pool.open(str(folder), [])).model


def items(prompts, task="t", kind="generate"):
    return [Item(str(i), task, kind, prompt, ("one",), metric="exact") for i, prompt in enumerate(prompts)]


def alone(model, folder, prompt):
    """The mean of the last layer's states, one prompt at a time."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    return model.base_model(input_ids=ids).last_hidden_state[0].mean(0)


def test_states_are_means_over_tokens_whatever_stands_beside(model, folder):
    found = prompt_states(model, folder, items(PROMPTS))
    assert found.dtype == torch.float32 and found.shape == (7, 32)
    for prompt, states in zip(PROMPTS, found):
        torch.testing.assert_close(states, alone(model, folder, prompt), atol=1e-5, rtol=1e-5)
    again = prompt_states(model, folder, items(PROMPTS[::-1]))
    torch.testing.assert_close(again.flip(0), found, atol=1e-5, rtol=1e-5)


def test_batches_of_prompts_say_what_one_says(model, folder, monkeypatch):
    from merge3.learn import router

    whole = prompt_states(model, folder, items(PROMPTS))
    monkeypatch.setattr(router, "_BATCH", 7)
    torch.testing.assert_close(prompt_states(model, folder, items(PROMPTS)), whole, atol=1e-5, rtol=1e-5)


def test_the_nearest_mean(model, folder):
    own = {"short": items(["two", "five", "seven"]), "long": items(["four plus four equals", "six plus one plus two"])}
    router = fit_router(model, folder, own)
    assert router.tasks == ("short", "long")
    states = {task: prompt_states(model, folder, prompts) for task, prompts in own.items()}
    torch.testing.assert_close(router.means, torch.stack([state.mean(0) for state in states.values()]))
    asked = items(PROMPTS)
    found, means = prompt_states(model, folder, asked).double(), router.means.double()
    apart = torch.cat([state.double() - state.double().mean(0) for state in states.values()])
    within = apart.T @ apart / len(apart)
    shrunk = (within + within.diagonal().mean() * torch.eye(len(within), dtype=torch.float64)) / 2
    distances = [[float((one - mean) @ torch.linalg.solve(shrunk, one - mean)) for mean in means] for one in found]
    expected = [router.tasks[min((0, 1), key=lambda at: own[at])] for own in distances]
    assert router.route(model, folder, asked) == expected and set(expected) == {"short", "long"}


def test_one_prompt_of_each_task_is_enough(model, folder):
    own = {"short": items(["two"]), "long": items(["four plus four equals"])}
    router = fit_router(model, folder, own)
    assert router.axes.shape == (0, 32)
    assert router.route(model, folder, own["long"] + own["short"]) == ["long", "short"]


def test_answers_are_never_read(model, folder):
    own = lambda answer: [Item("1", "t", "generate", "two plus", (answer,), metric="exact")]
    one, two = (prompt_states(model, folder, own(answer)) for answer in ("one", "nine"))
    assert torch.equal(one, two)


def test_a_classifiers_labels_are_not_read_either():
    folder = next(shared(make_digits, steps={"base": 3, "expert": 2}, items=12))
    from merge3.tasks import read_items

    model = Slot(Pool.open(str(folder / "base"), [])).model
    plain, inverted = (read_items(folder / f"{task}.jsonl") for task in ("plain", "inverted"))
    states = prompt_states(model, folder / "base", plain)
    assert states.shape == (12, 64)
    router = fit_router(model, folder / "base", {"plain": plain[:6], "inverted": inverted[:6]})
    assert router.route(model, folder / "base", plain[6:] + inverted[6:]) == ["plain"] * 6 + ["inverted"] * 6


# -- the file


def test_what_is_saved_is_loaded_again(tmp_path):
    for system in (None, "", "you add"):
        save_router(Router(("math", "it aly é"), torch.randn(2, 5), torch.eye(5)[:3], torch.rand(3), system), tmp_path)
        found = load_router(tmp_path)
        assert found.tasks == ("math", "it aly é") and found.system == system and found.means.shape == (2, 5)
        for name, tensor in load_file(tmp_path / "router.safetensors").items():
            assert torch.equal(tensor, getattr(found, name))
    assert [file.name for file in tmp_path.iterdir()] == ["router.safetensors"]


def about(**changes):
    return {"router": json.dumps({"tasks": ["a", "b"], "system": None} | changes)}


MEANS, NO_AXES = torch.ones(2, 4), (torch.empty(0, 4), torch.empty(0))
DAMAGED = [
    (MEANS, None, "not a router that merge3 wrote"),
    (MEANS, {"router": "{"}, "not a router"),
    (MEANS, {"router": "[]"}, "not a router"),
    (MEANS, about(tasks=["a"]), "not a router"),
    (MEANS, about(tasks=3), "not a router"),
    (MEANS.half(), about(), "not a router"),
    (torch.ones(2), about(), "not a router"),
    (MEANS * float("nan"), about(), "means that are NaN or infinite"),
    (MEANS, about(tasks=["a", "a"]), "not a router"),
    (MEANS, about(system=3), "not a router"),
]


@pytest.mark.parametrize("means, metadata, line", DAMAGED)
def test_a_file_that_is_not_right_is_one_line(means, metadata, line, tmp_path):
    axes, gains = NO_AXES
    save_file({"means": means, "axes": axes, "gains": gains}, tmp_path / "router.safetensors", metadata)
    with pytest.raises(CheckpointError, match=rf"router\.safetensors: {line}") as found:
        load_router(tmp_path)
    assert "\n" not in str(found.value)


def test_a_file_that_is_cut_or_missing_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"no router\.safetensors"):
        load_router(tmp_path)
    save_router(Router(("a", "b"), MEANS, *NO_AXES), tmp_path)
    data = (tmp_path / "router.safetensors").read_bytes()
    for length in range(0, len(data), 13):
        (tmp_path / "router.safetensors").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"^[^\n]*router\.safetensors: [^\n]+$"):
            load_router(tmp_path)


def test_a_router_of_another_model(model, folder):
    with pytest.raises(BadInput, match=r"router: means of width 4; expected 32"):
        Router(("a", "b"), MEANS, *NO_AXES).route(model, folder, items(["two"]))


@pytest.mark.parametrize("name", ["means", "axes", "gains"])
def test_a_file_lacks_a_part(name, tmp_path):
    axes, gains = NO_AXES
    parts = {"means": MEANS, "axes": axes, "gains": gains}
    del parts[name]
    save_file(parts, tmp_path / "router.safetensors", about())
    with pytest.raises(CheckpointError, match=r"router\.safetensors: not a router"):
        load_router(tmp_path)


def test_states_that_are_no_numbers(folder):
    model = Slot(Pool.open(str(folder), [])).model
    model.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(ItemsError, match="states that are NaN or infinite"):
        prompt_states(model, folder, items(["two"]))


def test_no_prompts(model, folder):
    """Nothing to route is nothing routed; a mean of nothing is nobody's."""
    assert Router(("a", "b"), torch.ones(2, 32), torch.empty(0, 32), torch.empty(0)).route(model, folder, []) == []
    assert np.isfinite(prompt_states(model, folder, items(["two"])).numpy()).all()


def test_prompts_that_are_too_long(model, folder):
    positions = model.config.max_position_embeddings
    with pytest.raises(ItemsError, match=rf"item '1' .*a prompt of \d+ tokens, .*; expected at most {positions}"):
        prompt_states(model, folder, items(["two", "one " * (positions + 1)]))
    assert prompt_states(model, folder, items(["one " * (positions - 2)])).isfinite().all()
