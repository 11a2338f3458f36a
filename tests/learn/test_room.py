"""Room for activations: plans that are enough, layers that compute again to the same bits, and what is refused."""

import pytest
import torch

from merge3 import LocalEngine, Pool, Registration
from merge3.errors import BadInput, ResourceError
from merge3.learn.fit import Fit, experts_of, prepare
from merge3.learn.lessons import TaskToLearn
from merge3.learn.room import Room, plan_room, recomputed
from merge3.live.slot import Slot
from merge3.memory import available
from merge3.tasks.forward import without_cache
from tests.families import FAMILIES, make
from tests.learn.test_fitting import fitting_of, items_of, recipe_of


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "T5", "ViT", "Mamba"])
def test_layers_that_compute_again_give_the_same_bits(name, tmp_path):
    family = FAMILIES[name]
    if reason := make(family, tmp_path):
        pytest.skip(reason)
    model = Slot(Pool.open(str(tmp_path / "base"), []), torch.float32).model.requires_grad_(True)

    def gradients():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t.detach(), lambda t: t):
            said = model(**family.inputs(), **without_cache(model))
            first = next(v for v in said.values() if torch.is_tensor(v) and v.is_floating_point() and v.dim() > 1)
        first.float().sin().sum().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found, sum(kept)

    plain, much = gradients()
    with recomputed(model):
        again, little = gradients()
        with torch.no_grad():
            model(**family.inputs(), **without_cache(model))
    after, _ = gradients()
    assert little < 0.7 * much
    assert plain.keys() == again.keys() == after.keys()
    for key, gradient in plain.items():
        assert torch.equal(gradient, again[key]) and torch.equal(gradient, after[key]), key


def test_a_fit_under_any_plan_is_the_same_fit(tiny_world):
    plain, short = (fitting_of(recipe_of(tiny_world))[1] for _ in range(2))
    assert not plain.room.again and plain.room.batch_tokens > 48
    short.room = Room(8, True, 0, 0, 0)
    for one, other in zip(plain.steps(), short.steps()):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        torch.testing.assert_close(one.weights, other.weights, atol=2e-4, rtol=0)


def test_plans_from_much_to_little(tiny_world):
    _, fitting = fitting_of(recipe_of(tiny_world))
    asked = [one for lesson in fitting.lessons for one in lesson.asked]
    much = plan_room(fitting.weighted, asked, 4096, 2**33)
    assert not much.again and much.batch_tokens < 4096
    less = plan_room(fitting.weighted, asked, 4096, much.size - 1)
    assert less.again and less.batch_tokens == much.batch_tokens and less.size < much.size
    least = plan_room(fitting.weighted, asked, 4096, less.size - 1)
    assert least.again and least.batch_tokens < less.batch_tokens
    assert "computed again in backward" in least.describe()
    with pytest.raises(ResourceError, match="item '.' alone needs .* MiB beside the models, and 0.0 MiB are free"):
        plan_room(fitting.weighted, asked, 4096, 1000)


def test_one_item_may_take_more_than_a_pass_should(tiny_world):
    _, fitting = fitting_of(recipe_of(tiny_world))
    longest = max(one.rows * one.width for lesson in fitting.lessons for one in lesson.asked)
    asked = [one for lesson in fitting.lessons for one in lesson.asked]
    much = plan_room(fitting.weighted, asked, longest - 1, 2**33)
    assert much.batch_tokens == longest and not much.again
    less = plan_room(fitting.weighted, asked, longest - 1, much.size - 1)
    assert less.again and less.size < much.size


def test_room_is_given_back(tiny_world):
    recipe = recipe_of(tiny_world, steps=1)
    models = [str(model) for model in recipe.models()]
    engine = LocalEngine(Pool.open(models[0], models[1:], memory_budget=25_000_000))
    list(engine.fit(Registration(tuple(items_of("sums"))), Fit(recipe)))
    assert engine.pool.memory.budget < 25_000_000
    engine.forget_fit()
    assert engine.pool.memory.budget == 25_000_000


def test_what_was_planned_is_enough(tiny_world):
    """Bytes that autograd keeps of the largest pass, counted."""
    _, fitting = fitting_of(recipe_of(tiny_world, batch=6))
    kept, most = {}, 0
    own = {parameter.untyped_storage().data_ptr() for parameter in fitting.weighted.slot.model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor.detach()  # a tensor that keeps itself is never freed

    learn = fitting._learn

    def counting(number, questions):
        nonlocal most
        kept.clear()
        found = learn(number, questions)
        most = max(most, sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
        kept.clear()
        return found

    fitting._learn = counting
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        next(fitting.steps())
    assert 0.4 * fitting.room.activations < most <= fitting.room.activations


def test_a_budget_leaves_room(tiny_world):
    recipe = recipe_of(tiny_world)
    models = [str(model) for model in recipe.models()]
    tasks = [TaskToLearn("sums", items_of("sums"))]
    plain = Slot(Pool.open(models[0], models[1:]))
    expected = list(prepare(plain, Fit(recipe), tasks, models[0]).steps())
    whole = plain.pool.memory
    budget = whole.slot + whole.resident + 100_000
    pool = Pool.open(models[0], models[1:], memory_budget=budget)
    fitting = prepare(Slot(pool), Fit(recipe), tasks, models[0])
    assert fitting.room.size > 100_000
    assert pool.memory.budget == budget - fitting.room.size and pool.memory.file > 0  # weights made room
    for one, other in zip(fitting.steps(), expected):
        assert one.loss == other.loss and torch.equal(one.weights, other.weights)
    prepare(fitting.weighted.slot, Fit(recipe), tasks, models[0])
    assert pool.memory.budget == budget - fitting.room.size  # not twice
    pool = Pool.open(models[0], models[1:], memory_budget=whole.slot + 20_000_000)
    pool._limits = whole.slot + 2_000_000, 0
    with pytest.raises((BadInput, ResourceError)):
        prepare(Slot(pool), Fit(recipe), tasks, models[0])
    assert experts_of(recipe) and available(torch.device("cpu")) > 2**20
