"""A tokenizer of number words."""

from __future__ import annotations

from merge3.world.numbers import ENGLISH, ITALIAN, WORDS

SPECIAL = ["<pad>", "<s>", "</s>"]


def make_tokenizer():
    """A word-level tokenizer: one token per number word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *WORDS, *dict.fromkeys([*ENGLISH, *ITALIAN])]
    raw = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = WhitespaceSplit()
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
