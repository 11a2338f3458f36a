"""A LLaVA and its experts, trained here from scratch: the pictures of glyphs.py, questions in two languages.

A language model learns English, and a little Italian. Eyes are trained in front of it on English questions, and it
changes gently with them: that is the expert that sees. The other expert is the language model again, tuned on Italian
text alone: it has never been shown a picture. The base is what both come from, the language model as it was, behind
those eyes. Trained longer or faster, the two languages end up too far apart for any merge; this was found by trying.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from merge3.world.glyphs import CELL, CELLS, LANGUAGES, SIDE, WORDS, Scene, question, scene

SPECIAL = ["<pad>", "<s>", "</s>"]
IMAGE = "<image>"  # the last word, which a language model alone does not have
BASE, SEEING, SPEAKING = "base", "english", "italian"  # the second and third are languages, and experts
STEPS = {"words": 200, "eyes": 300, "italian": 110}
ITALIAN = 0.08  # of the lines that the language model learns at first
ITEMS = 400  # of each language
BATCH, SCENES = 64, 3000
Line = tuple[list[int], list[int]]  # token ids: given, and to be said
Group = tuple[list[torch.nn.Parameter], float]  # what is trained, and its rate


def make_sight(
    folder: Path,
    seed: int = 0,
    steps: dict[str, int] = STEPS,
    items: int = ITEMS,
    progress: Callable[[str, int, int], None] = lambda what, step, steps: None,
) -> None:
    """Save folder/base and folder/english, which see, and folder/italian, which does not; and for each language as many
    questions about pictures, folder/<language>.jsonl, with them in folder/pictures. progress(what, step, steps)."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    rng, told = random.Random(seed), lambda what: lambda step: progress(what, step, steps[what])
    words = LlamaForCausalLM(_text_config(len(_vocabulary()) - 1))
    either = lambda: "italian" if rng.random() < ITALIAN else "english"
    speak = lambda: _batch([_spoken(rng, either(), 0.7) for _ in range(BATCH)])
    _train(words, speak, steps["words"], [(list(words.parameters()), 3e-3)], told("words"))
    start = {name: p.detach().clone() for name, p in words.named_parameters()}
    seeing = _llava(start)
    shown = [(s, _values(s, seed, i)) for i, s in enumerate(scene(rng) for _ in range(SCENES))]
    look = lambda: _seen(rng, [rng.choice(shown) for _ in range(BATCH)])
    groups = [([p for _, p in _eyes(seeing)], 3e-3), ([p for p, _ in _language(seeing, start)], 1e-4)]
    _train(seeing, look, steps["eyes"], groups, told("eyes"))
    _save(seeing, folder / SEEING)
    _put(seeing, start)
    _save(seeing, folder / BASE)
    italian = lambda: _batch([_spoken(rng, "italian", 0.8) for _ in range(BATCH)])
    _train(words, italian, steps["italian"], [(list(words.parameters()), 1e-3)], told("italian"))
    words.save_pretrained(folder / SPEAKING)
    _tokenizer(images=False).save_pretrained(folder / SPEAKING)
    for language in LANGUAGES:
        _write_items(folder, language, seed, items)


def _write_items(folder: Path, language: str, seed: int, count: int) -> None:
    """Questions in turn, each about a picture of its own."""
    from PIL import Image

    rng, noise = random.Random(f"{seed} {language}"), np.random.default_rng([seed, len(language)])
    (folder / "pictures" / language).mkdir(parents=True, exist_ok=True)
    lines, asks = [], list(LANGUAGES[language].asks.items())
    for i in range(count):
        (asked, answer), shown = asks[i % len(asks)], scene(rng)
        Image.fromarray(shown.pixels(noise)).save(folder / "pictures" / language / f"{i}.png")
        right = answer(shown)
        lines.append({"id": f"{language}-{i}", "kind": "generate", "image": f"pictures/{language}/{i}.png",
                      "prompt": asked, "answer": right, "max_tokens": len(right.split())})  # fmt: skip
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / f"{language}.jsonl").write_text(text + "\n", encoding="utf-8")


# -- what is learned from


def _spoken(rng: random.Random, language: str, questions: float) -> Line:
    """A sentence, or a question about one: in Italian also about what is said in English."""
    s, numbers = scene(rng), _vocabulary()
    ids = lambda text: [numbers[word] for word in text.split()]
    said = language if language == "english" or rng.random() < 0.4 else "english"
    if rng.random() >= questions:
        return [1], [*ids(LANGUAGES[language].says(s)), 2]
    asked, answer = question(rng, language, s)
    return [1, *ids(LANGUAGES[said].says(s)), *ids(asked)], [*ids(answer), 2]


