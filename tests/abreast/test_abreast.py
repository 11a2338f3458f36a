"""Candidates asked abreast answer, to the last bit, what they answer one after the other."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from merge3 import Pool, Recipe, Slot
from merge3.abreast import Abreast, Unfit, groups
from merge3.abreast.course import course_of, storage_of
from merge3.abreast.turns import Turn, taking_turns
from merge3.client import run
from merge3.engine import LocalEngine
from merge3.errors import BadInput
from merge3.registration import Registration
from merge3.residence import Residence
from merge3.search.config_files import load_config
from merge3.tasks import Scorer, lm, read_items
from merge3.tasks.requests import Pass
from tests.families import FAMILIES, make, outputs, walked

# What uses weights beside a stack of layers, or has no such stack.
UNFIT = {"DeBERTa", "DeBERTa-v2", "T5", "BART", "ResNet", "CLIP"}


SHOTS = "two plus two equals four two three minus one equals two five minus two equals three "


@pytest.fixture(scope="module")
def chosen(tiny_world, tmp_path_factory):
    """The tiny world's questions as choices between answers, after the same worked examples."""
    folder = tmp_path_factory.mktemp("chosen")
    config = yaml.safe_load((tiny_world / "evolve.yaml").read_text())
    genome = config["genome"]
    genome["base_model"] = str(tiny_world / genome["base_model"])
    genome["models"] = [str(tiny_world / model) for model in genome["models"]]
    for task in ("english", "translation"):
        items = [json.loads(line) for line in (tiny_world / f"{task}.jsonl").read_text().splitlines()]
        answers, lines = sorted({item["answer"] for item in items}), []
        for at, item in enumerate(items):
            others = [answers[(at * 7 + step) % len(answers)] for step in range(3)]
            choices = list(dict.fromkeys((*others, item["answer"])))
            own = {"kind": "choice", "prompt": SHOTS + item["prompt"], "choices": choices}
            own |= {key: item[key] for key in ("id", "task", "answer")}
            lines.append(json.dumps(own))
        (folder / f"{task}.jsonl").write_text("\n".join(lines))
    (folder / "evolve.yaml").write_text(yaml.safe_dump(config))
    return folder


def registered(world, tasks=("english", "translation"), seed=0):
    """A space of the world's, and the items of its tasks."""
    config = load_config(world / "evolve.yaml")
    items = []
    for task in tasks:
        items += read_items(world / f"{task}.jsonl")
    return config, Registration(tuple(items), config.genome.definition(), seed=seed)


def genomes_of(engine, asked, count, seed=0):
    space = engine.space(asked.space)
    random = np.random.default_rng(seed)
    return [space.initial() + 0.1 * random.standard_normal(len(space.initial())) for _ in range(count)]


def opened(config, abreast, budget=None):
    return LocalEngine(Pool.open(config.models[0], config.models[1:], memory_budget=budget), abreast=abreast)


def same(found, expected):
    assert [one.index for one in found] == [one.index for one in expected]
    for one, other in zip(found, expected):
        assert one.recipe_hash == other.recipe_hash and one.error is None and other.error is None
        assert np.array_equal(one.responses, other.responses)
        assert np.array_equal(one.values, other.values) and np.array_equal(one.stderrs, other.stderrs)


def likelihoods(engine, asked, genomes, monkeypatch):
    """What was computed, not only what is right: the sums of log-likelihoods of every choice, as they were judged."""
    seen = []
    judged = Scorer.judged

    def looking(self, told):
        told = [list(own) for own in told]
        seen.append([[(at, found.sums.tolist()) for at, found in sorted(own, key=lambda x: x[0])] for own in told])
        return judged(self, told)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "judged", looking)
        list(engine.evaluate(asked, genomes))
    return seen


