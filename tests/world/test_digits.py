"""Digits under eight transforms: what is made, and that its merges are in the regime that learned merges need."""

import numpy as np
import pytest
import torch

from merge3 import Pool
from merge3.checkpoint import open_checkpoint
from merge3.checkpoint.layout import Ref
from merge3.engine import LocalEngine
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.tasks import read_items
from merge3.world.digits import ITEMS, LABELS, LEARNED, TASKS, make_digits, pixels, split
from merge3.world.kept import made
from tests.worlds import WORLDS, shared

FEW = {"base": 3, "expert": 2}
HEAD = ("classifier.weight", "classifier.bias")


@pytest.fixture(scope="module")
def unlearned():
    """Everything there, and hardly trained."""
    yield from shared(make_digits, steps=FEW, items=12)


def opened(world):
    """(pool, heads of the tasks, all items)"""
    pool = Pool.open(str(world / "base"), [str(world / task) for task in TASKS])
    items = [item for task in TASKS for item in read_items(world / f"{task}.jsonl")]
    return pool, {task: str(world / task) for task in TASKS}, tuple(items)


def test_every_task_shows_the_same_ink_in_its_own_way():
    ink = np.random.default_rng(0).uniform(size=(5, 8, 8)).astype(np.float32)
    shown = {task: pixels(task, ink) for task in TASKS}
    for task, values in shown.items():
        assert values.dtype == np.float32 and values.shape == (5, 1, 8, 8), task
        assert values.min() >= -1 and values.max() <= 1, task
        assert (values[0] != pixels(task, ink[1:])[0]).any(), task
    assert len({values.tobytes() for values in shown.values()}) == len(TASKS) == 8
    np.testing.assert_allclose(shown["inverted"], -shown["plain"], atol=1e-6)
    assert (shown["rotated"][:, 0, 0] == shown["plain"][:, 0, :, -1]).all()  # what was right is above
    for task in ("rotated", "mirrored", "halved", "shuffled"):  # pixels elsewhere, and no others
        assert (np.sort(shown[task].reshape(5, -1)) == np.sort(shown["plain"].reshape(5, -1))).all(), task


def test_every_endpoint_keeps_a_head_and_labels_of_its_own(unlearned):
    pool, heads, _ = opened(unlearned)
    assert pool.warnings == [] and set(pool.fixed) == set(HEAD)
    assert {model: tuple(sorted(names)) for model, names in pool.heads.items()} == {
        model: tuple(sorted(HEAD)) for model in (pool.base, *heads.values())}  # fmt: skip
    labels = [tuple(checkpoint.config["label2id"]) for checkpoint in pool.endpoints.values()]
    assert len(set(labels)) == 9 and labels[2] == tuple(f"rotated-{digit}" for digit in range(LABELS))
    weights = {checkpoint.tensor_hash(HEAD[0]) for checkpoint in pool.endpoints.values()}
    assert len(weights) == 9
    for name in pool.base_checkpoint.tensors:
        if name not in HEAD and not name.endswith("k_proj.bias"):  # softmax is blind to those, up to rounding
            hashes = {checkpoint.tensor_hash(name) for checkpoint in pool.endpoints.values()}
            assert len(hashes) == 9, name


def test_heads_are_never_trained(unlearned, tmp_path):
    longer = made(tmp_path, make_digits, steps={"base": 1, "expert": 0}, items=12)
    for task in ("base", *TASKS):
        one, two = (open_checkpoint(world / task) for world in (unlearned, longer))
        assert all(one.tensor_hash(name) == two.tensor_hash(name) for name in HEAD), task
        assert one.tensor_hash("vit.layernorm.weight") != two.tensor_hash("vit.layernorm.weight"), task


