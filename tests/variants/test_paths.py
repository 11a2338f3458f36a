"""One task's model is the same to the last bit on every way to it: live from any state, to disk, out of a folder."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForSequenceClassification as Llama

from merge3 import Pool, Recipe, Slot, merge_to_disk
from merge3.engine import LocalEngine, Varied
from merge3.errors import CheckpointError
from merge3.export_task import merge_task, write_task
from merge3.registration import Registration
from merge3.tasks import Item
from merge3.variants import Variants
from merge3.world.tokenizer import make_tokenizer
from tests.classifiers import make_classifier
from tests.families import FAMILIES, make
from tests.variants.making import METHODS, live, recipe_of, same, stored, with_adapter
from tests.worlds import shared

WORDS = ["one plus two", "two", "three plus one", "four plus four", "five", "six plus one plus two"]
DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module")
def small():
    """Two-layer Llamas, a base and two experts, whose dtypes a recipe may say."""
    from merge3.world.family import make_family

    yield from shared(make_family, experts=2, layers=2)


@pytest.fixture(scope="module")
def pair():
    """The same with the output tied to the embedding, in bfloat16."""
    from merge3.world.family import make_family

    yield from shared(make_family, experts=2, layers=2, tied=True, dtype=torch.bfloat16)


def models(folder):
    return str(folder / "base"), [str(folder / "e0"), str(folder / "e1")]


def of_paths(recipe, tmp_path, tasks=("e0", "e1")):
    """Task -> its model, None -> the common one: from disk, the same by two ways."""
    merge_to_disk(recipe, tmp_path / "packed")
    found = {None: stored(tmp_path / "packed")}
    for task in tasks:
        merge_task(recipe, task, tmp_path / f"direct-{task}")
        write_task(tmp_path / "packed", task, tmp_path / f"from-{task}")
        found[task] = stored(tmp_path / f"direct-{task}")
        assert same(stored(tmp_path / f"from-{task}"), found[task]) == []
        assert same(found[task], found[None]), "a task that differs in nothing"
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", METHODS)
def test_every_way_to_a_task_comes_to_the_same(small, tmp_path, name, dtype):
    base, experts = models(small)
    recipe, other = recipe_of(base, experts, name, dtype=dtype), recipe_of(base, experts, "byom_fft", dtype=dtype)
    plain = Recipe.parse(recipe.to_dict() | {"merge_method": "linear", "parameters": {"weight": 1}})
    expected = of_paths(recipe, tmp_path)
    slot = Slot(Pool.open(base, experts), getattr(torch, dtype))
    ways = [
        ("e0", lambda: None),
        ("e0", lambda: slot.swap(recipe)),
        ("e1", lambda: slot.swap(recipe, task="e0")),
        ("e0", lambda: slot.swap(recipe, task="e1")),
        (None, lambda: slot.swap(recipe, task="e1")),
        ("e1", lambda: slot.swap(other, task="e1")),
        ("e1", lambda: slot.load(experts[0])),
        ("e0", lambda: slot.swap(plain)),
        ("e0", lambda: None),
    ]
    for number, (task, before) in enumerate(ways):
        before()
        slot.swap(recipe, task=task)
        assert same(live(slot), expected[task]) == [], number


@pytest.mark.parametrize("name", ["emr", "byom_fft"])
def test_a_packed_folder_is_an_endpoint(small, tmp_path, name):
    base, experts = models(small)
    expected = of_paths(recipe_of(base, experts, name), tmp_path)
    packed = str(tmp_path / "packed")
    variants, slot = Variants.open(packed), Slot(Pool.open(base, [*experts, packed]))
    for task in ("e0", "e1", None, "e1", "e0"):
        slot.show(variants, packed, task)
        assert same(live(slot), expected[task]) == [], task
    slot.load(base)
    slot.show(variants, packed, "e1")
    assert same(live(slot), expected["e1"]) == []


@pytest.mark.parametrize("name", ["emr", "byom_fft", "onebit"])
def test_live_models_of_another_dtype_hold_what_is_written(small, tmp_path, name):
    """A folder in bfloat16 in a live model that is float32: the numbers of the folder's own task."""
    base, experts = models(small)
    expected = of_paths(recipe_of(base, experts, name, out_dtype="bfloat16"), tmp_path)
    packed = str(tmp_path / "packed")
    variants, slot = Variants.open(packed), Slot(Pool.open(base, [packed]))
    for task in ("e0", None, "e1", "e0"):
        slot.show(variants, packed, task)
        found = {name: tensor.to(torch.bfloat16) for name, tensor in live(slot).items()}
        assert all(torch.equal(found[name].float(), tensor) for name, tensor in live(slot).items()), task
        assert same(found, expected[task]) == [], task


