"""Surgery against plain torch: features at the places that are asked, whole fits, files, and answers by task."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from merge3 import Pool, Recipe, Slot
from merge3.engine import LocalEngine, Operated
from merge3.errors import BadInput, ItemsError, RecipeError
from merge3.learn.distributions import Asked
from merge3.learn.features import features
from merge3.learn.fitting import FitError, drawn
from merge3.learn.lessons import TaskToLearn
from merge3.learn.settings import SurgerySettings, read_fit, read_surgery
from merge3.learn.surgery import Features, Surgery, fit_adapters, operate, started
from merge3.learn.surgery_items import unseen
from merge3.registration import Registration
from merge3.tasks import Item, LogitsError, Scorer, read_items
from merge3.tasks.kinds import KINDS
from merge3.tasks.prompts import Reader, load_tokenizer
from merge3.tasks.requests import Image, Text
from tests.classifiers import make_classifier
from tests.encoders import make_tokenizer
from tests.live.test_hooks import SMALL, made, random_adapter

TASKS = ("english", "italian")


def some_features(width=12, counts=(1, 3, 2, 1, 4, 2, 1), seed=0):
    """Of items with so many places each."""
    generator = torch.Generator().manual_seed(seed)
    merged = [torch.randn(count, width, generator=generator) for count in counts]
    turn = torch.randn(width, width, generator=generator) * 0.3
    return Features.of(merged, [states + (states @ turn).relu() + 0.1 for states in merged])


def settings_of(**given):
    return SurgerySettings(**{"rank": 4, "steps": 30, "learning_rate": 0.01, "batch": 3, **given})


def fitted(tasks, settings):
    return list(fit_adapters(tasks, settings))


class Modules(torch.nn.Module):
    """The paper's adapter of one task."""

    def __init__(self, start):
        super().__init__()
        rank, width = start.down.shape
        self.down = torch.nn.Linear(width, rank, bias=False)
        self.up = torch.nn.Linear(rank, width, bias=False)
        self.down.weight.data.copy_(start.down)
        self.up.weight.data.copy_(start.up)

    def forward(self, z):
        return z - self.up(F.relu(self.down(z)))


# -- the loop


