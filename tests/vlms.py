"""Tiny vision-language models with random weights, a language model beside them, and items with pictures."""

import json

import numpy as np
import torch

TEXT = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
SIDE, PATCH = 16, 8  # pixels
WORDS = ["<pad>", "<s>", "</s>", "how", "many", "which", "dots", "?", "one", "two", "three", "red", "blue", "<image>"]
TEMPLATE = (
    "{% for m in messages %}how {% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] }}"
    "{% endfor %} which {% endfor %}"
)


def tokenizer(words=WORDS):
    """One token per word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = WhitespaceSplit()
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    images = {"additional_special_tokens": ["<image>"]} if "<image>" in words else {}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special, **images)


def llava(**more):
    """A LLaVA whose eyes have more layers than its language model. more: of the language model's configuration."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(**(dict(vocab_size=len(WORDS), max_position_embeddings=64) | TEXT | more))
    eyes = CLIPVisionConfig(hidden_size=12, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
                            image_size=SIDE, patch_size=PATCH)  # fmt: skip
    at = WORDS.index("<image>")
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=eyes, image_token_index=at, vision_feature_layer=-1)
    )


def qwen(newer=False):
    """A Qwen2-VL, or a Qwen2.5-VL: stored with its language model's names as of the language model alone."""
    import transformers

    text = dict(vocab_size=32, num_key_value_heads=1, bos_token_id=1, eos_token_id=2, **TEXT)
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    eyes = dict(depth=3, num_heads=2, hidden_size=16, patch_size=4, spatial_merge_size=2)
    more = dict(intermediate_size=24, out_hidden_size=16, window_size=16, fullatt_block_indexes=[1])
    eyes |= more if newer else dict(embed_dim=16)
    tokens = dict(image_token_id=3, vision_start_token_id=4, vision_end_token_id=5, video_token_id=6)
    name = "Qwen2_5_VL" if newer else "Qwen2VL"
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=eyes, **tokens)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def noisy(model, seed, scale=0.05):
    """The model with noise on every weight, in place."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * scale)
    return model


def make_sights(folder):
    """folder/base and folder/seeing: LLaVAs; folder/words: a Llama with one word less, of the same descent as the
    base's language model; folder/items.jsonl: choices and continuations, pictures as .npy and as .png."""
    from PIL import Image
    from transformers import CLIPImageProcessor, LlamaConfig, LlamaForCausalLM, LlavaProcessor

    torch.manual_seed(0)
    base = llava()
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size), tokenizer(), patch_size=PATCH, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=TEMPLATE,
    )  # fmt: skip
    base.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    inner = {name: p.detach().clone() for name, p in base.model.language_model.state_dict().items()}
    head = base.lm_head.weight.detach().clone()
    noisy(base, seed=1).save_pretrained(folder / "seeing")
    processor.save_pretrained(folder / "seeing")
    few = len(WORDS) - 1
    words = LlamaForCausalLM(LlamaConfig(vocab_size=few, max_position_embeddings=64, **TEXT))
    inner["embed_tokens.weight"] = inner["embed_tokens.weight"][:few]
    words.model.load_state_dict(inner)
    words.lm_head.weight.data.copy_(head[:few])
    noisy(words, seed=2).save_pretrained(folder / "words")
    tokenizer(WORDS[:few]).save_pretrained(folder / "words")
    rng, items = np.random.default_rng(0), []
    for i in range(3):
        np.save(folder / f"{i}.npy", rng.normal(size=(3, SIDE, SIDE)).astype(np.float32))
        Image.fromarray(rng.integers(0, 255, size=(20 + i, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        for kind in ("npy", "png"):
            ask = {"image": f"{i}.{kind}"}
            prompt = ["how many dots ?", "which ?"][i % 2]
            items.append(ask | {"id": f"g{i}{kind}", "kind": "generate", "prompt": prompt, "answer": "one",
                                "max_tokens": 3 + i})  # fmt: skip
            items.append(ask | {"id": f"c{i}{kind}", "kind": "choice", "prompt": f"how {'many' * (i % 2)} <image> dots",
                                "choices": ["one two", "three", "red"], "answer": i})  # fmt: skip
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
