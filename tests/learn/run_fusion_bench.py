"""Runs parts of fusion_bench: python run_fusion_bench.py IN OUT, both torch files.

Packages are entered without their __init__, which would ask for all that fusion_bench needs elsewhere.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import TypeVar

import torch

ROOT = Path(importlib.util.find_spec("fusion_bench").submodule_search_locations[0])


def part(module):
    """A module of fusion_bench, its packages empty but for their place."""
    names = module.split(".")
    for end in range(1, len(names)):
        package = ".".join(names[:end])
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(ROOT.joinpath(*names[1:end]))]
    return importlib.import_module(module)


def adamerging(asked):
    """Weights [experts, parameters] and losses of layer-wise AdaMerging over given batches."""
    from transformers import AutoModelForSequenceClassification

    fusion = part("fusion_bench.models.wrappers.layer_wise_fusion")
    entropy_loss = part("fusion_bench.method.adamerging.entropy_loss").entropy_loss
    load = AutoModelForSequenceClassification.from_pretrained
    base, *experts = [load(folder).eval() for folder in asked["models"]]
    names = [name for name, _ in base.named_parameters()]
    weights = fusion.get_layer_wise_weights(len(experts), len(names), 0.3)
    model = fusion.LayerWiseMergedModel(weights, base, experts, clamp_weights=True, strict=False)
    optimizer = torch.optim.Adam([model.merge_weight], lr=asked["learning_rate"])
    losses = []
    for step in asked["batches"]:
        model.merge_weights()
        loss = sum(entropy_loss(model(input_ids=ids).logits) for ids in step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"names": names, "weights": model.merge_weight.detach(), "losses": losses}


def ties(asked):
    """What AdaMerging++ keeps of flat task vectors [experts, all], case by case."""
    split = part("fusion_bench.method.ties_merging.ties_merging_utils").ties_merging_split
    return [split(vectors, reset_thresh=share, merge_func="dis-sum")[0] for vectors, share in asked["cases"]]


def surgery(asked):
    """Adapters and features of Surgery's own wrapper, trained on given features [items, width] and batches."""
    from transformers.models.clip import modeling_clip

    if not hasattr(modeling_clip, "CLIPVisionTransformer"):  # named for a type that is not used here
        modeling_clip.CLIPVisionTransformer = torch.nn.Module
    Wrapper = part("fusion_bench.models.surgery.surgerymodelwrapper").SurgeryModelWrapper
    tasks, (rank, width) = list(asked["down"]), next(iter(asked["down"].values())).shape
    model = Wrapper(torch.nn.Identity(), tasks, projection_dim=width, hidden_dim=rank)
    side = lambda name: {task: model.get_submodule(f"feature_mapping_to_head_{name}_proj_{task}") for task in tasks}
    down, up = side("down"), side("up")
    for task in tasks:
        assert not up[task].weight.any()  # it begins as ours does
        down[task].weight.data.copy_(asked["down"][task])
    optimizer = torch.optim.Adam(model.collect_trainable_params(), lr=asked["learning_rate"])
    for step in asked["batches"]:
        optimizer.zero_grad()
        for task, chosen in step.items():
            found, _, _ = model.compute_surgery_features(asked["merged"][task][chosen], task)
            torch.nn.functional.l1_loss(found, asked["expert"][task][chosen]).backward()
        optimizer.step()
    features = {task: model.compute_surgery_features(asked["merged"][task], task)[0].detach() for task in tasks}
    weights = {task: (down[task].weight.detach(), up[task].weight.detach()) for task in tasks}
    return {"features": features, "weights": weights}


def emr(asked):
    """What emr_merge makes of task vectors, each a dictionary of tensors: the unified one, masks and scales."""
    root = sys.modules.setdefault("fusion_bench", types.ModuleType("fusion_bench"))
    root.__path__, root.StateDictType, root.TorchModelType = [str(ROOT)], dict, TypeVar("TorchModelType")  # types alone
    merge = part("fusion_bench.method.emr_merging.utils").emr_merge
    unified, masks, rescales = merge(asked["vectors"])
    return {"unified": unified, "masks": masks, "rescales": rescales}


if __name__ == "__main__":
    given = torch.load(sys.argv[1])
    torch.save(
        {"adamerging": adamerging, "emr": emr, "surgery": surgery, "ties": ties}[given["what"]](given), sys.argv[2]
    )