@pytest.mark.parametrize("counts", [(1,) * 7, (1, 3, 2, 1, 4, 2, 1)], ids=["pooled", "places of texts"])
def test_a_fit_is_plain_torchs(counts):
    tasks = {"a": some_features(counts=counts), "b": some_features(counts=counts[:5], seed=1)}
    settings = settings_of(seed=3)
    steps = fitted(tasks, settings)
    modules = [Modules(started(12, 4, [3, index])) for index in range(2)]
    optimizer = torch.optim.Adam([p for module in modules for p in module.parameters()], lr=0.01)
    for step in steps:
        losses = []
        for index, (module, known) in enumerate(zip(modules, tasks.values())):
            of_items = []
            for item in drawn(len(known), 3, step.number, [3, index]):
                own = slice(known.starts[item], known.starts[item + 1])
                of_items.append(F.l1_loss(module(known.merged[own]), known.expert[own]))
            losses.append(torch.stack(of_items).mean())
        assert list(step.losses.values()) == pytest.approx([float(loss.detach()) for loss in losses], rel=1e-5)
        assert step.loss == pytest.approx(sum(step.losses.values()) / 2)
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    assert [step.adapters is not None for step in steps] == [False] * 29 + [True]
    for module, adapter in zip(modules, steps[-1].adapters.values()):
        torch.testing.assert_close(adapter.down, module.down.weight.detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(adapter.up, module.up.weight.detach(), atol=1e-6, rtol=1e-5)
        assert adapter.up.abs().max() > 0.02


def test_it_begins_with_no_change_within_the_bound_of_kaiming():
    first, again, other = started(64, 16, [0, 0]), started(64, 16, [0, 0]), started(64, 16, [0, 1])
    assert torch.equal(first.down, again.down) and not torch.equal(first.down, other.down)
    assert 0.9 / 8 < first.down.abs().max() <= 1 / 8 and not first.up.any()
    z = torch.randn(5, 64)
    assert torch.equal(first.changed(z), z)


def test_the_distance_falls_and_a_task_learns_for_itself_alone():
    tasks = {"a": some_features(), "b": some_features(seed=1)}
    settings = settings_of(steps=300)
    found = fitted(tasks, settings)[-1].adapters
    for task, known in tasks.items():
        assert float(known.distance(found[task])) < 0.6 * float(known.distance(None))
    alone = fitted({"a": tasks["a"]}, settings)[-1].adapters
    assert torch.equal(alone["a"].down, found["a"].down) and torch.equal(alone["a"].up, found["a"].up)


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    tasks = {"a": some_features()}
    first, again = fitted(tasks, settings_of())[-1], fitted(tasks, settings_of())[-1]
    assert first.loss == again.loss and torch.equal(first.adapters["a"].up, again.adapters["a"].up)
    assert not torch.equal(first.adapters["a"].up, fitted(tasks, settings_of(seed=1))[-1].adapters["a"].up)


def test_a_distance_that_is_no_number_is_named():
    known = some_features()
    known.expert[2, 3] = 1e38
    known.merged[2, 3] = -3e38
    with pytest.raises(FitError, match=r"^surgery: step \d+, task 'a': a distance of inf; expected a finite one"):
        fitted({"a": known}, settings_of())


# -- features


def rows_of(model, prompt, answer):
    """States before the head at each token of an answer, one text alone."""
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    states = model.model(input_ids=ids).last_hidden_state[0]
    return states[len(prompt) - 1 :]


def test_of_a_causal_model_they_are_the_states_that_predict_the_answers(family):
    slot = Slot(Pool.open(str(family / "base"), []))
    item = Item("1", "t", "generate", "", ("",))
    texts = [((3, 4, 5), ((6, 7, 8),)), ((9, 2), ((1,), (4, 4))), ((5, 6, 7, 8, 9), ((),))]
    asked = [Asked(item, prompt, answers, len(answers) > 1) for prompt, answers in texts]
    found = features(slot.model, asked, "base", limit=20)
    for one, states in zip(asked, found):
        expected = [rows_of(slot.model, one.prompt, answer or (0,)) for answer in one.answers]
        torch.testing.assert_close(states, torch.cat(expected), atol=1e-5, rtol=1e-4)
    assert [len(states) for states in found] == [3, 3, 1]


def test_of_an_encoder_and_decoder_they_are_the_decoders():
    model = made(
        "T5ForConditionalGeneration", "T5Config", d_model=16, d_kv=8, d_ff=16, num_layers=1, vocab_size=32,
        num_heads=2, decoder_start_token_id=0,
    )  # fmt: skip
    item = Item("1", "t", "generate", "", ("",))
    found = features(model, [Asked(item, (3, 4, 5), ((6, 7),)), Asked(item, (8,), ((),))], "t5")
    for states, prompt, fed in zip(found, ((3, 4, 5), (8,)), ((0, 6), (0,))):
        out = model.model if hasattr(model, "model") else model
        out = out(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([fed]), output_hidden_states=True)
        logits = model.lm_head(states)
        torch.testing.assert_close(logits, out.logits[0], atol=1e-5, rtol=1e-4)


def test_of_a_classifier_they_are_what_it_pools():
    item = Item("1", "t", "classify", "", 0)
    texts = [(5, 6, 7), (9, 10), (3, 4, 5, 6, 8)]
    asked = [Asked(item, head=Text(tokens)) for tokens in texts]
    llama = make_classifier(3).eval()
    for states, tokens in zip(features(llama, asked, "llama"), texts):
        expected = llama.model(input_ids=torch.tensor([tokens])).last_hidden_state[:, -1]
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-4)
    bert = made("BertForSequenceClassification", "BertConfig", **SMALL)
    for states, tokens in zip(features(bert, asked, "bert"), texts):
        expected = bert.bert(input_ids=torch.tensor([tokens])).pooler_output
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-4)
    roberta = made("RobertaForSequenceClassification", "RobertaConfig", **SMALL)
    for states, tokens in zip(features(roberta, asked, "roberta"), texts):
        first = roberta.roberta(input_ids=torch.tensor([tokens])).last_hidden_state[:, 0]
        torch.testing.assert_close(states, roberta.classifier.dense(first).tanh(), atol=1e-5, rtol=1e-4)
    vit = made("ViTForImageClassification", "ViTConfig", **SMALL, image_size=8, patch_size=4)
    pictures = torch.randn(3, 3, 8, 8)
    found = features(vit, [Asked(item, head=Image(pixels)) for pixels in pictures], "vit")
    torch.testing.assert_close(torch.cat(found), vit.vit(pixel_values=pictures).last_hidden_state[:, 0])


