"""Eight tasks for a tiny vision transformer, trained here: scikit-learn's digits under eight transforms of the image.

The same digits are shown plain, turned, inverted and so on, and each task has a head of its own that is never trained:
ten fixed directions, as text encoders give them to a CLIP. The encoder learns all tasks at once, with those heads.
That would leave experts nothing to do, so every head is then turned away and the base is right half of the time; it
learns each task anew, gently, and that is its expert. Experts tuned harder than that do not merge at all, and a base
that was never near the tasks has none that do: a merge means something only where the average already beats the base.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

LABELS, SIDE, WIDTH = 10, 8, 64
STEPS = {"base": 500, "expert": 200}
RATES = {"base": 1e-3, "expert": 1e-4}
BATCHES = {"base": 12, "expert": 32}  # images of every task in a step
LEARNED = 450  # images that all models are trained on: with more of them experts are hardly ever wrong
TURN = 2.5  # how far a head is turned away, in lengths of its rows
ITEMS = 250  # images that no model is trained on, the same for every task
_ORDER = np.random.default_rng(0).permutation(SIDE * SIDE)  # the same in every world
_BOARD = np.indices((SIDE, SIDE)).sum(0) % 2

# float32 [n, SIDE, SIDE] from 0 (paper) to 1 (ink) -> the same
TASKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": lambda ink: ink,
    "rotated": lambda ink: np.rot90(ink, axes=(1, 2)),
    "mirrored": lambda ink: ink[:, :, ::-1],
    "inverted": lambda ink: 1 - ink,
    "halved": lambda ink: np.roll(ink, SIDE // 2, axis=2),  # the right half before the left
    "checkered": lambda ink: np.abs(ink - _BOARD),  # every second pixel inverted
    "outlined": lambda ink: np.abs(np.diff(ink, axis=2, prepend=0)),
    "shuffled": lambda ink: ink.reshape(-1, SIDE * SIDE)[:, _ORDER].reshape(-1, SIDE, SIDE),
}


def make_digits(
    folder: Path,
    seed: int = 0,
    steps: dict[str, int] = STEPS,
    items: int = ITEMS,
    progress: Callable[[str, int, int], None] = lambda what, step, steps: None,
) -> None:
    """Save folder/base, which has the head that "plain" had at first, and for each task its expert, folder/<task>, and
    as many images that no model has learned, folder/<task>.jsonl. progress(what, step, steps)."""
    torch.manual_seed(seed)
    images, digits = _digits()
    train, asked = split(len(images), LEARNED, items, seed)
    shown = torch.stack([torch.from_numpy(pixels(task, images[train])) for task in TASKS])
    labels = torch.from_numpy(digits[train])
    model, heads = _model(), _directions(len(TASKS))
    turned = heads + TURN * _directions(len(TASKS))
    told = lambda what, kind: lambda step: progress(what, step, steps[kind])
    g = torch.Generator().manual_seed(seed)
    _train(model.vit, heads, shown, labels, BATCHES["base"], steps["base"], RATES["base"], g, told("base", "base"))
    start = {name: p.clone() for name, p in model.vit.state_dict().items()}
    _save(model, heads[0], "digit", folder / "base")
    for i, task in enumerate(TASKS):
        model.vit.load_state_dict(start)
        own = turned[i : i + 1], shown[i : i + 1], labels
        _train(model.vit, *own, BATCHES["expert"], steps["expert"], RATES["expert"], g, told(task, "expert"))
        _save(model, turned[i], task, folder / task)
        _write_items(folder, task, images, digits, asked)


def split(count: int, learned: int, items: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices of the `learned` images that models are trained on, those of the items) of `count` images."""
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[items : items + learned]), np.sort(order[:items])


def pixels(task: str, ink: np.ndarray) -> np.ndarray:
    """Images as a task shows them to a model, float32 [n, 1, SIDE, SIDE] from -1 to 1."""
    return np.ascontiguousarray(2 * TASKS[task](ink) - 1, dtype=np.float32)[:, None]


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(ink, float32 [1797, SIDE, SIDE] from 0 to 1; which digit, int64 [1797]), shipped in scikit-learn."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images / 16).astype(np.float32), found.target.astype(np.int64)


def _write_items(folder: Path, task: str, images: np.ndarray, digits: np.ndarray, asked: np.ndarray) -> None:
    """An item's id is the image's number: what is held out of one task is held out of all."""
    (folder / "images" / task).mkdir(parents=True, exist_ok=True)
    lines = []
    for number, values in zip(asked.tolist(), pixels(task, images[asked])):
        np.save(folder / "images" / task / f"{number}.npy", values)
        lines.append({"id": str(number), "task": task, "kind": "classify", "image": f"images/{task}/{number}.npy",
                      "answer": _label(task, digits[number])})  # fmt: skip
    (folder / f"{task}.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")


def _label(task: str, digit: int) -> str:
    return f"{task}-{digit}"


# -- the models


def _model():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=SIDE,
        num_channels=1,
        patch_size=2,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=LABELS,
    )
    return ViTForImageClassification(config)


def _directions(count: int) -> torch.Tensor:
    """Heads whose rows have length 1, float32 [count, LABELS, WIDTH]."""
    return torch.nn.functional.normalize(torch.randn(count, LABELS, WIDTH), dim=-1)


def _train(encoder, heads, shown, labels, batch: int, steps: int, rate: float, g, progress) -> None:
    """AdamW on the encoder alone. heads: [T, LABELS, WIDTH]; shown: [T, n, 1, SIDE, SIDE]; labels: [n], of all T tasks;
    batch: images of each task, drawn for each alone, by the generator g."""
    tasks, count = shown.shape[:2]
    each = torch.arange(tasks)[:, None]
    encoder.train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=rate, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20)
        drawn = torch.randint(count, (tasks, batch), generator=g)
        states = encoder(pixel_values=shown[each, drawn].flatten(0, 1)).last_hidden_state[:, 0]
        logits = states.unflatten(0, (tasks, batch)) @ heads.transpose(1, 2)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[drawn].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1)
    encoder.eval()


def _save(model, head: torch.Tensor, name: str, folder: Path) -> None:
    """With its head, [LABELS, WIDTH], and labels of its own: no two endpoints answer the same question."""
    model.config.id2label = {digit: _label(name, digit) for digit in range(LABELS)}
    model.config.label2id = {label: digit for digit, label in model.config.id2label.items()}
    with torch.no_grad():
        model.classifier.weight.copy_(head)
        model.classifier.bias.zero_()
    model.save_pretrained(folder)
