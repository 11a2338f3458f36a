"""Recipes of methods with a result per task, and what became of them, as tests of several files need it."""

import torch
from safetensors.torch import load_file, save_file

from merge3 import Recipe

METHODS = {
    "emr": {},
    "emr by the code": {"rescale": "code"},
    "onebit": {"binary": [{"filter": "mlp", "value": True}, {"value": False}]},
    "onebit of all": {},
    "byom_fft": {"share": 0.05, "merger": "ties", "weight": 0.5, "density": 0.4},
    "byom_fft of most": {"share": 0.7},
}


def recipe_of(base, models, name="emr", parameters=None, **more):
    """name: a method, or one of METHODS with its parameters. more: other keys of the recipe."""
    data = {"merge_method": name.split()[0], "base_model": str(base), "models": [{"model": str(m)} for m in models]}
    return Recipe.parse(data | {"parameters": parameters or METHODS.get(name, {})} | more)


def stored(folder):
    """The tensors of a checkpoint, whatever its shards."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def with_adapter(folder, base, rank=6, seed=0, targets=("q_proj", "down_proj"), alpha=12.0, **settings):
    """A peft adapter of random factors for the base's matrices of these names. Returns its factors by tensor."""
    import json

    rng, tensors, factors = torch.Generator().manual_seed(seed), {}, {}
    for name, tensor in stored(base).items():
        if tensor.dim() == 2 and any(target in name for target in targets):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            a = torch.randn(rank, tensor.shape[1], generator=rng) * 0.1
            b = torch.randn(tensor.shape[0], rank, generator=rng) * 0.1
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            factors[name] = b, a, alpha / rank
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(targets)} | settings
    told |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return factors


def live(slot):
    """The live model's weights, by the names they are stored under; of a head the one that is shown."""
    return {name: parameter.detach().clone() for name, parameter in slot.model.named_parameters()}


def same(found, expected):
    """Names of tensors that are not equal to the last bit, of those in both."""
    assert set(found) <= set(expected) or set(expected) <= set(found)
    names = [name for name in expected if name in found]
    assert names
    return [n for n in names if found[n].dtype != expected[n].dtype or not torch.equal(found[n], expected[n])]