@pytest.mark.parametrize("prefix", ("read once", "copied", "none"))
def test_likelihoods_are_the_same_bits(chosen, monkeypatch, prefix):
    config, asked = registered(chosen)
    if prefix == "copied":
        monkeypatch.setattr(lm, "possible", lambda model: False)
    if prefix == "none":
        monkeypatch.setattr(lm, "share_prefix", lambda requests: ((), list(requests)))
    alone, abreast = opened(config, 1), opened(config, 3)
    genomes = genomes_of(alone, asked, 7)
    before = [parameter.data_ptr() for parameter in abreast.slot.model.parameters()]
    found = likelihoods(abreast, asked, genomes, monkeypatch)
    expected = likelihoods(alone, asked, genomes, monkeypatch)
    # Alone a candidate's tasks are judged in turn, abreast all candidates' are when the last layer is through.
    assert found == expected
    assert len({json.dumps(one) for one in expected}) == len(expected)  # candidates differ
    assert [parameter.data_ptr() for parameter in abreast.slot.model.parameters()] == before
    if prefix != "none":
        assert any(question.prefix for question in _questions(abreast, asked))
        once = prefix == "read once" and abreast.pool.device.type == "cpu"  # a GPU's products differ with their rows
        assert all(question.once == once for question in _questions(abreast, asked))


def _questions(engine, asked):
    prepared = engine._rounds.prepare(asked, None, engine.space)
    return [one.question for round_ in prepared.rounds for one in round_.scorer.asked]


def test_it_was_asked_so(chosen, monkeypatch):
    """Seven candidates by threes: two groups, and one that is alone."""
    config, asked = registered(chosen)
    engine = opened(config, 3)
    groups = []
    ask = Abreast.ask
    monkeypatch.setattr(
        Abreast, "ask", lambda self, programs, *rest: groups.append(len(programs)) or ask(self, programs, *rest)
    )
    genomes = genomes_of(engine, asked, 7)
    recipe = engine.space(asked.space).recipe(genomes[0])
    evaluations = list(engine.evaluate(asked, [*genomes, recipe, config.models[0]]))
    assert groups == [3, 3] and [one.index for one in evaluations] == list(range(9))
    assert np.array_equal(evaluations[7].responses, evaluations[0].responses)
    assert all(one.seconds > one.swap_seconds > 0 for one in evaluations)


def least(config):
    """Bytes of the smallest budget, about."""
    models = config.models
    plan = Pool.open(models[0], models[1:]).memory
    for size in range(plan.slot, plan.total, 1 << 18):
        try:
            Pool.open(models[0], models[1:], memory_budget=size)
        except BadInput:
            continue
        return size
    pytest.fail("no budget is too small for these models")


def test_a_streamed_pool_is_read_once_for_four(chosen, monkeypatch):
    """By default, and where the budget leaves room for it."""
    config, asked = registered(chosen)
    budget = least(config) + (6 << 20)
    reads, part = [], Residence.part

    def counted(self, ref, begin, end):
        reads.append(end - begin)
        return part(self, ref, begin, end)

    monkeypatch.setattr(Residence, "part", counted)
    read, found = {}, {}
    for abreast in (1, None):
        engine = opened(config, abreast, budget)
        engine.pool.reserve(6 << 20)  # as much is streamed either way
        monkeypatch.setattr(engine.pool, "reserve", lambda size: size <= 6 << 20 or pytest.fail(f"{size} bytes"))
        assert engine.pool.memory.file + engine.pool.memory.host > 1 << 20  # host: of pools on a GPU
        genomes = genomes_of(engine, asked, 4)
        list(engine.evaluate(asked, [genomes[0]]))
        reads.clear()
        found[abreast] = list(engine.evaluate(asked, genomes))
        read[abreast] = sum(reads)
    same(found[None], found[1])
    assert 0 < 3.5 * read[None] < read[1]  # a tied or small tensor may be read twice


def test_a_budget_without_room_asks_one_after_the_other(chosen):
    config, asked = registered(chosen)
    engine = opened(config, 4, least(config))
    genomes = genomes_of(engine, asked, 8)
    same(list(engine.evaluate(asked, genomes)), list(opened(config, 1).evaluate(asked, genomes)))
    assert engine._groups.size() < 4 and engine.pool.memory.total <= engine.pool.memory.budget


def test_questions_too_large_to_wait_side_by_side_are_asked_one_after_the_other(chosen, monkeypatch):
    config, asked = registered(chosen)
    engine = opened(config, 4)
    genomes = genomes_of(engine, asked, 4)
    monkeypatch.setattr(groups, "available", lambda device: 1 << 16)
    monkeypatch.setattr(Abreast, "ask", lambda *_: pytest.fail("asked abreast"))
    assert len(list(engine.evaluate(asked, genomes))) == 4


