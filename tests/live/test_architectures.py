"""Every family merged to disk and in the slot: nothing is dropped in silence, and both are the same model."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merge3 import Pool, Recipe, Slot, merge_to_disk
from tests.families import FAMILIES, make, outputs, walked

ROOT = Path(__file__).parents[2]
# What is kept from the base, where anything is.
KEPT = {"ResNet": (r"\.num_batches_tracked$", "int64 buffer")}
METHODS = {"task_arithmetic": {"weight": 0.5}, "ties": {"weight": 0.5, "density": 0.5}}


def summed(base, experts):
    """Task arithmetic as its formula says."""
    return base + sum(0.5 * (expert - base) for expert in experts)


def elected(base, experts):
    """TIES as its paper says: the largest half of each task vector, the sign with more weight, the mean of its like."""
    trimmed = []
    for expert in experts:
        change = (expert - base).flatten()
        mask = torch.zeros_like(change)
        mask[change.abs().topk(max(1, change.numel() // 2)).indices] = 1
        trimmed.append((change * mask).reshape(base.shape))
    stacked = 0.5 * torch.stack(trimmed)
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agrees = (stacked.sign() == sign).float()
    return base + (stacked * agrees).sum(0) / (0.5 * agrees.sum(0)).clamp(min=0.5)


PLAIN = {"task_arithmetic": summed, "ties": elected}


@pytest.mark.parametrize("name", walked())
def test_merged_swapped_and_loaded_again(name, tmp_path):
    family = FAMILIES[name]
    built = make(family, tmp_path)
    if isinstance(built, str):
        pytest.skip(f"transformers cannot build it here: {built}")
    base, *experts = (str(tmp_path / model) for model in ("base", "e0", "e1"))
    stored = [load_file(Path(model) / "model.safetensors") for model in (base, *experts)]
    slot = Slot(Pool.open(base, experts))
    assert slot.pool.warnings == [] and slot.pool.layouts[base].prefix == family.main
    answers = {"base": outputs(slot.model, family)}
    for method, parameters in METHODS.items():
        models = [{"model": model} for model in experts]
        recipe = {"merge_method": method, "base_model": base, "models": models, "parameters": parameters}
        recipe = Recipe.parse(recipe)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            done = merge_to_disk(recipe, tmp_path / method)
        # Every tensor is merged, or kept with its reason.
        assert done["left_out"] == {} and slot.swap(recipe) == done["kept"]
        pattern, reason = KEPT.get(name, ("^$", ""))
        assert done["kept"] == {tensor: reason for tensor in stored[0] if re.search(pattern, tensor)}
        found = load_file(tmp_path / method / "model.safetensors")
        assert found.keys() == stored[0].keys()
        for tensor, merged in found.items():
            own = [tensors[tensor] for tensors in stored]
            expected = own[0] if tensor in done["kept"] else PLAIN[method](own[0], own[1:])
            assert torch.allclose(merged, expected, rtol=1e-5, atol=1e-6), tensor
        same_model(slot.model, family, tmp_path / method)
        answers[method] = outputs(slot.model, family)
    for method in METHODS:  # a swap that wrote nothing would be noticed
        assert any(not torch.equal(answers[method][key], value) for key, value in answers["base"].items())
    slot.load(experts[0])
    same_model(slot.model, family, Path(experts[0]))


def same_model(live, family, folder):
    """The live model is, to the last bit, what transformers loads from a folder, with nothing missing or left over."""
    import transformers

    loaded, said = getattr(transformers, family.auto).from_pretrained(folder, output_loading_info=True)
    assert type(loaded).__name__ == type(live).__name__ == family.model
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    weights = live.state_dict()
    for tensor, value in loaded.state_dict().items():
        assert torch.equal(weights[tensor], value), tensor
    found, expected = outputs(live, family), outputs(loaded.eval(), family)
    assert found.keys() == expected.keys() and expected
    for key, value in expected.items():  # sums over experts are taken in no fixed order
        assert value.isfinite().all() and torch.allclose(found[key], value, rtol=1e-5, atol=1e-6), key


# -- the page


def test_the_page_has_a_row_for_every_family():
    text = (ROOT / "docs" / "architectures.md").read_text()
    table = re.search(r"^\| family \|.*?\n\n", text, re.M | re.S)[0].strip()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert {row[0]: row[1:] for row in rows} == {
        name: [f"`{f.model}`", f"`{f.main}`", ", ".join(f"`{kind}`" for kind in f.asks) or "none", f.note]
        for name, f in FAMILIES.items()
    }
