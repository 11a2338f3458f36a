"""Classification: the argmax of a head over texts or images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from merge3.errors import ItemsError
from merge3.tasks.forward import likeliest, not_finite
from merge3.tasks.items import Item, place, shown
from merge3.tasks.prompts import Group, batches


class ClassifyScorer:
    """Scores the text classification items of one task."""

    def __init__(self, group: Group, device, batch_tokens: int, pad: int, labels: dict[str, int]):
        self.device, self.prefix = device, group.prefix
        self.batches = []
        for batch in batches(group.prompts, lambda p: len(p.tokens), batch_tokens):
            rows = [(*group.prefix, *p.tokens) for p in batch]
            width = max(map(len, rows))
            ids = torch.tensor([[*r, *[pad] * (width - len(r))] for r in rows], device=device)
            mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)
            answers = [label(p.item, labels) for p in batch]
            asked = [(p.index, p.item) for p in batch]
            self.batches.append((asked, {"input_ids": ids, "attention_mask": mask}, answers))

    @torch.inference_mode()
    def score(self, model) -> dict[int, float]:
        """item index -> 1.0 if the head's argmax is the label, else 0.0. Raises LogitsError."""
        results = {}
        for items, inputs, answers in self.batches:
            found = likeliest(model(**inputs).logits).tolist()
            for (index, item), best, answer in zip(items, found, answers):
                if best < 0:
                    raise not_finite(item)
                results[index] = float(best == answer)
        return results


class ImageScorer(ClassifyScorer):
    """Scores image classification items. An image is a .npy of pixel values [channels, height, width],
    or any file pillow reads, prepared by the checkpoint's own processor."""

    def __init__(self, items: Sequence[tuple[int, Item]], device, folder: Path, labels: dict[str, int], rows: int = 64):
        self.batches = []
        for start in range(0, len(items), rows):
            part = items[start : start + rows]
            pixels = torch.stack([_pixels(item, folder) for _, item in part]).to(device)
            answers = [label(item, labels) for _, item in part]
            self.batches.append((part, {"pixel_values": pixels}, answers))


def label(item: Item, labels: dict[str, int]) -> int:
    """The index of an item's label in the head."""
    if isinstance(item.answer, int):
        if labels and not 0 <= item.answer < len(labels):
            raise ItemsError(place(item), f"answer is {item.answer}", f"an index below {len(labels)}")
        return item.answer
    if item.answer not in labels:
        raise ItemsError(place(item), f"answer is {shown(item.answer)}", "one of " + ", ".join(labels))
    return labels[item.answer]


def _pixels(item: Item, folder: Path) -> torch.Tensor:
    import numpy as np

    try:
        if item.image.endswith(".npy"):
            return torch.from_numpy(np.load(item.image, allow_pickle=False)).float()
        from PIL import Image
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        return processor(Image.open(item.image).convert("RGB"), return_tensors="pt")["pixel_values"][0]
    except (OSError, ValueError, ImportError, json.JSONDecodeError) as error:
        raise ItemsError(place(item), f"unreadable image {item.image} ({error})") from None
