"""A language model merged into a vision-language model's language tower: the map, the live model, the file."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge3 import LocalEngine, Pool, Recipe, Registration, SpaceDefinition, merge_to_disk, read_items
from merge3.checkpoint import open_checkpoint
from merge3.checkpoint.layout import Ref, layout
from merge3.checkpoint.towers import find_tower
from merge3.errors import CheckpointError, RecipeError
from merge3.live.slot import Slot
from tests.commands import client
from tests.vlms import TEXT, WORDS, llava, make_sights, qwen
from tests.worlds import shared

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
FEW = len(WORDS) - 1


@pytest.fixture(scope="module")
def sights():
    yield from shared(make_sights)


@pytest.fixture(scope="module")
def pool(sights):
    return Pool.open(str(sights / "base"), [str(sights / "seeing"), str(sights / "words")])


def recipe_of(folder, method="task_arithmetic", weights=(0.5, 0.7), **more):
    models = [{"model": str(folder / name), "parameters": {"weight": weight}}
              for name, weight in zip(("seeing", "words"), weights)]  # fmt: skip
    return Recipe.parse({"merge_method": method, "base_model": str(folder / "base"), "models": models} | more)


def shapes(folder):
    return {name: info.shape for name, info in open_checkpoint(folder).tensors.items()}


def test_the_main_stack_is_the_language_model_however_deep_the_eyes_are(sights):
    names = shapes(sights / "base")
    assert sum(n.startswith("vision_tower.encoder.layers.") for n in names) > sum(".model.layers." in n for n in names)
    assert layout(names).prefix == "language_model.model.layers"
    eyes = [n for n in names if n.startswith("vision_tower.")]
    assert layout(eyes).prefix == "vision_tower.encoder.layers"  # of eyes alone there is nothing else


def test_a_map_is_found_by_name_and_shape_and_shown(pool, sights):
    tower = pool.towers[str(sights / "words")]
    assert tower.prefixes == {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    assert list(pool.towers) == [str(sights / "words")]
    first, *rows = pool.notes
    assert "model. -> language_model.model., lm_head. -> language_model.lm_head. (21 of 21 tensors fit)" in first
    assert "mergekit has no such merge" in first
    assert [line.split(": ", 1)[1].split(" in ")[0] for line in rows] == [
        f"{HEAD} has {FEW} rows, {FEW + 1}", f"{EMBEDDING} has {FEW} rows, {FEW + 1}"]  # fmt: skip
    beside = {name: reason for name, reason in pool.kept.items() if "beside the language tower" in reason}
    names = pool.base_checkpoint.tensors
    assert set(beside) == {n for n in names if not n.startswith("language_model.")} == set(pool.kept)
    assert not pool.warnings


@pytest.mark.parametrize("newer", [False, True])
def test_families_that_keep_their_language_models_names(tmp_path, newer):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    qwen(newer).save_pretrained(tmp_path / "base")
    words = Qwen2ForCausalLM(Qwen2Config(vocab_size=35, num_key_value_heads=1, **TEXT))
    words.save_pretrained(tmp_path / "words")
    pool = Pool.open(str(tmp_path / "base"), [str(tmp_path / "words")])
    assert pool.towers[str(tmp_path / "words")].prefixes == {"model.": "model.", "lm_head.": "lm_head."}
    assert "has 35 rows, 32 in" in pool.notes[1] and pool.notes[1].endswith("the others are left out")
    recipe = recipe_of(tmp_path)
    models = [source for source in recipe.to_dict()["models"] if source["model"].endswith("words")]
    assert_searched_is_exported(pool, Recipe.parse(recipe.to_dict() | {"models": models}), tmp_path / "out")


def test_newer_names(sights, tmp_path):
    """As somebody saves today's state_dict: model.language_model. and the head outside."""
    own = shapes(sights / "words")
    base = {n.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head"): s
            for n, s in shapes(sights / "base").items()}  # fmt: skip
    tower = find_tower("words", own, "base", base, {})
    assert tower.prefixes == {"model.": "model.language_model.", "lm_head.": "lm_head."} and tower.fitting == 21
    backbone = {n.removeprefix("model."): s for n, s in own.items() if n.startswith("model.")}
    assert find_tower("words", backbone, "base", base, {}).prefixes == {"": "model.language_model."}
    untied = {n: s for n, s in base.items() if n != "lm_head.weight"}
    assert find_tower("words", own, "base", untied, {}).name("lm_head.weight") == "lm_head.weight"
    older = {n: s for n, s in shapes(sights / "base").items() if n != HEAD}
    assert find_tower("words", own, "base", older, {}).name("lm_head.weight") == HEAD
    assert find_tower("words", own, "other", own, {}) is None and find_tower("base", base, "words", own, {}) is None


