"""How a checkpoint reads: from prompts to token ids and from image files to pixels, once per run."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from merge3.errors import ItemsError, Merge3Warning
from merge3.tasks.items import Item, place, shown
from merge3.tasks.sentences import Sentences, read_sentences

# Families whose position ids start after the padding token's id: so many of their positions are never used.
_OFFSET = {
    "camembert",
    "data2vec-text",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}


@dataclass
class Reader:
    """What turns items into requests.

    tokenizer: None where only images are read; chat: wrap prompts in its chat template; folder: of the checkpoint,
    whose image processor is loaded when it is first needed; limit: positions of the model, None where nothing limits
    them; system: what the template is told first, if anything; apart: what follows a prompt is another text, a
    decoder's.
    """

    tokenizer: Any
    chat: bool = False
    folder: Path | None = None
    limit: int | None = None
    system: str = ""
    apart: bool = False

    def wrapped(self, prompt: str) -> str:
        """A prompt as the model gets it. Raises ItemsError where a chat template is wanted and there is none."""
        if not self.chat:
            return prompt
        if not getattr(self.tokenizer, "chat_template", None):
            raise ItemsError("apply_chat_template", "the tokenizer has no chat template", "one that has, or false")
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": prompt})
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:  # a template refuses roles by raising
            found = f"the chat template fails: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            expected = "a template for " + " and ".join(message["role"] for message in messages)
            raise ItemsError("apply_chat_template", found, expected) from None

    def tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that `wrapped` gave, with the special tokens that the tokenizer puts around it."""
        # A chat template writes them itself.
        return tuple(self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"])

    def prompt(self, item: Item) -> tuple[str, tuple[int, ...]]:
        """(an item's prompt as the model gets it, its token ids). Raises ItemsError where it has none."""
        text = self.wrapped(item.prompt)
        tokens = self.tokens(text)
        if not tokens:
            raise ItemsError(place(item), f"prompt {shown(item.prompt)} without tokens", "text the tokenizer knows")
        return text, tokens

    def following(self, text: str, tokens: tuple[int, ...], more: str) -> tuple[int, ...]:
        """Token ids of `more` as they follow a prompt (text, tokens); alone if the tokenizer would merge the two."""
        whole = () if self.apart else self.tokens(text + more)
        if len(whole) > len(tokens) and whole[: len(tokens)] == tokens:
            return whole[len(tokens) :]
        return tuple(self.tokenizer(more, add_special_tokens=False)["input_ids"])

    @cached_property
    def sentences(self) -> Sentences:
        """What the checkpoint says of its sentence embeddings. Raises CheckpointError; warns where it says nothing."""
        says = Sentences() if self.folder is None else read_sentences(self.folder)
        if not says.said:
            line = "nothing says how states become an embedding (1_Pooling/config.json): their mean is taken"
            warnings.warn(f"{self.folder}: {line}", Merge3Warning, stacklevel=2)
        return says

    def embedded(self, before: str, text: str) -> tuple[tuple[int, ...], int]:
        """(token ids of a text after the prompt `before`, how many of its first tokens are not to be pooled)"""
        if self.sentences.lower:
            before, text = before.lower(), text.lower()
        tokens = self.tokens((before + text).strip())  # outer white space is no part of a sentence
        if self.sentences.include_prompt or not before:
            return tokens, 0
        alone = self.tokens(before.strip())  # a token that ends a text does not end the prompt
        return tokens, len(alone) - (alone[-1] in self.tokenizer.all_special_ids) if alone else 0

    def image(self, item: Item) -> Any:
        """An item's image: float32 [channels, height, width] of a .npy of pixel values, or an RGB picture of any file
        pillow reads. Raises ItemsError where it cannot be read."""
        import numpy as np

        try:
            if item.image.endswith(".npy"):
                return torch.from_numpy(np.load(item.image, allow_pickle=False)).float()
            from PIL import Image

            return Image.open(item.image).convert("RGB")
        except (OSError, ValueError, TypeError, ImportError) as error:
            raise unreadable(item, error) from None

    def pixels(self, item: Item) -> torch.Tensor:
        """An item's image as a vision model takes it, float32 [channels, height, width]: pixel values as they are, a
        picture prepared by the checkpoint's own processor. Raises ItemsError where it cannot be read."""
        image = self.image(item)
        if isinstance(image, torch.Tensor):
            return image
        try:
            return self._image_processor(image, return_tensors="pt")["pixel_values"][0]
        except (OSError, ValueError, ImportError, json.JSONDecodeError) as error:
            raise unreadable(item, error) from None

    @cached_property
    def processor(self):
        """Of prompts with images in them. Raises ItemsError where the checkpoint has none."""
        from transformers import AutoProcessor, ProcessorMixin

        try:
            found = AutoProcessor.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise ItemsError(self.folder, f"no usable processor ({reason})", "its files beside the base") from None
        if not isinstance(found, ProcessorMixin):
            what = f"a {type(found).__name__} and no processor of texts with images"
            raise ItemsError(self.folder, what, "processor_config.json and preprocessor_config.json beside the base")
        return found

    @cached_property
    def _image_processor(self):
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(self.folder, trust_remote_code=False)


def unreadable(item: Item, error: Exception) -> ItemsError:
    """An item's image that cannot be read, with the file and the first line of why."""
    return ItemsError(place(item), f"unreadable image {item.image} ({error})")


def load_tokenizer(folder: str | Path):
    """The checkpoint's tokenizer; ItemsError if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ItemsError(folder, f"no usable tokenizer ({reason})", "tokenizer files beside the base model") from None


def positions(config, folder: str | Path | None = None) -> int | None:
    """How many tokens a model takes, by its transformers configuration, and by what a sentence encoder's folder says of
    texts; None where nothing limits them."""
    texts = None if folder is None else read_sentences(folder).limit
    return min((limit for limit in (_positions(config), texts) if limit is not None), default=None)


def _positions(config) -> int | None:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:  # absent, or -1 where positions are relative
        return None
    if getattr(config, "model_type", "") in _OFFSET:
        limit -= (getattr(config, "pad_token_id", None) or 0) + 1
    return limit