def test_items_are_answered_as_transformers_itself_does(unlearned):
    from transformers import ViTForImageClassification

    pool, heads, items = opened(unlearned)
    assert len(items) == 12 * 8 and len({item.id for item in items}) == 12
    engine = LocalEngine(pool)
    for task in ("rotated", "inverted"):
        (evaluation,) = engine.evaluate(Registration(items, heads=heads), [heads[task]])
        answers = dict(zip([(item.task, item.id) for item in items], evaluation.answers()))
        model = ViTForImageClassification.from_pretrained(heads[task]).eval()
        own = [item for item in items if item.task == task]
        images = torch.from_numpy(np.stack([np.load(item.image) for item in own]))
        assert images.dtype == torch.float32 and images.shape == (12, 1, 8, 8)
        with torch.no_grad():
            found = model(pixel_values=images).logits.argmax(-1).tolist()
        for item, label in zip(own, found):
            assert answers[task, item.id] == (model.config.id2label[label] == item.answer), item


def test_a_merge_keeps_every_task_to_its_own_head(unlearned):
    pool, heads, items = opened(unlearned)
    engine = LocalEngine(pool)
    sources = [{"model": model, "parameters": {"weight": 1.0}} for model in heads.values()]
    average = Recipe.parse({"merge_method": "linear", "models": sources})
    (evaluation,) = engine.evaluate(Registration(items, heads=heads), [average])
    assert evaluation.answers().shape == (96,)
    for task, model in heads.items():
        engine.slot.use_head(model)
        assert torch.equal(engine.slot.model.classifier.weight, pool.get(Ref(model, HEAD[0]))), task


def test_no_model_is_shown_an_image_of_the_items(tmp_path, monkeypatch):
    from transformers import ViTModel

    seen, forward = set(), ViTModel.forward

    def watched(self, pixel_values, **given):
        seen.update(image.numpy().tobytes() for image in pixel_values)
        return forward(self, pixel_values=pixel_values, **given)

    monkeypatch.setattr(ViTModel, "forward", watched)
    make_digits(tmp_path, steps=FEW, items=400)
    items = [item for task in TASKS for item in read_items(tmp_path / f"{task}.jsonl")]
    asked = {np.load(item.image).tobytes() for item in items}
    assert len(asked) == 400 * 8 and len(seen) > 200 and not seen & asked
    train, held = split(1797, LEARNED, 400, 0)
    assert len({*train, *held}) == LEARNED + 400 and {int(item.id) for item in items} == set(held.tolist())


def test_the_same_seed_gives_the_same_bytes(unlearned, tmp_path):
    again = made(tmp_path, make_digits, steps=FEW, items=12)
    files = sorted(p.relative_to(unlearned) for p in unlearned.rglob("*") if p.is_file())
    assert len(files) == 9 * 2 + 8 * 13
    assert all((unlearned / file).read_bytes() == (again / file).read_bytes() for file in files)
    other = made(tmp_path, make_digits, seed=1, steps=FEW, items=12)
    for task in TASKS:
        one, two = (open_checkpoint(world / task) for world in (unlearned, other))
        assert all(one.tensor_hash(name) != two.tensor_hash(name) for name in (HEAD[0], "vit.embeddings.cls_token"))
    assert {item.id for item in opened(other)[2]} != {item.id for item in opened(unlearned)[2]}


@pytest.mark.heavy
def test_the_average_beats_the_base_and_experts_beat_the_average():
    """What a test of learned merges assumes, with the full recipe."""
    pool, heads, items = opened(made(WORLDS, make_digits))
    assert len(items) == 8 * ITEMS
    engine, asked = LocalEngine(pool), Registration(items, heads=heads)
    sources = [{"model": model, "parameters": {"weight": 1.0}} for model in heads.values()]
    average = Recipe.parse({"merge_method": "linear", "models": sources})
    base, merged = (evaluation.value for evaluation in engine.evaluate(asked, [pool.base, average]))
    own = []
    for task, model in heads.items():
        alone = tuple(item for item in items if item.task == task)
        (evaluation,) = engine.evaluate(Registration(alone, heads=heads), [model])
        own.append(evaluation.value)
    assert merged > base + 0.05, (base, merged)
    assert np.mean(own) > merged + 0.1 and min(own) > 0.75, (own, merged)