def test_models_whose_logits_are_not_the_heads_are_refused():
    item = Item("1", "t", "classify", "", 0)
    two = made("DeiTForImageClassificationWithTeacher", "DeiTConfig", **SMALL, image_size=8, patch_size=4)
    with pytest.raises(BadInput, match=r"^surgery: a DeiTForImageClassificationWithTeacher, whose logits are some"):
        features(two, [Asked(item, head=Image(torch.randn(3, 8, 8)))], "two")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_no_numbers_are_named(value):
    llama = make_classifier(3).eval()
    llama.model.norm.weight.data[2] = value
    item = Item("7", "t", "classify", "", 0, source="a.jsonl line 3")
    with pytest.raises(LogitsError, match=r"^math: a.jsonl line 3: item '7' of task 't': representations that are NaN"):
        features(llama, [Asked(item, head=Text((3, 4)))], "math")


# -- a merge


def recipe_of(world, method="ties"):
    models = [{"model": str(world / task), "parameters": {"weight": 0.3, "density": 0.5}} for task in TASKS]
    return Recipe.parse({"merge_method": method, "base_model": str(world / "base"), "models": models})


@pytest.fixture(scope="module")
def world(solving_world):
    """(folder, recipe, engine, items of both tasks)"""
    pool = Pool.open(str(solving_world / "base"), [str(solving_world / task) for task in TASKS])
    items = [item for task in TASKS for item in read_items(solving_world / f"{task}.jsonl")[:24]]
    return solving_world, recipe_of(solving_world), LocalEngine(pool), tuple(items)


def operation_of(world, **settings):
    folder, recipe, engine, items = world
    surgery = Surgery(settings_of(**settings), {task: str(folder / task) for task in TASKS})
    return engine.operate(Registration(items), recipe, surgery)


def test_features_are_of_the_merge_and_of_each_tasks_expert_where_it_writes(world):
    folder, recipe, engine, items = world
    slot = engine.slot
    tasks = [TaskToLearn(t, [i for i in items if i.task == t], expert=str(folder / t)) for t in TASKS]
    found = operate(slot, recipe, tasks, settings_of(), folder / "base").features
    following = operate(slot, recipe, tasks, settings_of(over="next"), folder / "base").features
    for task in TASKS:
        own, short = found[task], following[task]
        assert len(own) == len(short) == len(short.merged) == 24 < len(own.merged)
        for subject, states, last in (("merged", own.merged, short.merged), ("expert", own.expert, short.expert)):
            firsts = own.starts[:-1]
            torch.testing.assert_close(states[firsts], last, atol=1e-4, rtol=1e-4)
            slot.swap(recipe) if subject == "merged" else slot.load(str(folder / task))
            reader = Reader(load_tokenizer(folder / "base"))
            for row, item in zip(last, [item for item in items if item.task == task]):
                ids = KINDS[item.kind].request(item, reader).tokens
                expected = slot.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
                torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)


def test_adapters_bring_a_merge_near_its_experts(world):
    operation = operation_of(world, steps=300)
    adapters = list(operation.steps())[-1].adapters
    before, after = operation.distances(), operation.distances(adapters)
    assert before.keys() == after.keys() == set(TASKS)
    for task in TASKS:
        assert 0 < after[task] < 0.8 * before[task]
    assert operation.recipe == world[1].hash()


