"""Worlds for benchmarks/study.py: digits under twelve transforms, small vision transformers of several widths, bases
that know little or much.

One head, ten fixed directions that are never trained, answers every task, so what a model has learned of one transform
can help with another. A base sees 150 digits under all twelve, briefly (weak) or long (strong); experts see 450 under
their own, and are trained gently: tuned harder they do not merge. Four tasks are no expert's: they tell how a merge
does on what it was not made for.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from merge3.world.digits import LABELS, SIDE, TASKS, pixels, split

WIDTHS = (32, 64, 128)
QUALITIES = {"weak": 300, "strong": 900}  # steps of a base's training
RATES = {"base": 1e-3, "expert": 1e-4}
BATCHES = {"base": 8, "expert": 32}  # images of every task in a step
EXPERT_STEPS, SEEN, LEARNED, ITEMS = 100, 150, 450, 250  # images that bases are trained on, experts, and that are asked
# Tasks of no expert: two transforms one after the other.
HELDOUT = {
    "mirrored-inverted": ("mirrored", "inverted"),
    "rotated-halved": ("rotated", "halved"),
    "halved-mirrored": ("halved", "mirrored"),
    "inverted-rotated": ("inverted", "rotated"),
}


def make_width(
    folder: Path,
    width: int = 64,
    quality: str = "strong",
    seed: int = 0,
    base_steps: int | None = None,
    expert_steps: int = EXPERT_STEPS,
    items: int = ITEMS,
) -> None:
    """Save folder/base, for each task of digits.TASKS its expert folder/<task>, and for these and HELDOUT as many
    images that no model has learned, folder/items/<task>.jsonl. base_steps: default the quality's."""
    torch.manual_seed(seed)
    images, digits = _digits()
    train, asked = split(len(images), LEARNED, items, seed)
    shown = torch.stack([torch.from_numpy(_pixels(task, images[train])) for task in (*TASKS, *HELDOUT)])
    labels, model = torch.from_numpy(digits[train]), _model(width)
    g = torch.Generator().manual_seed(seed)
    steps = base_steps or QUALITIES[quality]
    _train(model, shown[:, :SEEN], labels[:SEEN], BATCHES["base"], steps, RATES["base"], g)
    model.save_pretrained(folder / "base")
    start = {name: p.clone() for name, p in model.state_dict().items()}
    for i, task in enumerate(TASKS):
        model.load_state_dict(start)
        _train(model, shown[i : i + 1], labels, BATCHES["expert"], expert_steps, RATES["expert"], g)
        model.save_pretrained(folder / task)
    for task in (*TASKS, *HELDOUT):
        _write_items(folder / "items", task, images, digits, asked)


def _pixels(task: str, ink: np.ndarray) -> np.ndarray:
    for step in HELDOUT.get(task, ())[:-1]:
        ink = TASKS[step](ink)
    return pixels(HELDOUT.get(task, (task,))[-1], ink)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(ink, float32 [1797, SIDE, SIDE] from 0 to 1; which digit, int64 [1797]), shipped in scikit-learn."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images / 16).astype(np.float32), found.target.astype(np.int64)


def _model(width: int):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=SIDE,
        num_channels=1,
        patch_size=2,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        id2label={digit: str(digit) for digit in range(LABELS)},
        label2id={str(digit): digit for digit in range(LABELS)},
    )
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.nn.functional.normalize(torch.randn(LABELS, width), dim=-1))
        model.classifier.bias.zero_()
    model.classifier.requires_grad_(False)
    return model


def _train(model, shown, labels, batch: int, steps: int, rate: float, g: torch.Generator) -> None:
    """AdamW. shown: [T, n, 1, SIDE, SIDE]; labels: [n], of all T tasks; batch: images of each task."""
    tasks, count = shown.shape[:2]
    each = torch.arange(tasks)[:, None]
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20)
        drawn = torch.randint(count, (tasks, batch), generator=g)
        logits = model(pixel_values=shown[each, drawn].flatten(0, 1)).logits
        torch.nn.functional.cross_entropy(logits, labels[drawn].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _write_items(folder: Path, task: str, images: np.ndarray, digits: np.ndarray, asked: np.ndarray) -> None:
    """An item's id is the image's number: what is held out of one task is held out of all."""
    (folder / "images" / task).mkdir(parents=True, exist_ok=True)
    lines = []
    for number, values in zip(asked.tolist(), _pixels(task, images[asked])):
        np.save(folder / "images" / task / f"{number}.npy", values)
        lines.append({"id": str(number), "task": task, "kind": "classify", "image": f"images/{task}/{number}.npy",
                      "answer": str(digits[number])})  # fmt: skip
    (folder / f"{task}.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
