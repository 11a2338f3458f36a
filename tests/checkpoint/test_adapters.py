"""`base+adapter`: whatever training left in an adapter's names it is applied whole, or refused."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge3.checkpoint import open_checkpoint
from merge3.checkpoint.adapter import open_with_adapter
from merge3.checkpoint.layout import Ref
from merge3.errors import CheckpointError, Merge3Warning
from merge3.export import merge_to_disk
from merge3.pool import Pool
from merge3.recipe import Recipe

peft = pytest.importorskip("peft")

Q = "model.layers.0.self_attn.q_proj.weight"


def trained(base, folder, loader="AutoModelForCausalLM", **settings):
    """An adapter of random factors for the base as this class loads it. Returns what the model becomes with it."""
    import transformers

    torch.manual_seed(1)
    model = getattr(transformers, loader).from_pretrained(base)
    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | settings
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().state_dict()


def renamed(folder, rename):
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {rename(name): tensor for name, tensor in tensors.items()}
    save_file({name: t for name, t in found.items() if name}, folder / "adapter_model.safetensors")


def told(folder, file="adapter_config.json", **settings):
    found = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(found | settings))


@pytest.fixture
def own_base(family, tmp_path):
    """A copy of the base that a test may change."""
    return shutil.copytree(family / "base", tmp_path / "base")


def test_adapters_are_applied_by_peft(family, tmp_path):
    expected = trained(family / "base", tmp_path / "adapter")
    pool = Pool.open(str(family / "base"), [f"{family / 'base'}+{tmp_path / 'adapter'}"])
    found = pool.get(Ref(list(pool.endpoints)[1], Q))
    assert torch.allclose(found, expected[Q]) and not torch.equal(found, pool.get(Ref(pool.base, Q)))


WRAPPED = {
    "torch.compile": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "torch.compile of all": lambda name: f"_orig_mod.{name}",
    "FSDP": lambda name: re.sub(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module.", name),
    "checkpointing": lambda name: name.replace("self_attn.", "self_attn._checkpoint_wrapped_module."),
    "DDP": lambda name: f"module.{name}",
    "a state as it is": lambda name: name.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_wrapped_the_model_in_training_is_no_part_of_a_name(family, tmp_path, name):
    expected = trained(family / "base", tmp_path / "adapter")
    renamed(tmp_path / "adapter", WRAPPED[name])
    found = open_with_adapter(family / "base", tmp_path / "adapter")
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.get(name), tensor) for name, tensor in expected.items())


@pytest.mark.filterwarnings("error:Found missing adapter keys")
def test_adapters_of_the_model_without_its_head_and_the_other_way(family, tmp_path):
    from transformers import AutoModel

    AutoModel.from_pretrained(family / "base").save_pretrained(tmp_path / "headless")
    with_head = trained(family / "base", tmp_path / "with head")
    expected = trained(family / "base", tmp_path / "without", "AutoModel")
    found = open_with_adapter(family / "base", tmp_path / "without")
    assert torch.equal(found.get(Q), expected[Q.removeprefix("model.")])
    found = open_with_adapter(tmp_path / "headless", tmp_path / "with head")
    assert torch.equal(found.get(Q.removeprefix("model.")), with_head[Q])


def dropped(pattern):
    return lambda folder: renamed(folder, lambda name: "" if re.search(pattern, name) else name)


UNFIT = {
    "of another layer": (
        lambda f: renamed(f, lambda name: name.replace("layers.3", "layers.7")),
        "no place for its tensor '.*layers.7.*' and 1 more; expected an adapter of LlamaForCausalLM",
    ),
    "with a tensor too many": (
        lambda f: renamed(f, lambda name: name.replace("layers.3.self_attn.q_proj.lora_A", "extra")),
        "no place for its tensor '.*extra.weight'; expected",
    ),
    "without a factor": (dropped(r"layers\.2.*lora_B"), r"no tensor '.*layers\.2.*lora_B.*'; expected"),
    "without a layer": (dropped(r"layers\.2"), r"no tensor '.*layers\.2.*' and 1 more; expected"),
    "of the same tensor twice": (
        lambda f: renamed(f, lambda name: name.replace("layers.1.self_attn", "_orig_mod.layers.0.self_attn")),
        "are the same tensor of the model; expected one of them",
    ),
    "of a base that data changed": (
        lambda f: told(f, init_lora_weights="lora_ga"),
        "init_lora_weights 'lora_ga', which changed the base .*path_initial_model_for_weight_conversion",
    ),
    "of a base that random numbers changed": (
        lambda f: told(f, init_lora_weights="pissa_niter_16"),
        "init_lora_weights 'pissa_niter_16', which changed the base",
    ),
    "with a pattern that is none": (lambda f: told(f, alpha_pattern={"q_(": 3}), r"does not fit .* \(missing \)"),
    "cut short": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        "truncated",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_adapters_that_do_not_attach_whole_are_refused(family, tmp_path, name):
    trained(family / "base", tmp_path / "adapter")
    change, pattern = UNFIT[name]
    change(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=pattern) as found:
        open_with_adapter(family / "base", tmp_path / "adapter")
    assert "adapter" in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_base_that_an_adapters_start_changed_is_made_again(family, tmp_path, start):
    expected = trained(family / "base", tmp_path / "adapter", init_lora_weights=start)
    found = open_with_adapter(family / "base", tmp_path / "adapter")
    assert torch.equal(found.get(Q), expected[Q])


def test_a_head_that_the_base_has_not_is_refused(family, tmp_path):
    trained(family / "base", tmp_path / "adapter", "AutoModelForSequenceClassification", task_type="SEQ_CLS")
    with pytest.raises(CheckpointError, match=r"no place for its tensor '.*score.*adapter of LlamaForCausalLM"):
        open_with_adapter(family / "base", tmp_path / "adapter")


def test_prompts_are_no_change_of_weights(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family / "base")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "prompts")
    with pytest.raises(CheckpointError, match="peft_type 'PROMPT_TUNING', which changes prompts; expected"):
        open_with_adapter(family / "base", tmp_path / "prompts")


# -- the base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_read_in_the_dtype_they_are_stored_in(own_base, tmp_path, dtype):
    trained(own_base, tmp_path / "adapter")
    stored = {name: tensor.to(dtype) for name, tensor in load_file(own_base / "model.safetensors").items()}
    stored["model.norm.weight"][:2] = torch.tensor([1e6, 1 + 2**-7])  # float16 ends at 65,504
    save_file(stored, own_base / "model.safetensors", metadata={"format": "pt"})
    told(own_base, "config.json", dtype="float16")
    found = open_with_adapter(own_base, tmp_path / "adapter")
    assert {info.dtype for info in found.tensors.values()} == {dtype}
    for name, tensor in stored.items():
        assert torch.equal(found.get(name), tensor) == ("q_proj" not in name)


def test_weights_of_several_dtypes_stay_as_they_are(own_base, tmp_path):
    trained(own_base, tmp_path / "adapter")
    stored = load_file(own_base / "model.safetensors")
    stored = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in stored.items()}
    stored["model.norm.weight"][0] = 1 + 2**-20
    save_file(stored, own_base / "model.safetensors", metadata={"format": "pt"})
    told(own_base, "config.json", dtype="bfloat16")
    found = open_with_adapter(own_base, tmp_path / "adapter")
    for name, tensor in stored.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.get(name), tensor) == ("q_proj" not in name)


def test_a_base_that_is_not_whole_is_refused(own_base, tmp_path):
    trained(own_base, tmp_path / "adapter")
    stored = load_file(own_base / "model.safetensors")
    del stored["model.layers.2.mlp.up_proj.weight"]
    save_file(stored, own_base / "model.safetensors", metadata={"format": "pt"})
    expected = "no tensor 'model.layers.2.mlp.up_proj.weight' .one of 1., and numbers would be made up"
    with pytest.raises(CheckpointError, match=expected):
        open_with_adapter(own_base, tmp_path / "adapter")


def test_an_index_and_another_file_beside(family, tmp_path):
    """The index's files are read, also beneath an adapter, and somebody is told: transformers would read the other."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(family / "base").save_pretrained(tmp_path / "base", max_shard_size="60KB")
    expected = trained(tmp_path / "base", tmp_path / "adapter")
    base = str(tmp_path / "base")
    assert not Pool.open(base, [f"{base}+{tmp_path / 'adapter'}"]).warnings
    shutil.copyfile(family / "e0" / "model.safetensors", tmp_path / "base" / "model.safetensors")
    pool = Pool.open(base, [f"{base}+{tmp_path / 'adapter'}"])
    (line,) = pool.warnings
    assert line.startswith(f"{base}: model.safetensors.index.json and model.safetensors, which it does not name")
    first = open_checkpoint(family / "base")
    for name in first.tensors:
        assert torch.equal(pool.get(Ref(base, name)), first.get(name))
        assert torch.equal(pool.get(Ref(list(pool.endpoints)[1], name)), expected[name])
    recipe = Recipe.parse({"merge_method": "linear", "models": [{"model": base, "parameters": {"weight": 1}}]})
    with pytest.warns(Merge3Warning, match="which it does not name"):
        merge_to_disk(recipe, tmp_path / "out")


def test_an_index_that_names_the_file_beside_is_nothing_to_be_told(own_base):
    names = open_checkpoint(own_base).tensors
    index = {"weight_map": {name: "model.safetensors" for name in names}}
    (own_base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(own_base).warnings == ()


def test_what_belongs_to_the_base_lies_beside(own_base, tmp_path):
    from merge3.world.tokenizer import make_tokenizer

    trained(own_base, tmp_path / "adapter")
    make_tokenizer().save_pretrained(own_base)
    own = {"generation_config.json": '{"temperature": 0.6, "eos_token_id": [2, 5]}', "preprocessor_config.json": "{}"}
    for name, text in own.items():
        (own_base / name).write_text(text)
    found = open_with_adapter(own_base, tmp_path / "adapter")
    assert {name: (found.path / name).read_text() for name in own} == own
    assert (found.path / "tokenizer.json").read_bytes() == (own_base / "tokenizer.json").read_bytes()