def test_answers_by_task_are_those_with_hooks_by_hand(world):
    folder, recipe, engine, items = world
    adapters = {"english": random_adapter(128, size=0.02), "italian": random_adapter(128, seed=1, size=0.02)}
    asked = Registration(items)
    evaluations = list(engine.evaluate(asked, [Operated(recipe, adapters), recipe, Operated(recipe, {})]))
    found, alone, none = (evaluation.answers() for evaluation in evaluations)
    assert np.array_equal(alone, none) and len({e.recipe_hash for e in evaluations}) == 1
    engine.slot.swap(recipe)
    model = engine.slot.model
    for task, positions in asked.tasks().items():
        scorer = Scorer([items[i] for i in positions], model, folder / "base")
        adapter = adapters[task]

        def change(head, given, adapter=adapter):
            (z,) = given
            return (z - F.linear(F.relu(F.linear(z, adapter.down)), adapter.up),)

        assert np.array_equal(alone[positions], scorer.score(model))
        handle = model.lm_head.register_forward_pre_hook(change)
        assert np.array_equal(found[positions], scorer.score(model))
        handle.remove()
    assert not np.array_equal(found, alone)


def test_only_the_tasks_that_have_an_adapter_change(world):
    _, recipe, engine, items = world
    adapters = {"italian": random_adapter(128, size=0.5)}
    of_both, alone = (e.answers() for e in engine.evaluate(Registration(items), [Operated(recipe, adapters), recipe]))
    italian = [i for i, item in enumerate(items) if item.task == "italian"]
    english = [i for i, item in enumerate(items) if item.task == "english"]
    assert np.array_equal(of_both[english], alone[english]) and not np.array_equal(of_both[italian], alone[italian])


def test_an_adapter_of_another_merge_has_its_line_in_the_evaluation(world):
    _, recipe, engine, items = world
    (evaluation,) = engine.evaluate(Registration(items), [Operated(recipe, {"english": random_adapter(64)})])
    with pytest.raises(BadInput, match=r"^surgery: an adapter of width 64; expected 128, as the head of this LlamaFor"):
        evaluation.answers()


def test_what_cannot_be_operated_is_one_line(world):
    folder, recipe, engine, items = world
    experts = {task: str(folder / task) for task in TASKS}
    with pytest.raises(RecipeError, match=r"^surgery.rank: found 129; expected at most 128, the width of the last rep"):
        operation_of(world, rank=129)
    with pytest.raises(RecipeError, match=r"^surgery: items: no model for task 'italian'; expected its expert, as `m"):
        engine.operate(Registration(items), recipe, Surgery(settings_of(), {"english": experts["english"]}))
    with pytest.raises(RecipeError, match=r"^surgery: items: task 'italian': model: found 'nowhere'; expected .*base,"):
        engine.operate(Registration(items), recipe, Surgery(settings_of(), experts | {"italian": "nowhere"}))
    classify = (Item("1", "english", "classify", "one", 0),)
    with pytest.raises(ItemsError, match="kind 'classify' for a LlamaForCausalLM"):
        engine.operate(Registration(classify), recipe, Surgery(settings_of(), experts))


# -- which items measure


def test_only_questions_that_were_never_learned_from_measure(tmp_path):
    for name, pixels in (("one", 1), ("copy", 1), ("two", 2)):
        np.save(tmp_path / f"{name}.npy", np.full((2, 2), pixels))
    picture = lambda id, name: Item(id, "t", "classify", "", 0, image=str(tmp_path / f"{name}.npy"))
    learned = [Item("1", "a", "generate", "one plus one", ("two",)), picture("1", "one")]
    learned.append(Item("2", "a", "choice", "which", 0, ("x", "y")))
    learned.append(Item("3", "a", "loglikelihood", "", "", asks=(("p", "q"),)))
    seen = [
        Item("9", "b", "generate", "one plus one", ("3",), max_tokens=4),
        picture("8", "copy"),
        Item("2", "t", "choice", "which", 1, ("x", "y")),
        Item("1", "b", "loglikelihood", "", "", asks=(("p", "q"),)),
    ]
    new = [
        Item("1", "b", "generate", "one plus two", ("three",)),
        picture("1", "two"),
        Item("2", "a", "choice", "which", 0, ("x", "z")),
        Item("3", "a", "loglikelihood", "", "", asks=(("p", "r"),)),
    ]
    assert unseen([*seen, *new], learned, "surgery") == new
    with pytest.raises(RecipeError, match=r"^surgery.heldout: all 1 items of task 'b' that would measure"):
        unseen([*seen[:1], *new[1:]], learned, "surgery")