def test_memory_that_is_short_after_all_halves_the_group(chosen, monkeypatch):
    config, asked = registered(chosen)
    engine, asks, ask = opened(config, 4), [], Abreast.ask

    def short(self, programs, *rest):
        asks.append(len(programs))
        if len(programs) > 2:
            raise torch.OutOfMemoryError("Tried to allocate 7 GiB")
        return ask(self, programs, *rest)

    monkeypatch.setattr(Abreast, "ask", short)
    genomes = genomes_of(engine, asked, 8)
    same(list(engine.evaluate(asked, genomes)), list(opened(config, 1).evaluate(asked, genomes)))
    assert asks == [4, 2, 2]


def test_a_merge_that_joins_has_the_room_that_candidates_took(chosen, monkeypatch):
    """A group's blocks are in the budget; what comes next and needs it gets it."""
    config, asked = registered(chosen)
    budget = least(config) + (8 << 20)
    engine = opened(config, 4, budget)
    genomes = genomes_of(engine, asked, 4)
    list(engine.evaluate(asked, genomes))
    assert engine.pool._reserved > 0
    merged = engine.space(asked.space).recipe(genomes[0])
    models = [
        {"model": "elite", "parameters": {"weight": 0.5}},
        {"model": config.models[1], "parameters": {"weight": 0.5}},
    ]
    recipe = Recipe.parse({"merge_method": "linear", "models": models})
    tried, add = [], Pool.add

    def full(self, *model):
        tried.append(self._reserved)
        if self._reserved:
            raise BadInput("memory_budget", "no room")
        return add(self, *model)

    monkeypatch.setattr(Pool, "add", full)
    (found,) = engine.evaluate(replace(asked, space=None), [replace(recipe, merged={"elite": merged.to_dict()})])
    assert found.error is None and len(tried) >= 2 and tried[0] > 0 == tried[-1]
    list(engine.evaluate(asked, genomes))