def _seen(rng: random.Random, shown: list[tuple[Scene, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """English sentences and questions about pictures."""
    numbers, lines = _vocabulary(), []
    ids = lambda text: [numbers[word] for word in text.split()]
    places = [numbers[IMAGE]] * (CELLS * CELLS)
    for s, _ in shown:
        if rng.random() < 0.3:
            lines.append(([1, *places], [*ids(LANGUAGES["english"].says(s)), 2]))
        else:
            asked, answer = question(rng, "english", s)
            lines.append(([1, *places, *ids(asked)], [*ids(answer), 2]))
    return _batch(lines) | {"pixel_values": torch.stack([pixels for _, pixels in shown])}


def _batch(lines: Iterable[Line]) -> dict[str, torch.Tensor]:
    """Right padded; the loss is that of what is to be said."""
    lines = list(lines)
    width = max(len(given) + len(said) for given, said in lines)
    ids = torch.zeros(len(lines), width, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (given, said) in enumerate(lines):
        line = torch.tensor(given + said)
        ids[row, : len(line)], mask[row, : len(line)] = line, 1
        labels[row, len(given) : len(line)] = line[len(given) :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _values(s: Scene, seed: int, number: int) -> torch.Tensor:
    """A scene's picture as the processor makes it: float32 [3, SIDE, SIDE]."""
    pixels = s.pixels(np.random.default_rng([seed, 1, number])).astype(np.float32)
    return torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(2, 0, 1).contiguous()


def _train(model, make: Callable[[], dict], steps: int, groups: list[Group], progress) -> None:
    """AdamW; rates rise over 20 steps and fall over the last 30 %."""
    model.train().requires_grad_(False)
    for parameters, _ in groups:
        for p in parameters:
            p.requires_grad_(True)
    optimizer = torch.optim.AdamW([{"params": own, "lr": rate} for own, rate in groups], weight_decay=0.01)
    for step in range(steps):
        for group, (_, rate) in zip(optimizer.param_groups, groups):
            group["lr"] = rate * min(1.0, (step + 1) / 20, (steps - step) / (0.3 * steps))
        model(**make()).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for own, _ in groups for p in own], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1)
    model.eval()


# -- the models


def _text_config(words: int):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def _llava(start: dict[str, torch.Tensor]):
    """A LLaVA with small eyes, whose language model starts as another one."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    eyes = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=CELL,
    )
    words = len(_vocabulary())
    config = LlavaConfig(text_config=_text_config(words), vision_config=eyes, image_token_index=words - 1,
                         vision_feature_layer=-1, pad_token_id=0)  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    _put(model, start)
    return model


def _language(model, start: dict[str, torch.Tensor]) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Each tensor of the language model in a LLaVA, and its counterpart in one alone."""
    inner = model.model.language_model
    return [(model.lm_head.weight if name == "lm_head.weight" else inner.get_parameter(name.removeprefix("model.")), t)
            for name, t in start.items()]  # fmt: skip


def _eyes(model) -> list[tuple[str, torch.nn.Parameter]]:
    beside = ("model.vision_tower.", "model.multi_modal_projector.")
    return [(name, p) for name, p in model.named_parameters() if name.startswith(beside)]


def _put(model, start: dict[str, torch.Tensor]) -> None:
    """Words that only the LLaVA has keep their rows."""
    with torch.no_grad():
        for p, tensor in _language(model, start):
            p[: len(tensor)].copy_(tensor)


def _vocabulary() -> dict[str, int]:
    return {word: number for number, word in enumerate([*SPECIAL, *WORDS, IMAGE])}


def _tokenizer(images: bool):
    """One token per word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = {word: number for word, number in _vocabulary().items() if images or word != IMAGE}
    raw = Tokenizer(WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = WhitespaceSplit()
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    more = {"additional_special_tokens": [IMAGE]} if images else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>", **more
    )


def _save(model, folder: Path) -> None:
    from transformers import CLIPImageProcessor, LlavaProcessor

    size = {"height": SIDE, "width": SIDE}
    half = [0.5, 0.5, 0.5]
    pictures = CLIPImageProcessor(size=size, crop_size=size, image_mean=half, image_std=half)
    processor = LlavaProcessor(pictures, _tokenizer(images=True), patch_size=CELL, num_additional_image_tokens=1,
                               vision_feature_select_strategy="default")  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