# -- settings


def test_what_surgery_does_not_say_is_what_the_fit_says():
    fit = read_fit({"items": ["a.jsonl"], "per_task": 7, "heldout": 0.5, "seed": 9, "steps": 3}, "fit")
    found = read_surgery({"rank": 2, "heldout": 0.1}, "surgery").after(fit)
    assert [entry.items for entry in found.items] == ["a.jsonl"]
    assert (found.per_task, found.heldout, found.seed, found.steps, found.rank) == (7, 0.1, 9, 1000, 2)
    own = read_surgery({"items": [{"items": "b.jsonl", "model": "b"}]}, "surgery").after(fit)
    assert [(entry.items, entry.model) for entry in own.items] == [("b.jsonl", "b")]


@pytest.mark.parametrize(
    "section, line",
    [
        ({"rnak": 3}, r"surgery.rnak: unknown key; expected .*rank.*\(did you mean 'rank'\?\)"),
        ({"rank": 0}, r"surgery.rank: found 0: Input should be greater than or equal to 1"),
        ({"learning_rate": math.inf}, r"surgery.learning_rate: found inf"),
        ({"over": "all"}, r"surgery.over: found 'all': Input should be 'answer' or 'next'"),
    ],
)
def test_settings_that_are_none_are_named(section, line):
    with pytest.raises(RecipeError, match=f"^{line}"):
        read_surgery(section, "surgery")


# -- classifiers whose endpoints answer with heads of their own


@pytest.fixture
def classifiers(tmp_path):
    """(folder of a base and experts with 3 and 5 labels, items of both tasks)"""
    rng = np.random.default_rng(0)
    base = make_classifier(3, seed=0, vocabulary=60)
    for at, (name, labels) in enumerate((("base", 3), ("a", 3), ("b", 5))):
        model = make_classifier(labels, seed=at, vocabulary=60)
        backbone = base.model.state_dict()
        changed = {key: value + 0.2 * torch.randn_like(value) * (name != "base") for key, value in backbone.items()}
        model.model.load_state_dict(changed)
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    items = []
    for task, labels in (("a", 3), ("b", 5)):
        for i in range(20):
            text = " ".join(f"w{rng.integers(57)}" for _ in range(1 + i % 6))
            items.append(Item(f"{i}", task, "classify", text, int(rng.integers(labels))))
    return tmp_path, tuple(items)


def test_tasks_of_a_classifier_are_operated_before_their_own_experts_head(classifiers):
    folder, items = classifiers
    names = {task: str(folder / task) for task in ("a", "b")}
    engine = LocalEngine(Pool.open(str(folder / "base"), list(names.values())))
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in names.values()]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "models": models}
    recipe, asked = Recipe.parse(recipe), Registration(items, heads=names)
    operation = engine.operate(asked, recipe, Surgery(settings_of(steps=400, batch=8), names))
    adapters = list(operation.steps())[-1].adapters
    before, after = operation.distances(), operation.distances(adapters)
    tokenizer = load_tokenizer(folder / "base")
    for task in names:
        assert 0 < after[task] < 0.8 * before[task]
        assert operation.features[task].merged.shape == (20, 16)
        engine.slot.load(names[task])
        for row, item in zip(operation.features[task].expert, [item for item in items if item.task == task]):
            ids = torch.tensor([tokenizer(item.prompt)["input_ids"]])
            expected = engine.slot.model.model(input_ids=ids).last_hidden_state[0, -1]
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)
    # Answers: the merge's representation, changed, before the task's own head.
    (found,) = engine.evaluate(asked, [Operated(recipe, adapters)])
    engine.slot.swap(recipe)
    for item, response in zip(items, found.answers()):
        engine.slot.use_head(names[item.task])
        ids = torch.tensor([tokenizer(item.prompt)["input_ids"]])
        states = engine.slot.model.model(input_ids=ids).last_hidden_state[0, -1]
        logits = engine.slot.model.score(adapters[item.task].changed(states))
        assert response == float(int(logits.argmax()) == item.answer)
