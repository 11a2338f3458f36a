"""Items as what two models are shown alike: prompts and images without their answers, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from merge3.errors import CheckpointError, ItemsError
from merge3.learn.zip_correlation import Batch
from merge3.tasks import Item
from merge3.tasks.forward import right_padded
from merge3.tasks.items import place
from merge3.tasks.kinds import KINDS
from merge3.tasks.prompts import Reader, load_tokenizer, positions
from merge3.tasks.requests import Choices, Image, Start, Text, Texts, batches
from merge3.tasks.score import reader_of

IMAGES, TOKENS = 64, 4096  # of a forward pass


def shown(
    items: Sequence[Item], models: Sequence[torch.nn.Module], folders: Sequence[Path], system: str | None = None
) -> list[Batch]:
    """What a forward takes of each item: an image, or the tokens of its prompt, of choices with the first one. An item
    that is there twice, of two tasks, is shown once. folders: of the models' tokenizers; system: message of a chat
    template's prompts, None where no template is applied.

    Raises ItemsError for an item that the models cannot read, CheckpointError where they read other tokens.
    """
    reader = reader_of(items, models[0], folders[0], system is not None, system or "")
    if reader.tokenizer is not None:
        own = [load_tokenizer(folder).get_vocab() for folder in folders]
        if own[0] != own[1]:
            count = len(set(own[0].items()) ^ set(own[1].items()))
            found = f"{count:,} tokens that the two tokenizers do not have alike"
            raise CheckpointError(str(folders[1]), found, f"the vocabulary of {folders[0]}")
    limit = positions(models[0].config)
    rows: dict[tuple[int, ...], None] = {}
    images: dict[bytes, torch.Tensor] = {}
    for item in items:
        for request in KINDS[item.kind].requests(item, reader):
            if isinstance(request, Image):
                images.setdefault(request.pixels.numpy().tobytes(), request.pixels)
                continue
            row = _tokens(item, request)
            if limit is not None and len(row) > limit:
                raise ItemsError(place(item), f"{len(row)} tokens", f"at most {limit}, the model's positions")
            rows[row] = None
    return [*_images(list(images.values())), *_texts(list(rows), reader, models[0])]


def _tokens(item: Item, request: Choices | Start | Text | Texts) -> tuple[int, ...]:
    match request:
        case Choices() if request.margins:  # what follows is the answer, which is not read
            return request.tokens
        case Choices() if not request.image:
            return (*request.tokens, *request.choices[0])
        case Texts():
            return request.tokens[0]
        case Start() | Text() if not getattr(request, "image", None):
            return request.tokens
    raise ItemsError(place(item), "an image in a prompt", "texts alone, or images of a classifier")


def _images(pixels: list[torch.Tensor]) -> list[Batch]:
    found = []
    for shape in dict.fromkeys(image.shape for image in pixels):
        own = [image for image in pixels if image.shape == shape]
        found += [Batch({"pixel_values": torch.stack(own[at : at + IMAGES])}) for at in range(0, len(own), IMAGES)]
    return found


def _texts(rows: list[tuple[int, ...]], reader: Reader, model: torch.nn.Module) -> list[Batch]:
    found = []
    for batch in batches(rows, len, TOKENS):
        inputs = right_padded([row for _, row in batch], getattr(model.config, "pad_token_id", None) or 0, "cpu")
        found.append(Batch(inputs, inputs["attention_mask"]))
    return found
