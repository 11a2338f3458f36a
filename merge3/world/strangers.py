"""Two small image models that share no ancestor: each trained here from an initialisation of its own on five digits.

Both answer with the same head, ten fixed directions that are never trained, one for each digit, as text encoders give
them to a CLIP; so either can be asked for any of the ten, and knows its own five alone. A merge of the two is asked for
all ten. Of each family of architectures there is one such pair.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

SIDE, LABELS = 8, 10
SHARPNESS = 2.0  # length of a head's rows: sharper ones make models surer of themselves than merges survive
TASKS = {"low": (0, 1, 2, 3, 4), "high": (5, 6, 7, 8, 9)}
STEPS, BATCH, RATE = 150, 64, 2e-3
ITEMS = 900  # images that neither model is trained on, of all ten digits


def make_strangers(
    folder: Path,
    family: str = "resnet",
    seed: int = 0,
    steps: int = STEPS,
    items: int = ITEMS,
    progress: Callable[[str, int, int], None] = lambda what, step, steps: None,
) -> None:
    """Save folder/low and folder/high, and the images that neither has learned: folder/low.jsonl, folder/high.jsonl.
    family: of MODELS. progress(what, step, steps)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    ink, digits = (found.images / 16).astype(np.float32), found.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(digits))
    learned, asked = order[items:], order[:items]
    build, scale = MODELS[family]
    shown = np.kron(2 * ink - 1, np.ones((scale, scale), dtype=np.float32))[:, None]
    torch.manual_seed(seed)
    heads = None
    for task, own in TASKS.items():
        model = build()
        head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
        if heads is None:
            heads = SHARPNESS * torch.nn.functional.normalize(torch.randn(LABELS, head.in_features), dim=-1)
        with torch.no_grad():
            head.weight.copy_(heads)
            head.bias.zero_()
        head.requires_grad_(False)
        mine = learned[np.isin(digits[learned], own)]
        _train(model, torch.from_numpy(shown[mine]), torch.from_numpy(digits[mine]), own, steps,
               lambda step, task=task: progress(task, step, steps))  # fmt: skip
        model.config.id2label = {digit: f"digit-{digit}" for digit in range(LABELS)}
        model.config.label2id = {label: digit for digit, label in model.config.id2label.items()}
        model.save_pretrained(folder / task)
        _write_items(folder, task, shown, digits, [n for n in asked.tolist() if digits[n] in own])


def _write_items(folder: Path, task: str, shown: np.ndarray, digits: np.ndarray, numbers: list[int]) -> None:
    (folder / "images").mkdir(exist_ok=True)
    lines = []
    for number in numbers:
        np.save(folder / "images" / f"{number}.npy", shown[number])
        lines.append({"id": str(number), "task": task, "kind": "classify", "image": f"images/{number}.npy",
                      "answer": f"digit-{digits[number]}"})  # fmt: skip
    (folder / f"{task}.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")


def _train(model, shown: torch.Tensor, digits: torch.Tensor, own, steps: int, progress) -> None:
    """AdamW on all but the head; cross-entropy over the model's own five digits."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.05)
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: min(1.0, (at + 1) / 20) * (1 - at / (steps + 1)))
    for step in range(steps):
        drawn = torch.randint(len(shown), (BATCH,))
        logits = model(pixel_values=shown[drawn]).logits[:, list(own)]
        torch.nn.functional.cross_entropy(logits, digits[drawn] - own[0]).backward()
        optimizer.step()
        plan.step()
        optimizer.zero_grad()
        progress(step + 1)
    model.eval()


def _resnet():
    """Three blocks of two convolutions, each with a shortcut of its own but for the first. Wide, since narrow models of
    different initialisations have few units that do the same."""
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 64, "hidden_sizes": [64, 128, 256], "depths": [1, 1, 1]}
    return ResNetForImageClassification(ResNetConfig(num_channels=1, layer_type="basic", num_labels=LABELS, **sizes))


def _vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = ViTConfig(image_size=SIDE, num_channels=1, patch_size=2, num_labels=LABELS, **sizes)
    return ViTForImageClassification(config)


# What builds a model, and how many pixels it is shown for each of an image's.
MODELS: dict[str, tuple[Callable, int]] = {"resnet": (_resnet, 2), "vit": (_vit, 1)}