@pytest.mark.parametrize("name", ["emr", "byom_fft", "onebit"])
def test_a_recipe_says_a_dtype_and_the_live_model_has_another(small, tmp_path, name):
    """What a live model holds does not depend on what it held before, whatever the recipe is written in."""
    base, experts = models(small)
    said, unsaid = recipe_of(base, experts, name, dtype="bfloat16"), recipe_of(base, experts, name)
    slot = Slot(Pool.open(base, experts))
    for recipe in (said, unsaid):
        slot.swap(recipe)
        common = live(slot)
        slot.swap(recipe, task="e0")
        first = live(slot)
        slot.swap(recipe, task="e1")
        slot.swap(recipe, task="e0")
        assert same(live(slot), first) == []
        slot.swap(recipe)
        assert same(live(slot), common) == []
    narrow = Slot(Pool.open(base, experts), torch.bfloat16)
    narrow.swap(unsaid, task="e0")
    expected = of_paths(said, tmp_path)
    assert same(live(narrow), expected["e0"]) == []


def test_streamed_weights_come_to_the_same(small, tmp_path, monkeypatch):
    from merge3 import memory

    monkeypatch.setattr(memory, "CHUNK", 256)
    monkeypatch.setattr(memory, "WINDOW", 2**14)
    base, experts = models(small)
    weights = sum(tensor.nbytes for tensor in stored(small / "base").values())
    for name in ("emr", "onebit", "byom_fft"):
        recipe = recipe_of(base, experts, name)
        expected = of_paths(recipe, tmp_path / name)
        slot = Slot(Pool.open(base, experts, memory_budget=int(2.5 * weights)))
        assert slot.pool.memory.away
        for task in ("e1", None, "e0"):
            slot.swap(recipe, task=task)
            assert same(live(slot), expected[task]) == [], (name, task)


def test_a_tied_output_follows(pair, tmp_path):
    base, experts = models(pair)
    for name in ("emr", "byom_fft"):
        recipe = recipe_of(base, experts, name)
        expected = of_paths(recipe, tmp_path / name)
        slot = Slot(Pool.open(base, experts))
        for task in ("e1", "e0", None):
            slot.swap(recipe, task=task)
            assert same(live(slot), expected[task]) == []
            assert slot.model.lm_head.weight.data_ptr() == slot.model.model.embed_tokens.weight.data_ptr()


def test_a_tied_output_that_is_held_apart_follows(pair, small, tmp_path):
    """Because another endpoint of the pool has an output of its own."""
    apart = tmp_path / "apart"
    shutil.copytree(pair / "e1", apart)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pair / "e1")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    model.save_pretrained(apart)
    base, experts = models(pair)
    for name in ("emr", "byom_fft"):
        recipe = recipe_of(base, experts, name)
        expected = of_paths(recipe, tmp_path / name)
        slot = Slot(Pool.open(base, [*experts, str(apart)]))
        for task in ("e1", "e0", None):
            slot.load(str(apart))
            slot.swap(recipe, task=task)
            found = live(slot)
            assert same({n: t for n, t in found.items() if n in expected[task]}, expected[task]) == []
            assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


@pytest.mark.parametrize("family", ["Mixtral", "GPT-2", "ViT", pytest.param("CLIP", marks=pytest.mark.heavy)])
@pytest.mark.parametrize("name", ["emr", "byom_fft", "onebit"])
def test_fused_and_renamed_tensors(family, name, tmp_path):
    import transformers

    row = FAMILIES[family]
    built = make(row, tmp_path)
    if isinstance(built, str):
        pytest.skip(f"transformers cannot build it here: {built}")
    base, experts = models(tmp_path)
    recipe = recipe_of(base, experts, name, parameters={"binary": True} if name == "onebit" else None)
    of_paths(recipe, tmp_path / "out")
    slot = Slot(Pool.open(base, [*experts, str(tmp_path / "out" / "packed")]))
    variants = Variants.open(tmp_path / "out" / "packed")
    for task in ("e1", "e0", None, "e1"):
        folder = tmp_path / "out" / ("packed" if task is None else f"from-{task}")
        loaded = getattr(transformers, row.auto).from_pretrained(folder).state_dict()
        slot.swap(recipe, task=task)
        assert [n for n, t in loaded.items() if not torch.equal(slot.model.state_dict()[n], t)] == [], task
        slot.show(variants, str(tmp_path / "out" / "packed"), task)
        assert [n for n, t in loaded.items() if not torch.equal(slot.model.state_dict()[n], t)] == [], task


def test_adapters_that_are_cut(small, tmp_path):
    for seed, name in enumerate(("math", "code")):
        with_adapter(tmp_path / name, small / "base", seed=seed, targets=("q_proj",) if seed else ("q_proj", "o_proj"))
    experts = [f"{small / 'base'}+{tmp_path / name}" for name in ("math", "code")]
    recipe = recipe_of(small / "base", experts, "byom_lora", {"rank": 3})
    expected = of_paths(recipe, tmp_path, ("math", "code"))
    assert same(expected[None], stored(small / "base")) == []
    changed = {task: set(same(expected[task], expected[None])) for task in ("math", "code")}
    assert changed["code"] < changed["math"] and all("proj" in name for name in changed["math"])
    slot = Slot(Pool.open(str(small / "base"), experts))
    for task in ("math", "code", "math", None, "code"):
        slot.swap(recipe, task=task)
        assert same(live(slot), expected[task]) == [], task


