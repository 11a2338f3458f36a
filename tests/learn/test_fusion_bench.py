"""Learned merges against fusion_bench's own code, where it is installed (make test installs it)."""

import pytest
import torch

from merge3 import Pool, Recipe
from merge3.largest import kept_from
from merge3.learn.fit import Fit, prepare
from merge3.learn.fitting import drawn
from merge3.learn.lessons import TaskToLearn
from merge3.learn.settings import SurgerySettings
from merge3.learn.surgery import Features, fit_adapters, started
from merge3.learn.survivors import survivors
from merge3.live.slot import Slot
from merge3.tasks import Item
from merge3.world.tokenizer import make_tokenizer
from tests.classifiers import make_classifier
from tests.fusing import fusion_bench, missing

pytestmark = [pytest.mark.parity, missing]


@pytest.fixture
def classifiers(tmp_path):
    tokenizer = make_tokenizer()
    model = make_classifier(4, vocabulary=len(tokenizer))
    rng = torch.Generator().manual_seed(0)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for number, name in enumerate(("base", "e0", "e1", "e2")):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=rng) * 0.2 if number else 0.0
                parameter.copy_(start[key] + noise)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return [str(tmp_path / name) for name in ("base", "e0", "e1", "e2")]


def test_twenty_steps_of_layer_wise_adamerging(classifiers, tmp_path):
    data = {"merge_method": "adamerging", "base_model": classifiers[0]}
    data["models"] = [{"model": expert} for expert in classifiers[1:]]
    data["fit"] = {"items": ["i"], "steps": 20, "batch": 4, "learning_rate": 0.01}
    recipe = Recipe.parse(data)
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    tasks = []
    for task in range(3):
        prompts = [f"{words[i % 7]} plus {words[(i + task + 1) % 7]} equals" for i in range(7)]
        tasks.append(TaskToLearn(str(task), [Item(str(i), str(task), "classify", p, 0) for i, p in enumerate(prompts)]))
    slot = Slot(Pool.open(classifiers[0], classifiers[1:]))
    fitting = prepare(slot, Fit(recipe), tasks, classifiers[0])
    batches = []
    for number in range(1, 21):
        step = []
        for index, lesson in enumerate(fitting.lessons):
            chosen = drawn(len(lesson.asked), 4, number, [0, index])
            step.append(torch.tensor([lesson.asked[at].head.tokens for at in chosen]))
        batches.append(step)
    steps = list(fitting.steps())
    theirs = fusion_bench(tmp_path, dict(what="adamerging", models=classifiers, learning_rate=0.01, batches=batches))
    assert [3 * step.loss for step in steps] == pytest.approx(theirs["losses"], rel=1e-5)
    names = [job.name for job in fitting.weighted.jobs]
    assert sorted(names) == sorted(theirs["names"])
    expected = theirs["weights"][:, [theirs["names"].index(name) for name in names]].clamp(0, 1)
    torch.testing.assert_close(steps[-1].weights, expected, atol=1e-4, rtol=0)
    assert (expected - 0.3).abs().max() > 0.1


def test_survivors_are_those_of_ties_merging_split(tmp_path):
    rng, cases = torch.Generator().manual_seed(3), []
    for share in (0.05, 0.2, 0.5, 0.9):
        vectors = torch.randn(4, 500, generator=rng)
        cases += [(vectors, share), ((vectors * 2).round() / 2, share)]  # magnitudes that tie, and sums that cancel
    theirs = fusion_bench(tmp_path, dict(what="ties", cases=cases))
    for (vectors, share), expected in zip(cases, theirs):
        thresholds = list(kept_from(lambda all=vectors: enumerate(all.abs()), share).values())
        trimmed = torch.where(vectors.abs() >= torch.tensor(thresholds)[:, None], vectors, 0.0)
        majority = float(trimmed.sum(0).sign().sum().sign())
        assert torch.equal(torch.stack(survivors(list(vectors), thresholds, majority)), expected), share


def test_surgery_is_that_of_its_wrapper(tmp_path):
    """Whole fits from one start with the same inputs in each step, and the features they come to."""
    rng, settings = torch.Generator().manual_seed(0), SurgerySettings(rank=3, steps=60, learning_rate=0.01, batch=8)
    merged = {task: torch.randn(20, 12, generator=rng) for task in ("a", "b")}
    expert = {task: states + 0.3 * torch.randn(20, 12, generator=rng) for task, states in merged.items()}
    tasks = {task: Features.of(merged[task][:, None], expert[task][:, None]) for task in merged}
    *_, last = fit_adapters(tasks, settings)
    batches = []
    for number in range(1, settings.steps + 1):
        batches.append({task: drawn(20, 8, number, [0, index]) for index, task in enumerate(tasks)})
    down = {task: started(12, 3, [0, index]).down for index, task in enumerate(tasks)}
    given = {"down": down, "merged": merged, "expert": expert, "batches": batches, "learning_rate": 0.01}
    theirs = fusion_bench(tmp_path, dict(what="surgery", **given))
    for task, adapter in last.adapters.items():
        assert adapter.up.abs().max() > 0.05
        torch.testing.assert_close(tuple(adapter), theirs["weights"][task], atol=1e-5, rtol=0)
        torch.testing.assert_close(adapter.changed(merged[task]), theirs["features"][task], atol=1e-5, rtol=0)