def test_a_program_that_does_not_write_all_of_the_model_is_run_alone(tmp_path):
    """An output that is held apart for the sake of one endpoint, and that the others tie: a swap shares it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=64, num_hidden_layers=2)
    for number, (name, tied) in enumerate((("base", True), ("e0", True), ("e1", True), ("apart", False))):
        torch.manual_seed(number)
        LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=tied)).save_pretrained(tmp_path / name)
    base, *experts = (str(tmp_path / name) for name in ("base", "e0", "e1", "apart"))
    slot = Slot(Pool.open(base, experts))
    ids = torch.tensor([[1, 2, 3]])
    abreast = Abreast(slot, [Pass(lambda: [(0, slot.model(input_ids=ids).logits)])])
    models = [{"model": model, "parameters": {"weight": 0.4}} for model in experts[:2]]
    program = slot.compile(Recipe.parse({"merge_method": "task_arithmetic", "base_model": base, "models": models}))
    assert abreast.outputs - program.shapes.keys() == {"lm_head.weight"}


def test_a_module_around_the_stack_with_weights_of_its_own_is_found_unfit():
    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
            self.scale = torch.nn.Parameter(torch.ones(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x) * self.scale
            return x

    model = Around()
    weights = {storage_of(tensor) for tensor in model.parameters()}
    with pytest.raises(Unfit, match="weights used beside the layers"):
        course_of(model, model.layers, weights, [Pass(lambda: [(0, model(torch.ones(2)))])])


def test_an_answer_that_is_none_is_its_candidates_own(chosen, monkeypatch):
    config, asked = registered(chosen)
    engine = opened(config, 3)
    genomes = genomes_of(engine, asked, 3)
    genomes[1] = genomes[1] * 1e30
    evaluations = list(engine.evaluate(asked, genomes))
    alone = list(opened(config, 1).evaluate(asked, genomes))
    assert [one.error is None for one in evaluations] == [one.error is None for one in alone]
    assert str(evaluations[1].error) == str(alone[1].error)
    for at in (0, 2):
        assert np.array_equal(evaluations[at].responses, alone[at].responses)


def test_texts_are_asked_one_after_the_other(tiny_world, monkeypatch):
    """What is written waits for what was written before."""
    config, asked = registered(tiny_world, ("english", "sorting"))
    monkeypatch.setattr(Abreast, "ask", lambda *_: pytest.fail("asked abreast"))
    engine = opened(config, 3)
    kinds = {item.kind for item in asked.items}
    assert "generate" in kinds
    assert len(list(engine.evaluate(asked, genomes_of(engine, asked, 2)))) == 2


def test_searches_keep_their_journals(chosen, tmp_path, monkeypatch):
    config, groups = load_config(chosen / "evolve.yaml", budget=12), []
    ask = Abreast.ask
    monkeypatch.setattr(Abreast, "ask", lambda self, them, *rest: groups.append(len(them)) or ask(self, them, *rest))
    results = []
    for abreast in (1, 4):
        directory = tmp_path / str(abreast)
        run.evolve(config, directory, quiet=True, export=False, abreast=abreast)
        journal = run.Journal(directory)
        results.append([(c.genome.tolist(), c.responses.tolist(), c.value) for c in journal.candidates()])
        journal.close()
        assert groups == ([] if abreast == 1 else [4, 2, 4, 2])
    assert results[0] == results[1]


def test_a_daemon_is_asked_one_after_the_other(tiny_world, tmp_path):
    config = load_config(tiny_world / "evolve.yaml")
    with pytest.raises(BadInput, match="--abreast: given with --server"):
        run.open_engine(config, target=object(), abreast=2)


@pytest.mark.parametrize("name", walked())
def test_every_family_answers_the_same_or_is_found_unfit(name, tmp_path):
    family = FAMILIES[name]
    built = make(family, tmp_path)
    if isinstance(built, str):
        pytest.skip(f"transformers cannot build it here: {built}")
    base, *experts = (str(tmp_path / model) for model in ("base", "e0", "e1"))
    slot = Slot(Pool.open(base, experts))
    asked = Pass(lambda: list(outputs(slot.model, family).items()))
    try:
        abreast = Abreast(slot, [asked])
    except Unfit as reason:
        assert name in UNFIT, str(reason)
        return
    assert name not in UNFIT
    recipes = []
    for method, weight in (("ties", 0.5), ("task_arithmetic", 0.9), ("ties", 0.2)):
        models = [{"model": model} for model in experts]
        parameters = {"weight": weight, **({"density": 0.5} if method == "ties" else {})}
        recipe = {"merge_method": method, "base_model": base, "models": models, "parameters": parameters}
        recipes.append(Recipe.parse(recipe))
    told, seconds = abreast.ask([slot.compile(recipe) for recipe in recipes], [[[asked]]] * 3)
    for recipe, (found,) in zip(recipes, told):
        slot.swap(recipe)
        slot.use_head(None)
        with torch.inference_mode():
            expected = outputs(slot.model, family)
        assert dict(found).keys() == expected.keys()
        for place, value in found:
            assert torch.equal(value, expected[place]), place
    assert seconds > 0


def test_a_forward_that_fails_leaves_nothing_behind(family):
    base, *experts = (str(Path(family) / name) for name in ("base", "e0", "e1"))
    slot = Slot(Pool.open(base, experts))
    ids = torch.tensor([[1, 2, 3]])
    asked = Pass(lambda: [(0, slot.model(input_ids=ids).logits)])
    recipe = Recipe.parse(
        {"merge_method": "linear", "models": [{"model": model, "parameters": {"weight": 0.5}} for model in experts]}
    )
    abreast = Abreast(slot, [asked])
    slot.swap(recipe)
    before = {name: value.clone() for name, value in slot.model.state_dict().items()}

    def failing():
        slot.model(input_ids=ids)
        raise RuntimeError("no more")

    for passes in ([asked, Pass(failing)], [Pass(lambda: []), asked]):
        with pytest.raises(RuntimeError, match="no more|did not stop where it should"):
            abreast.ask([slot.compile(recipe)] * 2, [[[asked]], [passes]])
        after = slot.model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in slot.model.modules())


def test_what_is_around_a_turn_is_there_in_no_other():
    """A context is left whenever its forward waits."""
    from contextlib import contextmanager

    layers = torch.nn.ModuleList([torch.nn.Identity() for _ in range(3)])
    inside, seen = [], []

    @contextmanager
    def around(name):
        inside.append(name)
        yield
        inside.remove(name)

    def go(name):
        for layer in layers:
            layer(torch.zeros(1))
            seen.append((name, tuple(inside)))
        return [(0, name)]

    turns = [Turn(Pass(lambda name=name: go(name), lambda name=name: around(name))) for name in "ab"]
    with taking_turns(layers, turns):
        for _ in range(5):
            assert [turn.go_on() for turn in turns] in ([True, True], [False, False])
            assert not inside
    assert [turn.results for turn in turns] == [[(0, "a")], [(0, "b")]]
    assert seen == [(name, (name,)) for _ in range(3) for name in "ab"]