def assert_searched_is_exported(pool, recipe, out, slot=None):
    import transformers

    slot = slot or Slot(pool)
    slot.swap(recipe)
    found = merge_to_disk(recipe, out, pool)
    architecture = pool.base_checkpoint.config["architectures"][0]
    exported, told = getattr(transformers, architecture).from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, slot.model.state_dict()[name]), name
    assert json.loads((out / "config.json").read_text()) == pool.base_checkpoint.config
    return found


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear", "dare_ties"])
def test_what_is_searched_is_exported_as_a_model_with_eyes(pool, sights, tmp_path, method):
    recipe = recipe_of(sights, method)
    if method == "linear":  # the base is one of the models there, with a weight
        data = recipe.to_dict()
        whole = {"model": data["base_model"], "parameters": {"weight": 1.0}}
        recipe = Recipe.parse(data | {"models": [whole, *data["models"]]})
    assert_searched_is_exported(pool, recipe, tmp_path / "out")
    base, words, out = (open_checkpoint(p) for p in (sights / "base", sights / "words", tmp_path / "out"))
    for name, info in base.tensors.items():
        if not name.startswith("language_model."):
            assert torch.equal(out.get(name), base.get(name)), name
        assert out.tensors[name].shape == info.shape
    for name in (EMBEDDING, HEAD):
        assert torch.equal(out.get(name)[FEW:], base.get(name)[FEW:])
        assert not torch.equal(out.get(name)[:FEW], base.get(name)[:FEW])
    if method == "task_arithmetic":
        seeing = open_checkpoint(sights / "seeing")
        for name, own in ((EMBEDDING, "model.embed_tokens.weight"), (HEAD, "lm_head.weight")):
            start = base.get(name)[:FEW]
            expected = start + 0.5 * (seeing.get(name)[:FEW] - start) + 0.7 * (words.get(own) - start)
            assert torch.allclose(out.get(name)[:FEW], expected, atol=1e-6)


def test_without_a_base_there_is_nowhere_to_keep_the_eyes_from(pool, sights, tmp_path):
    recipe = Recipe.parse({"merge_method": "linear", "models": recipe_of(sights).to_dict()["models"]})
    with pytest.raises(RecipeError, match="tensor 'vision_tower.*': not in .*words; .* a base_model to keep it from"):
        merge_to_disk(recipe, tmp_path / "out", pool)
    assert not (tmp_path / "out").exists()


def test_a_swap_leaves_nothing_of_the_one_before(sights):
    """A merge of language models alone has no eyes to write: those of the last candidate are not its own."""
    both = [str(sights / name) for name in ("words", "seeing")]
    slot = Slot(Pool.open(str(sights / "base"), both))
    slot.load(str(sights / "seeing"))
    alone = Recipe.parse({"merge_method": "linear", "models": [{"model": both[0], "parameters": {"weight": 1.0}}]})
    with pytest.raises(RecipeError, match="tensor '.*' is in none of its models; expected a base_model that has it"):
        slot.swap(alone)


def test_eyes_are_checked_wherever_a_language_model_stands(sights, tmp_path):
    """That they stay the base's beside a language model says nothing of merges without one."""
    broken = shutil.copytree(sights / "seeing", tmp_path / "seeing")
    file = broken / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in sorted(tensors) if n.startswith("vision_tower.") and n.endswith(".weight"))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file)
    for experts in (("words", broken), (broken, "words")):
        pool = Pool.open(str(sights / "base"), [str(sights / expert) for expert in experts])
        with pytest.raises(CheckpointError, match=f"NaN or infinity in tensor '{name}'"):
            pool.read_all()


