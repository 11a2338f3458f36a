"""Learned weights against plain torch: gradients, whole fits, what they end in, and going on after a stop."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge3 import Pool, Recipe, merge_to_disk
from merge3.errors import BadInput, ItemsError, RecipeError
from merge3.learn.coefficients import BOUNDS, LEVELS, Coefficients
from merge3.learn.distributions import log_probabilities, of_labels
from merge3.learn.fit import Fit, experts_of, fitted, merged_with, prepare
from merge3.learn.fitting import FitError, State, drawn
from merge3.learn.lessons import TaskToLearn
from merge3.learn.room import Room
from merge3.learn.weighted import Weighted
from merge3.live.slot import Slot
from merge3.methods.learned import LEARNED
from merge3.tasks import Item
from merge3.tasks.requests import Text
from tests.classifiers import make_classifier
from tests.families import FAMILIES, make, walked

WORDS = ["one", "two", "three", "four", "five", "six"]


def items_of(task, kind="generate", count=6):
    found = []
    for i in range(count):
        a, b = WORDS[i % 6], WORDS[(i + 2) % 6]
        if kind == "generate":
            found.append(Item(str(i), task, kind, f"{a} plus {b} equals", (b,), metric="exact", max_tokens=2))
        else:
            found.append(Item(str(i), task, kind, f"{a} plus {b} equals", i % 3, tuple(WORDS[:3]), "acc"))
    return found


def recipe_of(world, method="supermerge", **settings):
    data = {"merge_method": method, "base_model": str(world / "base"), "dtype": "float32"}
    data["models"] = [{"model": str(world / name)} for name in ("english", "italian", "sorting")]
    data["fit"] = {"steps": 4, "batch": 3, "items": ["items.jsonl"]} | settings
    return Recipe.parse(data)


def opened(recipe, dtype=None):
    models = [str(model) for model in recipe.models()]
    pool = Pool.open(models[0], models[1:])
    return Slot(pool, dtype)


def fitting_of(recipe, kinds=("generate", "choice")):
    slot = opened(recipe)
    experts = experts_of(recipe)
    tasks = []
    for at, kind in enumerate(kinds):
        tasks.append(TaskToLearn(f"task {at}", items_of(f"task {at}", kind), expert=experts[at]))
    fit = Fit(recipe, {task.name: task.expert for task in tasks})
    return fit, prepare(slot, fit, tasks, slot.pool.base)


class Eager:
    """The same fit in plain torch: weights times task vectors summed by autograd, whole model at a time."""

    def __init__(self, fit, fitting):
        self.settings, self.loss, self.lessons = fitting.settings, fitting.loss, fitting.lessons
        slot, self.jobs = fitting.weighted.slot, fitting.weighted.jobs
        self.model, get = slot.model, slot.pool.get
        self.base = {job.name: get(job.base) for job in self.jobs}
        self.vectors = {job.name: torch.stack([get(s) - get(job.base) for s in job.sources]) for job in self.jobs}
        places = LEVELS[self.settings.level]([job.name for job in self.jobs], slot.pool.layouts[slot.pool.base])
        groups = list(dict.fromkeys(places))
        self.place = [groups.index(place) for place in places]
        start = BOUNDS[self.settings.bound].raw(self.settings.start)
        self.raw = torch.full((len(self.jobs[0].sources), len(groups)), start, requires_grad=True)

    def weights(self):
        raw = {"tanh": torch.tanh, "clamp": lambda x: x.clamp(0, 1), "none": lambda x: x}[self.settings.bound](self.raw)
        return raw[:, self.place]

    def run(self, steps):
        optimizer = torch.optim.Adam([self.raw], lr=self.settings.learning_rate)
        losses = []
        for number in range(1, steps + 1):
            optimizer.zero_grad()
            loss = self.total(number)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def total(self, number):
        weights = self.weights()
        merged = {}
        for at, job in enumerate(self.jobs):
            merged[job.name] = self.base[job.name] + torch.tensordot(weights[:, at], self.vectors[job.name], 1)
        per_task = []
        for index, lesson in enumerate(self.lessons):
            chosen = drawn(len(lesson.asked), self.settings.batch, number, [self.settings.seed, index])
            per_task.append(torch.stack([self.cost(merged, lesson, at) for at in chosen]).mean())
        return torch.stack(per_task).mean()

    def cost(self, merged, lesson, at):
        asked, sums, of_answer = lesson.asked[at], [], None
        for answer in asked.answers:
            ids = torch.tensor([[*asked.prompt, *answer]])
            logits = torch.func.functional_call(self.model, merged, (ids,)).logits[0].float()
            count = max(1, len(answer))
            first = len(asked.prompt) - 1
            of_answer = logits[first : first + count].log_softmax(-1)
            if answer:
                sums.append(of_answer[torch.arange(count), torch.tensor(answer)].sum())
        log_p = torch.stack(sums).log_softmax(-1)[None] if asked.choose else of_answer
        p = log_p.exp()
        if self.settings_loss == "entropy":
            return -(p * log_p).sum(-1).mean()
        if self.settings_loss == "expert_kl":
            target = lesson.targets[at]
            return (target.exp() * (target - log_p)).sum(-1).mean()
        return -log_p[torch.arange(len(log_p)), lesson.targets[at]].mean()


@pytest.mark.parametrize(
    "method, level, bound",
    [
        ("supermerge", "tensor", "tanh"),
        ("supermerge", "layer", "none"),
        ("supermerge", "task", "clamp"),
        ("adamerging", "tensor", "clamp"),
        ("expert_kl", "tensor", "none"),
        ("expert_kl", "layer", "tanh"),
    ],
)
def test_a_fit_is_plain_torchs(tiny_world, method, level, bound):
    fit, fitting = fitting_of(recipe_of(tiny_world, method, level=level, bound=bound, learning_rate=0.02))
    steps = list(fitting.steps())
    eager = Eager(fit, fitting)
    eager.settings_loss = LEARNED[method].loss
    losses = eager.run(len(steps))
    assert [step.loss for step in steps] == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(steps[-1].weights, eager.weights().detach(), atol=1e-4, rtol=1e-4)
    assert (steps[-1].weights - 0.3).abs().max() > 0.02  # it moved


def test_gradients_that_become_numbers_at_once_are_the_same(tiny_world, monkeypatch):
    recipe = recipe_of(tiny_world)
    summed = fitting_of(recipe)[1]
    monkeypatch.setattr("merge3.learn.weighted.SMALL", 0)
    at_once = fitting_of(recipe)[1]
    at_once.room = Room(20, False, 0, 0, 0)  # several passes a step
    for one, other in zip(summed.steps(), at_once.steps()):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        torch.testing.assert_close(one.weights, other.weights, atol=1e-4, rtol=0)


def test_losses_are_those_of_the_tasks(tiny_world):
    _, fitting = fitting_of(recipe_of(tiny_world))
    for step in fitting.steps():
        assert step.loss == pytest.approx(sum(step.losses.values()) / 2)
        assert list(step.losses) == ["task 0", "task 1"]


def test_a_fit_goes_on_bit_for_bit(tiny_world):
    recipe = recipe_of(tiny_world, steps=6)
    whole = list(fitting_of(recipe)[1].steps())
    first = list(itertools.islice(fitting_of(recipe)[1].steps(), 3))
    kept = first[-1].state
    rest = list(fitting_of(recipe)[1].steps(State(kept.step, kept.raw.clone(), kept.moments)))
    assert [step.number for step in first + rest] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(whole, first + rest):
        assert one.loss == other.loss
        assert torch.equal(one.weights, other.weights)
        assert torch.equal(one.state.raw, other.state.raw)


def test_a_state_of_another_fit_is_refused(tiny_world):
    _, fitting = fitting_of(recipe_of(tiny_world))
    wrong = State(1, torch.zeros(2, 2), (torch.zeros(2, 2), torch.zeros(2, 2)))
    with pytest.raises(BadInput, match=r"coefficients \[2, 2\]; expected \[3, 39\]"):
        next(fitting.steps(wrong))


@pytest.mark.parametrize("level", list(LEVELS))
def test_what_is_fitted_is_what_its_recipe_merges(tiny_world, tmp_path, level):
    fit, fitting = fitting_of(recipe_of(tiny_world, level=level))
    *_, last = fitting.steps()
    recipe = Recipe.parse(Recipe.parse(fitted(fit, fitting, last.weights).to_dict()).to_dict())
    assert recipe.method == "task_arithmetic" and not recipe.fit
    slot = fitting.weighted.slot
    fitting.weighted.write(last.weights)
    written = {name: tensor.clone() for name, tensor in slot.written().items()}
    slot.load(slot.pool.base)
    slot.swap(recipe)
    for name, tensor in slot.written().items():
        assert torch.equal(tensor, written[name]), name
    merge_to_disk(recipe, tmp_path / "model")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(tensor, written[name]), name


def test_filters_that_are_parts_of_other_names_come_after_them():
    data = {"merge_method": "supermerge", "base_model": "b", "models": [{"model": "e"}], "fit": {"items": ["i"]}}
    made = merged_with(Recipe.parse(data), {"e": [("norm", 0.25), ("layers.0.norm", 0.5), ("layers.10.norm", 0.75)]})
    entries = made.slices[0].sources[0].parameters["weight"]
    assert [entry["filter"] for entry in entries] == ["layers.10.norm", "layers.0.norm", "norm", "*"]


# -- gradients over every family


@pytest.mark.parametrize(
    "name, small",
    [*(pytest.param(*one.values, True, marks=one.marks) for one in walked()), ("Mixtral", False), ("T5", False)],
)
def test_gradients_are_those_of_the_merge_whatever_the_architecture(name, small, tmp_path, monkeypatch):
    """Against autograd's own; where parameters are not the checkpoint's tensors (fused experts), along a random
    direction of the weights against the loss of the models a little to both sides."""
    monkeypatch.setattr("merge3.learn.weighted.SMALL", 2**28 if small else 0)
    family = FAMILIES[name]
    if reason := make(family, tmp_path):
        pytest.skip(reason)
    pool = Pool.open(str(tmp_path / "base"), [str(tmp_path / f"e{i}") for i in range(2)])
    slot = Slot(pool, torch.float32)
    data = {"merge_method": "supermerge", "base_model": pool.base, "fit": {"items": ["i"]}}
    data["models"] = [{"model": str(tmp_path / f"e{i}")} for i in range(2)]
    program = slot.compile(merged_with(Recipe.parse(data), dict.fromkeys(list(pool.endpoints)[1:], 0.3)))
    weighted = Weighted(slot, program)
    rng = torch.Generator().manual_seed(0)
    weights = torch.rand(2, len(program.jobs), generator=rng) * 0.5

    def loss(merged=None):
        said = torch.func.functional_call(slot.model, merged or {}, (), family.inputs())
        first = next(v for v in said.values() if torch.is_tensor(v) and v.is_floating_point() and v.dim() > 1)
        return (first.float() * torch.linspace(0.5, 1.5, first.numel()).reshape(first.shape)).mean() * 10

    weighted.write(weights)
    with weighted.gradients(), torch.enable_grad():
        loss().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in slot.model.parameters())
    found = weighted.gradient.clone()
    assert set(weighted.constant) <= {name for name, _ in slot.model.named_buffers()}
    parameters = dict(slot.model.named_parameters())
    learned = [job for job in program.jobs if job.name not in weighted.constant]
    if all(job.name in parameters for job in learned):
        torch.testing.assert_close(found, _autograds(pool, program, weights, parameters, loss), atol=1e-5, rtol=1e-4)
        return
    # Along itself a gradient has its whole length: one that lacks a part, or all of it, is too short.
    steepest, anywhere = found / found.norm(), torch.randn(weights.shape, generator=rng)
    for direction, tolerance in ((steepest, 0.0), (anywhere, 3e-3)):
        values, step = [], 0.02 / float(direction.norm())
        with torch.no_grad():
            for sign in (1, -1):
                weighted.write((weights + sign * step * direction).float())
                values.append(float(loss()))
        expected = (values[0] - values[1]) / (2 * step)
        assert float((found * direction).sum()) == pytest.approx(expected, rel=0.03, abs=tolerance)


def _autograds(pool, program, weights, parameters, loss):
    weights, merged = weights.clone().requires_grad_(), {}
    for at, job in enumerate(program.jobs):
        if job.name in parameters:
            base = pool.get(job.base)
            vectors = torch.stack([pool.get(source) - base for source in job.sources])
            merged[job.name] = base + torch.tensordot(weights[:, at], vectors, 1)
    loss(merged).backward()
    return weights.grad.double()


def test_an_output_that_is_tied_and_held_apart_has_its_sources_gradient(tied_family, family, tmp_path):
    """In a pool that also holds an untied model the live model has a head of its own, whatever a recipe ties."""

    def gradient(others):
        pool = Pool.open(str(tied_family / "base"), [str(tied_family / name) for name in ("e0", "e1")] + others)
        slot = Slot(pool, torch.float32)
        data = {"merge_method": "supermerge", "base_model": pool.base, "fit": {"items": ["i"]}}
        data["models"] = [{"model": str(tied_family / name)} for name in ("e0", "e1")]
        recipe = merged_with(Recipe.parse(data), {str(tied_family / name): 0.3 for name in ("e0", "e1")})
        weighted = Weighted(slot, slot.compile(recipe))
        weighted.write(torch.full(weighted.gradient.shape, 0.3))
        with weighted.gradients():
            slot.model(torch.arange(3, 40)[None]).logits.float().sin().sum().backward()
        return {job.name: weighted.gradient[:, at].clone() for at, job in enumerate(weighted.jobs)}

    alone, beside = gradient([]), gradient([str(family / "e0")])
    assert alone.keys() == beside.keys()
    for name, expected in alone.items():
        torch.testing.assert_close(beside[name], expected, rtol=1e-4, atol=1e-4)


def test_texts_of_several_lengths_are_padded_as_the_model_is_told(tmp_path):
    """A causal classifier finds the end of a text by its padding."""
    model = make_classifier(4).eval()
    model.config.pad_token_id = 3
    item = Item("1", "t", "classify", "x", 0)
    asked = [of_labels(item, Text(tokens)) for tokens in ((5, 6, 7, 8), (5, 9), (4,))]
    with torch.no_grad():
        together = log_probabilities(model, asked)
        for one, found in zip(asked, together):
            torch.testing.assert_close(found, log_probabilities(model, [one])[0], atol=1e-6, rtol=1e-5)


# -- which items a step asks


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 5))
def test_every_item_is_asked_once_before_any_comes_again(count, size, seed):
    asked = []
    for number in range(1, 12):
        own = drawn(count, size, number, [seed])
        assert len(own) == min(size, count)
        asked += own
    for start in range(0, len(asked) - count + 1, count):
        assert sorted(asked[start : start + count]) == list(range(count))


def test_draws_differ_by_seed_and_are_kept():
    assert drawn(50, 10, 3, [1, 0]) == drawn(50, 10, 3, [1, 0])
    assert drawn(50, 10, 3, [1, 0]) != drawn(50, 10, 3, [2, 0])
    assert drawn(50, 10, 3, [1, 0]) != drawn(50, 10, 3, [1, 1])


# -- weights that are learned


def test_weights_follow_from_raw_numbers():
    class Names:
        pre, post = ("embed",), ("head",)

        @staticmethod
        def layer_of(name):
            return int(name.split(".")[1]) if name.startswith("layer.") else None

    names = ["embed", "layer.0.a", "layer.0.b", "layer.1.a", "head"]
    made = Coefficients(2, names, Names, "layer", "tanh", 0.3)
    assert made.groups == ("before", "layer 0", "layer 1", "after")
    torch.testing.assert_close(made.weights().detach(), torch.full((2, 5), 0.3))
    with torch.no_grad():
        made.raw[0] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert torch.equal(made.weights()[0, 1], made.weights()[0, 2])
    made.weights().backward(torch.ones(2, 5, dtype=torch.float32))
    np.testing.assert_allclose(made.raw.grad[0], [1, 2, 1, 1] * (1 - np.tanh([0.1, 0.2, 0.3, 0.4]) ** 2), rtol=1e-5)


# -- bad input


def test_items_without_a_label_to_learn(tiny_world):
    recipe = recipe_of(tiny_world)
    slot = opened(recipe)
    item = Item("7", "sums", "generate", "one plus two equals", ("t.o",), metric="regex", max_tokens=2)
    with pytest.raises(ItemsError, match="item '7' of task 'sums': its answer is a pattern"):
        prepare(slot, Fit(recipe), [TaskToLearn("sums", [item])], slot.pool.base)


def test_entropy_needs_no_label(tiny_world):
    recipe = recipe_of(tiny_world, "adamerging", steps=1)
    slot = opened(recipe)
    item = Item("7", "sums", "generate", "one plus two equals", ("t.o",), metric="regex", max_tokens=2)
    (step,) = prepare(slot, Fit(recipe), [TaskToLearn("sums", [item])], slot.pool.base).steps()
    assert step.loss > 0


def test_expert_kl_needs_an_expert(tiny_world):
    recipe = recipe_of(tiny_world, "expert_kl")
    slot = opened(recipe)
    with pytest.raises(RecipeError, match="no model for task 'sums'"):
        prepare(slot, Fit(recipe), [TaskToLearn("sums", items_of("sums"))], slot.pool.base)


def test_an_experts_own_divergence_is_nothing(tiny_world):
    """A merge that is the expert says what the expert says."""
    recipe = replace(recipe_of(tiny_world, "expert_kl", start=1.0, steps=1))
    alone = replace(recipe.slices[0], sources=recipe.slices[0].sources[:1])
    recipe = replace(recipe, slices=(alone,))
    slot = opened(recipe)
    (expert,) = experts_of(recipe)
    task = TaskToLearn("sums", items_of("sums") + items_of("sums", "choice"), expert=expert)
    (step,) = prepare(slot, Fit(recipe, {"sums": expert}), [task], slot.pool.base).steps()
    assert abs(step.loss) < 1e-6


def test_a_loss_that_is_no_number_names_step_and_item(tiny_world):
    _, fitting = fitting_of(recipe_of(tiny_world))
    raw = torch.full_like(fitting.coefficients.raw.detach(), torch.nan)
    nothing = State(0, raw, (torch.zeros_like(raw), torch.zeros_like(raw)))
    with pytest.raises(FitError, match=r"fit: step 1, item '\d' of task 'task \d': a loss of nan; expected a finite"):
        next(fitting.steps(nothing))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 0}, "recipe: fit.steps: found 0: Input should be greater than or equal to 1"),
        ({"learning_rate": 0}, "recipe: fit.learning_rate: found 0: Input should be greater than 0"),
        ({"stpes": 3}, r"recipe: fit.stpes: unknown key; expected .*did you mean 'steps'"),
        ({"start": 1.0}, "fit: start: found 1; expected strictly between -1 and 1, bound 'tanh'"),
        ({"bound": "relu"}, "recipe: fit.bound: found 'relu': Input should be 'tanh', 'clamp' or 'none'"),
        ({"groups": {"size": 1}}, "recipe: fit.groups.size: found 1: Input should be greater than or equal to 2"),
        ({"items": 3}, "recipe: fit.items"),
    ],
)
def test_settings_that_are_refused(tiny_world, settings, message):
    from merge3.learn.fit import check_learned

    with pytest.raises(RecipeError, match=message):
        check_learned(recipe_of(tiny_world, **settings), "recipe")


def test_recipes_that_are_refused(tiny_world):
    from merge3.learn.fit import check_learned

    recipe = recipe_of(tiny_world)
    with pytest.raises(RecipeError, match="base_model: missing; supermerge weighs changes from a base"):
        check_learned(replace(recipe, base_model=None), "recipe")
    with pytest.raises(RecipeError, match="parameters.lambda: given, and supermerge learns all weights"):
        check_learned(replace(recipe, parameters={"lambda": 0.5}), "recipe")
    with pytest.raises(RecipeError, match="'ties' learns nothing, and there is `fit:`; expected supermerge or"):
        check_learned(replace(recipe, method="ties"), "recipe")
    with pytest.raises(RecipeError, match="'supermerge', which learns its weights from items"):
        opened(recipe).swap(recipe)
    with pytest.raises(RecipeError, match="`fit:` in a recipe of task_arithmetic, to be fitted first"):
        opened(recipe).swap(replace(recipe, method="task_arithmetic"))