# -- heads


@pytest.fixture
def heads(tmp_path):
    """Classifiers m0 to m3, of which m3 has five labels, the others three."""
    tokenizer = make_tokenizer()
    for i, labels in enumerate((3, 3, 3, 5)):
        make_classifier(labels, seed=i, vocabulary=len(tokenizer)).save_pretrained(tmp_path / f"m{i}")
        tokenizer.save_pretrained(tmp_path / f"m{i}")
    return [str(tmp_path / f"m{i}") for i in range(4)]


@pytest.mark.parametrize("name", ["emr", "byom_fft", "onebit"])
def test_a_head_that_is_merged_is_the_tasks_own_too(heads, tmp_path, name):
    base, *experts = heads[:3]
    recipe = recipe_of(base, experts, name)
    expected = of_paths(recipe, tmp_path, ("m1", "m2"))
    slot = Slot(Pool.open(base, experts))
    for task in ("m1", "m2", None, "m1"):
        slot.use_head(experts[0])
        slot.swap(recipe, task=task)
        assert same(live(slot), expected[task]) == [], task


@pytest.mark.parametrize("name", ["emr", "byom_fft", "onebit"])
@pytest.mark.parametrize("pool", ["alone", "beside the base", "beside another head"])
def test_the_head_of_a_packed_folders_task_answers(heads, tmp_path, name, pool):
    base, *experts = heads[:3]
    of_paths(recipe_of(base, experts, name), tmp_path, ("m1", "m2"))
    packed = str(tmp_path / "packed")
    first, *others = {
        "alone": [packed],
        "beside the base": [base, packed],
        "beside another head": [heads[3], packed],
    }[pool]
    engine = LocalEngine(Pool.open(first, others))
    items = [Item(str(i), f"m{1 + i % 2}", "classify", WORDS[i], i % 3) for i in range(6)]
    (found,) = engine.evaluate(Registration(tuple(items)), [Varied(packed)])
    assert found.error is None
    for task in ("m1", "m2"):
        own = [at for at, item in enumerate(items) if item.task == task]
        alone, folder = Registration(tuple(items[at] for at in own)), str(tmp_path / f"from-{task}")
        (expected,) = LocalEngine(Pool.open(folder, [])).evaluate(alone, [folder])
        assert list(found.responses[own]) == list(expected.responses)
        engine.show(packed, task)
        exported = Llama.from_pretrained(tmp_path / f"from-{task}")
        assert same(live(engine.slot), stored(tmp_path / f"from-{task}")) == []
        ids = torch.tensor([[3, 4, 5]])
        assert torch.equal(engine.slot.model(input_ids=ids).logits, exported(input_ids=ids).logits)


def test_a_head_for_each_task(heads, tmp_path):
    """Of other numbers of labels: every task answers with its expert's, in files too."""
    base, experts = heads[0], [heads[1], heads[3]]
    recipe = recipe_of(base, experts, "emr")
    of_paths(recipe, tmp_path, ("m1", "m3"))
    for task, model in (("m1", heads[1]), ("m3", heads[3])):
        exported, expert = Llama.from_pretrained(tmp_path / f"from-{task}"), Llama.from_pretrained(model)
        assert torch.equal(exported.score.weight, expert.score.weight)
        assert exported.config.id2label == expert.config.id2label and exported.num_labels == expert.num_labels


def test_a_head_that_the_common_model_has_no_place_for(heads, tmp_path):
    """Rather than that transformers makes its weights up."""
    shutil.copytree(heads[3], tmp_path / "odd")
    tensors = stored(tmp_path / "odd")
    save_file(
        {n.replace("score.weight", "score.other"): t for n, t in tensors.items()},
        tmp_path / "odd" / "model.safetensors",
    )
    recipe = recipe_of(heads[0], [heads[1], str(tmp_path / "odd")], "byom_fft")
    for way in (
        lambda: merge_task(recipe, "odd", tmp_path / "out"),
        lambda: (merge_to_disk(recipe, tmp_path / "packed"), write_task(tmp_path / "packed", "odd", tmp_path / "out")),
    ):
        with pytest.raises(CheckpointError, match="head of 'odd' does not fit LlamaForSequenceClassification: 'score"):
            way()
    assert not (tmp_path / "out").exists()


def test_buffers_may_hold_infinities(small, tmp_path):
    """They are nobody's to merge, and every task's as they are the base's."""
    for name in ("base", "e0", "e1"):
        shutil.copytree(small / name, tmp_path / name)
        mask = {"model.layers.0.self_attn.masked_bias": torch.tensor(float("-inf"))}
        save_file(stored(tmp_path / name) | mask, tmp_path / name / "model.safetensors", {"format": "pt"})
    base, experts = models(tmp_path)
    for name in ("emr", "byom_fft"):
        expected = of_paths(recipe_of(base, experts, name), tmp_path / name)
        assert all(found["model.layers.0.self_attn.masked_bias"] == float("-inf") for found in expected.values())
