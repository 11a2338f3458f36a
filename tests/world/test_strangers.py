"""Two models that share no ancestor: each knows its own five digits, and nothing of where the other's units are."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from merge3.tasks import Scorer, read_items
from merge3.world.strangers import ITEMS, MODELS, TASKS, make_strangers
from tests.worlds import shared


@pytest.fixture(scope="module", params=["resnet"])
def world(request):
    yield from shared(make_strangers, family=request.param, seed=0)


def test_each_knows_its_own_half_alone(world):
    for task in TASKS:
        model = AutoModelForImageClassification.from_pretrained(world / task).eval()
        for other in TASKS:
            score = Scorer(read_items(world / f"{other}.jsonl"), model, world / task).score(model).mean()
            assert (score > 0.85) == (other == task) and (score < 0.25) == (other != task), (task, other, score)


def test_one_head_and_two_initialisations(world):
    low, high = (AutoModelForImageClassification.from_pretrained(world / task).state_dict() for task in TASKS)
    assert torch.equal(low["classifier.1.weight"], high["classifier.1.weight"])
    for name, tensor in low.items():
        if tensor.dim() == 4:
            both = torch.stack([tensor.flatten(), high[name].flatten()])
            assert abs(float(torch.corrcoef(both)[0, 1])) < 0.1, name


def test_items_are_of_one_half_and_no_image_is_there_twice(world):
    items = {task: read_items(world / f"{task}.jsonl") for task in TASKS}
    assert sum(len(own) for own in items.values()) == ITEMS
    assert len({item.id for own in items.values() for item in own}) == ITEMS
    for task, own in items.items():
        assert {item.answer for item in own} == {f"digit-{digit}" for digit in TASKS[task]}


def test_every_family_is_made(tmp_path):
    for family in MODELS:
        make_strangers(tmp_path / family, family, steps=2, items=20)
        assert {path.name for path in (tmp_path / family).iterdir()} == {*TASKS, "images", "low.jsonl", "high.jsonl"}