def test_a_budget_changes_nothing(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    wide = dict(hidden_size=256, intermediate_size=512, vocab_size=700)
    llava(**wide).save_pretrained(tmp_path / "base")
    LlamaForCausalLM(LlamaConfig(**(TEXT | wide | {"vocab_size": 650}))).save_pretrained(tmp_path / "words")
    base, words = str(tmp_path / "base"), str(tmp_path / "words")
    models = [{"model": words, "parameters": {"weight": 0.5, "density": 0.5}}]
    recipe = Recipe.parse({"merge_method": "ties", "base_model": base, "models": models})
    found = []
    for budget in (None, "12MiB"):
        pool = Pool.open(base, [words], memory_budget=budget)
        slot = Slot(pool)
        slot.swap(recipe)
        found.append({name: p.clone() for name, p in slot.model.state_dict().items()})
    assert not pool.resident([Ref(words, HEAD, (0, 650))]) and pool.shape(Ref(words, HEAD, (0, 650))) == (650, 256)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert torch.equal(found[0]["lm_head.weight"][650:], pool.get(Ref(base, HEAD))[650:])


def test_a_language_model_as_it_is_has_the_bases_eyes_and_words(pool, sights):
    slot = Slot(pool)
    base, words = open_checkpoint(sights / "base"), open_checkpoint(sights / "words")
    live, eyes = slot.model, base.get("multi_modal_projector.linear_1.weight")
    slot.load(str(sights / "seeing"))
    assert not torch.equal(live.model.multi_modal_projector.linear_1.weight, eyes)
    slot.load(str(sights / "words"))
    assert torch.equal(live.model.multi_modal_projector.linear_1.weight, eyes)
    assert torch.equal(live.lm_head.weight[:FEW], words.get("lm_head.weight"))
    assert torch.equal(live.lm_head.weight[FEW:], base.get(HEAD)[FEW:])


def test_a_space_has_no_values_for_what_stays_as_it_is(pool, sights):
    engine = LocalEngine(pool)
    assert engine.info().layout.post == (HEAD, "language_model.model.norm.weight")
    models = tuple(str(sights / name) for name in ("seeing", "words"))
    definition = SpaceDefinition(models, "ties", str(sights / "base"), allow_negative_weights=False)
    space = engine.space(definition)
    recipe = space.recipe(space.initial())
    assert "vision_tower" not in recipe.to_yaml() and "tower" not in recipe.to_dict()
    assert (space.genome(recipe) == space.initial()).all()
    items = tuple(read_items(sights / "items.jsonl"))
    (by_genome,) = engine.evaluate(Registration(items, definition), [space.initial()])
    (by_recipe,) = engine.evaluate(Registration(items), [recipe])
    assert by_genome.answers().tolist() == by_recipe.answers().tolist()


def test_a_map_that_is_given(sights, tmp_path):
    """Names that no rule finds: the language model goes where it is told, and the recipe says so."""
    from safetensors.torch import load_file, save_file

    odd = shutil.copytree(sights / "words", tmp_path / "odd")
    tensors = load_file(odd / "model.safetensors")
    place = lambda name: name.replace("model.layers.", "blocks.") if "layers" in name else f"outer.{name}"
    save_file({place(name): tensor for name, tensor in tensors.items()}, odd / "model.safetensors")
    given = {"blocks.": "language_model.model.layers.", "outer.": "language_model."}
    base = str(sights / "base")
    with pytest.raises(CheckpointError, match="`tower` in the recipe, --tower FROM=TO"):
        Pool.open(base, [str(odd)])
    models = [{"model": str(odd), "parameters": {"weight": 1.0}}]
    plain = Recipe.parse({"merge_method": "task_arithmetic", "base_model": base, "models": models})
    told = Recipe.parse(plain.to_dict() | {"tower": given})
    pool = Pool.open(base, [str(odd)], tower=given)
    assert "blocks. -> language_model.model.layers., outer. -> language_model. (21 of 21" in pool.notes[0]
    assert told.to_dict()["tower"] == given and Recipe.parse(told.to_dict()) == told and told.hash() != plain.hash()
    assert_searched_is_exported(pool, told, tmp_path / "out")
    assert Recipe.from_yaml(tmp_path / "out" / "mergekit_config.yml") == told
    with pytest.raises(RecipeError, match="recipe: tower: found none; expected .*with which the models were opened"):
        Slot(pool).swap(plain)
    space = SpaceDefinition((str(odd),), "task_arithmetic", base, tower=given)
    assert LocalEngine(pool).space(space).uniform_recipe().tower == given
    (tmp_path / "plain.yaml").write_text(plain.to_yaml())
    flags = [part for own, other in given.items() for part in ("--tower", f"{own}={other}")]
    done = client("merge", str(tmp_path / "plain.yaml"), str(tmp_path / "again"), *flags)
    assert done.returncode == 0, done.stderr
    assert "blocks. -> language_model.model.layers." in done.stdout
    whole = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert whole[0] == whole[1]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"wrong.": "x."}, "no tensor begins with 'wrong.', which `tower` gives a place"),
        ({"model.": "nowhere."}, "none of its tensors fits: 'lm_head.weight' would be 'lm_head.weight', and"),
        ({"model.layers.0": "a", "model.layers.1": "a"}, "would both be 'a"),
    ],
)
def test_a_given_map_that_cannot_be_is_one_line(sights, given, message):
    with pytest.raises(CheckpointError, match=message) as error:
        Pool.open(str(sights / "base"), [str(sights / "words")], tower=given)
    assert "\n" not in str(error.value)


def test_a_given_map_that_nothing_uses_is_refused(family):
    with pytest.raises(CheckpointError, match="tower"):
        Pool.open(str(family / "base"), [str(family / "e0")], tower={"x.": "y."})


def test_a_language_model_that_does_not_fit_is_refused_before_anything_else(sights, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaConfig(vocab_size=FEW, **(TEXT | {"hidden_size": 24, "intermediate_size": 40}))
    LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"none of its tensors fits: .* is \[13, 24\], .* \[14, 16\]") as error:
        Pool.open(str(sights / "base"), [str(tmp_path / "wide")])
    assert "\n" not in str(error.value)
    narrow = LlamaConfig(vocab_size=FEW, **(TEXT | {"intermediate_size": 40}))
    LlamaForCausalLM(narrow).save_pretrained(tmp_path / "narrow")
    with pytest.raises(CheckpointError, match="mlp.* of shape"):  # some fit: the one that does not is named
        Pool.open(str(sights / "base"), [str(tmp_path / "narrow")])


def test_a_model_with_eyes_does_not_go_into_one_without(sights):
    with pytest.raises(CheckpointError, match="is not in the base|no tensor") as error:
        Pool.open(str(sights / "words"), [str(sights / "base")])
    assert "\n" not in str(error.value)
