"""Heads on a live classifier: each endpoint's own values, at addresses that stay."""

import pytest
import torch

from merge3 import Pool, Recipe, Slot
from tests.classifiers import make_classifier

IDS = torch.tensor([[3, 4, 5]])


@pytest.fixture
def world(tmp_path):
    """(folder of classifiers m0 to m2 with 3, 3 and 5 labels, their slot)"""

    for i, labels in enumerate((3, 3, 5)):
        make_classifier(labels, seed=i).save_pretrained(tmp_path / f"m{i}")
    return tmp_path, Slot(Pool.open(str(tmp_path / "m0"), [str(tmp_path / "m1"), str(tmp_path / "m2")]))


def answers(path):
    from transformers import LlamaForSequenceClassification

    return LlamaForSequenceClassification.from_pretrained(path)(input_ids=IDS).logits


def test_a_head_of_equal_shape_goes_where_the_one_before_was(world):
    root, slot = world
    addresses = {name: p.data_ptr() for name, p in slot.model.named_parameters()}
    for model in ("m1", "m0", "m1"):
        slot.load(str(root / model))
        assert torch.equal(slot.model(input_ids=IDS).logits, answers(root / model)), model
        assert {name: p.data_ptr() for name, p in slot.model.named_parameters()} == addresses


def test_another_shape_is_another_parameter_and_comes_back(world):
    root, slot = world
    seen = {}
    for model in ("m0", "m2", "m1", "m2", "m0"):
        slot.load(str(root / model))
        assert torch.equal(slot.model(input_ids=IDS).logits, answers(root / model)), model
        seen.setdefault(slot.model.score.weight.shape, set()).add(slot.model.score.weight.data_ptr())
    assert {shape: len(places) for shape, places in seen.items()} == {(3, 16): 1, (5, 16): 1}


def test_a_merge_leaves_the_head_that_is_shown(world):
    root, slot = world
    models = [{"model": str(root / "m1"), "parameters": {"weight": 0.5}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(root / "m0"), "models": models}
    slot.use_head(str(root / "m2"))
    head = slot.model.score.weight.clone()
    slot.swap(Recipe.parse(recipe))
    assert torch.equal(slot.model.score.weight, head)
