"""How a tiny world is trained: until a loss, or for as many steps as are said."""

import random

import torch

from merge3.world.numbers import TASKS
from merge3.world.tokenizer import make_tokenizer
from merge3.world.training import SMOOTHED, new_model, train


def trained(steps, until=None):
    """(steps taken, the steps told of, weights)"""
    torch.manual_seed(0)
    rng, tokenizer, told = random.Random(0), make_tokenizer(), []
    model = new_model(tokenizer)
    done = train(model, tokenizer, lambda: TASKS["translation"](rng), steps, 2e-3, told.append, until=until)
    return done, told, model.lm_head.weight.detach().clone()


def test_training_ends_at_a_mean_loss_or_after_its_steps():
    done, told, weights = trained(60, until=3.5)  # 5.4 at first: of 215 words any
    assert SMOOTHED < done < 60 and told == list(range(1, done + 1))
    again, _, exactly = trained(done)
    assert again == done and torch.equal(weights, exactly)
    assert trained(22, until=0.0)[0] == 22
