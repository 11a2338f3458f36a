"""Small Llamas whose tokenizers have other tokens, under other numbers, than each other."""

import json

import torch

SPECIAL = ["<pad>", "<s>", "</s>"]
WORDS = [f"w{i}" for i in range(40)]
VOCABULARIES = {
    "base": (SPECIAL + WORDS, []),
    # the same words backwards, five of them missing, and six of its own; one added token
    "one": (["<s>", "</s>", "<pad>", *WORDS[:4:-1], *[f"x{i}" for i in range(6)]], ["<|im_end|>"]),
    # half of the words, some of `one`'s and some of its own; two added tokens, one of which is `one`'s too
    "two": (SPECIAL + WORDS[::2] + ["x3", "y0", "x1", "y1", "y2"], ["<|im_start|>", "<|im_end|>"]),
}
TEMPLATES = {
    "base": "{% for m in messages %}w1 {{ m['content'] }}{% endfor %}",
    "one": "\n{% for m in messages %}w2 {{ m['content'] }}{% endfor %} ",
    "two": "{% for m in messages %}w2 {{ m['content'] }}{% endfor %}",
}
ROWS = {"base": 43, "one": 48, "two": 64}  # `one` and `two` have rows without a token


def tokenizer_of(words, added=(), **changes):
    """Splits at spaces, and has a token for every word."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = WhitespaceSplit()
    named = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **(named | changes))
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in added])
    return tokenizer


TEXTS = {
    "base": "the cat sat on the mat and the dog sat on the cat",
    "one": "il gatto sta sul tappeto e il cane sta sul gatto on the mat",
    "two": "die katze sitzt auf der matte und der hund auf der katze on the mat",
}


def bytes_of(text, added=()):
    """A byte-level BPE, trained on a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    raw.train_from_iterator([text], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in added])
    return tokenizer


def make_speakers(folder, dtype=torch.float32, tied=False, padded=0, bpe=False):
    """base, one and two, whose layers are nearly the same. padded: rows of the base beyond its tokens. bpe: tokens are
    parts of words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = None
    for seed, (name, (words, added)) in enumerate(VOCABULARIES.items()):
        tokenizer = bytes_of(TEXTS[name], added) if bpe else tokenizer_of(words, added)
        tokenizer.chat_template = TEMPLATES[name]
        numbers = tokenizer.get_vocab()
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_attention_heads=2,
            num_hidden_layers=2,
            max_position_embeddings=64,
            vocab_size=(len(tokenizer) if bpe else ROWS[name]) + (padded if name == "base" else 0),
            bos_token_id=numbers["<s>"],
            eos_token_id=numbers["</s>"],
            pad_token_id=numbers["<pad>"],
            tie_word_embeddings=tied,
        )
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter, shared in zip(model.model.layers.parameters(), layers or model.model.layers.parameters()):
                parameter.copy_(shared + torch.randn(parameter.shape, generator=generator) * 0.002)
        layers = layers or [parameter.clone() for parameter in model.model.layers.parameters()]
        model.to(dtype).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def renumber(folder, order):
    """Give a checkpoint's tokens (of a tokenizer.json of whole words) other numbers, rows and all. order: old number of
    each new one."""
    from safetensors.torch import load_file, save_file

    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    new = {old: number for number, old in enumerate(order)}
    data["model"]["vocab"] = {word: new[old] for word, old in data["model"]["vocab"].items()}
    for token in data["added_tokens"]:
        token["id"] = new[token["id"]]
    for processor in [data.get("post_processor") or {}]:
        for special in processor.get("special_tokens", {}).values():
            special["ids"] = [new[old] for old in special["ids"]]
    data["added_tokens"].sort(key=lambda token: token["id"])
    file.write_text(json.dumps(data))
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][torch.tensor(order)].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for settings in (folder / "config.json", folder / "generation_config.json"):
        told = json.loads(settings.read_text())
        for key, old in told.items():
            if key.endswith("_token_id") and isinstance(old, int):
                told[key] = new[old]
        settings.write_text(json.dumps(told))
    settings = folder / "tokenizer_config.json"
    told = json.loads(settings.read_text())
    told.pop("added_tokens_decoder", None)
    settings.write_text(json.dumps(told))
