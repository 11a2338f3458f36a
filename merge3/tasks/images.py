"""A prompt with an image in it, as the checkpoint's own processor makes it: tokens with room for the image, and what
the model's forward takes of it.

Where the image stands in a prompt: at `<image>`, or where the prompt has the processor's own mark; else in front. With
a chat template it is a part of the user's message, and the template writes its mark.
"""

from __future__ import annotations

from typing import Any

import torch
from jinja2 import TemplateError

from merge3.errors import ItemsError
from merge3.tasks.items import Item, place, shown
from merge3.tasks.prompts import Reader

MARK = "<image>"
# An array of pixel values is what the eyes are given: whatever of this a processor does, it is told to leave.
_CHANGES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad")


def seen(item: Item, reader: Reader) -> tuple[str, tuple[int, ...], dict[str, torch.Tensor]]:
    """(the prompt as the model gets it, its token ids with the image's places, what else the forward takes).

    Raises ItemsError for an image that cannot be read, a prompt with several marks, a processor that has none.
    """
    image, processor = reader.image(item), reader.processor
    text = _text(item, reader, processor)
    settings: dict[str, Any] = {"add_special_tokens": not reader.chat}  # a chat template writes them itself
    if isinstance(image, torch.Tensor):
        as_it_is = {name: False for name in _CHANGES if getattr(processor.image_processor, name, None)}
        settings["images_kwargs"] = as_it_is | {"input_data_format": "channels_first"}
    try:
        made = processor(images=[image], text=[text], return_tensors="pt", **settings)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, OSError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ItemsError(place(item), f"image {item.image} and its prompt cannot be prepared ({reason})") from None
    tokens = tuple(made["input_ids"][0].tolist())
    inputs = {name: value for name, value in made.items() if name not in ("input_ids", "attention_mask")}
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise ItemsError(place(item), f"the processor made {name} as {type(value).__name__}", "tensors")
        if tuple(value.shape[:2]) == (1, len(tokens)) and not name.endswith("token_type_ids"):
            raise ItemsError(place(item), f"the processor made {name}, one for each token", "images apart from tokens")
    return text, tokens, inputs


def _text(item: Item, reader: Reader, processor: Any) -> str:
    """The prompt with one mark of an image in it, wrapped in the chat template where one is wanted."""
    own = getattr(processor, "image_token", None) or getattr(processor.tokenizer, "image_token", None) or MARK
    mark = own if own in item.prompt else MARK
    if item.prompt.count(mark) > 1:
        found = f"prompt {shown(item.prompt)} has several marks of an image"
        raise ItemsError(place(item), found, f"one `{MARK}`, or none: an item has one image")
    before, marked, after = item.prompt.partition(mark)
    if not marked:
        before, after = "", item.prompt
    if not reader.chat:
        return before + (own if marked and mark == own else _written(processor, own)) + after
    if not getattr(processor, "chat_template", None):
        raise ItemsError("apply_chat_template", "the processor has no chat template", "one that has, or false")
    parts = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
    return _rendered(processor, [part for part in parts if part.get("text") != ""], reader.system)


def _written(processor: Any, own: str) -> str:
    """How this family of models writes an image into a text: what its chat template inserts for one (its token, and for
    some marks or a new line around it); without a template its token alone."""
    if not getattr(processor, "chat_template", None):
        return own
    words = {"type": "text", "text": "words"}
    whole, without = _rendered(processor, [{"type": "image"}, words]), _rendered(processor, [words])
    start = next((i for i, (a, b) in enumerate(zip(whole, without)) if a != b), len(without))
    return whole[start : start + len(whole) - len(without)] or own


def _rendered(processor: Any, content: list[dict[str, str]], system: str = "") -> str:
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    messages.append({"role": "user", "content": content})
    try:
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:  # a template refuses roles by raising
        found = f"the processor's chat template fails: {str(error).splitlines()[0] if str(error) else 'TypeError'}"
        raise ItemsError("apply_chat_template", found, "a template for messages with an image") from None
