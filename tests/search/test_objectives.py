"""Objectives: what a value is made of, what is refused, and the optimizers that take several."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from merge3 import fitness
from merge3.engine import LocalEngine
from merge3.errors import BadInput, Merge3Error, Unavailable
from merge3.fitness import Answered, estimates
from merge3.pool import Pool
from merge3.registration import Registration
from merge3.rpc import convert
from merge3.search import optimizers
from merge3.search.config_files import load_config
from merge3.search.pareto import hypervolume
from merge3.search.questions import load_questions
from merge3.tasks import Item


def items(task, count, kind="generate"):
    return [Item(f"{task}{i}", task, kind, "p", ("x",)) for i in range(count)]


# -- values


def test_length_is_the_mean_over_tasks_of_what_was_written():
    asked = Registration(
        tuple(items("a", 4) + items("b", 2) + items("c", 2, "choice")), objectives=("length",), weights={"a": 3.0}
    )
    lengths = np.array([1.0, 2, 3, 6, 10, 20, np.nan, np.nan])
    values, stderrs = estimates(asked, Answered(np.ones(8), lengths))
    assert values[0] == pytest.approx((3 * 3 + 15) / 4)
    assert stderrs[0] == pytest.approx((9 * lengths[:4].var() / 4 + lengths[4:6].var() / 2) ** 0.5 / 4)
    alone = Registration(tuple(items("c", 2, "choice")), objectives=("length",))
    assert np.isnan(estimates(alone, Answered(np.ones(2), np.full(2, np.nan)))).all()


def test_items_chosen_for_others_count_for_them():
    """Weights of a subset: an item that stands for three quarters of a task makes three quarters of its length."""
    subset = SimpleNamespace(subset=SimpleNamespace(weights=np.array([0.75, 0.25])))
    asked = Registration(tuple(items("a", 2)), objectives=("length",), estimators={"a": subset})
    values, _ = estimates(asked, Answered(np.ones(2), np.array([4.0, 8.0])))
    assert values[0] == 5.0


def test_lengths_are_what_the_model_writes(tiny_world):
    """As transformers' own greedy generation counts them; items that ask for no text have none."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = load_config(tiny_world / "evolve.yaml")
    written = load_questions(config).subset[:12]
    choice = Item("c", "choices", "choice", "one plus", 0, choices=("two", "three"))
    asked = Registration((*written, choice), objectives=("length", "accuracy"))
    engine = LocalEngine(Pool.open(config.models[0], config.models[1:]))
    (found,) = engine.evaluate(asked, [config.models[1]])
    model = AutoModelForCausalLM.from_pretrained(config.models[1])
    tokenizer = AutoTokenizer.from_pretrained(config.models[0])
    expected = []
    for item in written:
        ids = torch.tensor([tokenizer(item.prompt)["input_ids"]])
        out = model.generate(ids, max_new_tokens=item.max_tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        expected.append(sum(1 for token in out.tolist() if token not in (0, 2)))
    assert list(found.lengths[:-1]) == expected and np.isnan(found.lengths[-1])
    assert found.values[0] == estimates(asked, Answered(found.responses, found.lengths))[0][0]
    (plain,) = engine.evaluate(replace(asked, objectives=("accuracy",)), [config.models[1]])
    assert plain.lengths is None and np.array_equal(plain.responses, found.responses)
    again = convert.evaluation_from(convert.evaluation_to(found, 0))
    assert np.array_equal(again.lengths, found.lengths, equal_nan=True)
    assert convert.evaluation_from(convert.evaluation_to(plain, 0)).lengths is None


def test_a_space_that_knows_costs_makes_them_an_objective(monkeypatch):
    """`cost` waits for one: the row is there, parameters all cost the same."""

    class Paths:
        cost = None

    row = fitness.OBJECTIVES["cost"]
    monkeypatch.setitem(fitness.SPACES, "paths", Paths)
    definition = SimpleNamespace(kind="paths")
    asked = Registration(tuple(items("a", 2)), definition, objectives=("cost", "a"))
    fitness.check_objectives(asked)
    assert row.value(asked, Answered(np.ones(2), None, 1.25)) == (1.25, 0.0)
    assert list(fitness.signs(("cost", "a", "length", "accuracy"))) == [-1, 1, -1, 1]


# -- refusals


def searched(objectives=(), budget=12, **optimizer):
    return {"objectives": list(objectives), "optimizer": {"budget": budget, "population": 6, "seed": 3} | optimizer}


CHOICES = {"id": "q", "kind": "choice", "prompt": "one plus", "choices": ["two", "three"], "answer": 0}
REFUSED = {
    "unknown": (searched(["english", "speed"], name="nsga2"), "objectives: found 'speed'; expected accuracy, length"),
    "twice": (searched(["english", "english"], name="nsga2"), "objectives: 'english' twice"),
    "one for nsga": (
        searched(["english"], name="nsga3"),
        r"nsga3 with one objective \(english\); expected 2 objectives",
    ),
    "none for nsga": (searched(name="nsga2"), r"nsga2 with one objective \(accuracy\).*: cma, random"),
    "several for cma": (searched(["english", "translation"]), "cma with 2 objectives .*: random, nsga2, nsga3, como"),
    "como with three": (
        searched(["english", "translation", "length"], name="como"),
        "como with 3 objectives .*expected 2 objectives",
    ),
    "cost": (searched(["english", "cost"], name="nsga2"), "objectives that no candidate can differ in: cost"),
    "no texts": (
        searched(["accuracy", "length"], name="nsga2") | {"tasks": [{"items": "choices.jsonl"}]},
        "objectives: length without an item that asks for a text; expected items that are answered with a text",
    ),
    "texts of no weight": (
        searched(["accuracy", "length"], name="nsga2")
        | {"tasks": [{"items": "choices.jsonl"}, {"items": "english.jsonl", "weight": 0}]},
        "objectives: a length of texts, whose tasks all have weight 0; expected a weight above 0 for one of them",
    ),
    "the same": (
        searched(["english", "accuracy"], name="nsga2") | {"tasks": [{"items": "english.jsonl"}]},
        "objectives: english and accuracy, which is one task",
    ),
    "both keys": (searched(["english"]) | {"objective": "length"}, "objective: length beside objectives"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_model_is_opened(own_world, case):
    change, message = REFUSED[case]
    lines = [json.dumps(CHOICES | {"id": f"q{number}"}) for number in range(6)]
    (own_world / "choices.jsonl").write_text("\n".join(lines) + "\n")
    data = yaml.safe_load((own_world / "evolve.yaml").read_text()) | change
    (own_world / "bad.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(BadInput, match=message) as error:
        load_questions(load_config(own_world / "bad.yaml"))
    assert "\n" not in str(error.value)


def test_an_optimizer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"optimizer nsga2: pymoo is not installed; .*merge3-gpu\[pareto\]"):
        optimizers.check_installed("nsga2")
    with pytest.raises(Merge3Error, match="cmaes"):
        optimizers.check_installed("como")
    optimizers.check_installed("cma")


# -- optimizers

D = 5
IDEAL = {2: (np.full(D, 0.2), np.full(D, 0.7)), 3: (np.full(D, 0.2), np.full(D, 0.7), np.linspace(0, 1, D))}


def sequence(name, assisted, m, generations=4, noise=0.0, failing=(), population=6):
    """(every genome asked, its true values): maximise minus the squared distances to m points."""
    o = optimizers.make(
        name, np.full(D, 0.5), np.zeros(D), np.ones(D), 0.2, population, seed=7, assisted=assisted, objectives=m
    )
    g, asked, truth = np.random.default_rng(0), [], []
    for _ in range(generations):
        genomes = o.ask()
        values = np.array([[-float(((x - at) ** 2).mean()) for at in IDEAL[m]] for x in genomes])
        told = values + noise * g.normal(size=values.shape)
        for at in failing:
            told[at] = np.nan
        o.tell(genomes, told, np.full(told.shape, max(noise, 1e-3)))
        asked += genomes
        truth += list(values)
    return np.array(asked), np.array(truth)


SEVERAL = [
    (n, a, m) for n in ("nsga2", "nsga3", "como") for a in (False, True) for m in (2, 3) if (n, m) != ("como", 3)
]


@pytest.mark.parametrize("name,assisted,m", SEVERAL)
def test_same_seed_same_run_whatever_the_global_generator(name, assisted, m):
    np.random.seed(1)
    first, _ = sequence(name, assisted, m, failing=(1, 2))
    after = np.random.rand()
    np.random.seed(2)
    second, _ = sequence(name, assisted, m, failing=(1, 2))
    assert np.array_equal(first, second) and ((first >= 0) & (first <= 1)).all()
    np.random.seed(1)
    assert np.random.rand() == after
    assert np.allclose(first[0], 0.5)  # the start is the first candidate


@pytest.mark.parametrize("name,assisted,m", SEVERAL)
def test_fronts_grow_beyond_those_of_chance(name, assisted, m):
    noise, generations = (0.02, 10) if assisted else (0.0, 25)
    _, found = sequence(name, assisted, m, generations=generations, noise=noise, population=12)
    _, chance = sequence("random", False, m, generations=generations, population=12)
    reference = np.full(m, -0.2)
    assert hypervolume(found, reference) > 1.05 * hypervolume(chance, reference)


def test_a_generation_that_all_but_fails_is_survived():
    for name in ("nsga2", "como"):
        for assisted in (False, True):
            sequence(name, assisted, 2, failing=(0, 1, 2, 4, 5))
