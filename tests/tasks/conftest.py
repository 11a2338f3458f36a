"""A tokenizer over 60 words, and random models that use it."""

import pytest
import torch

SIZES = dict(
    vocab_size=62,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    eos_token_id=1,
    pad_token_id=0,
)


def _tokenizer(bos=False, chat=None):
    """One token per word. bos: a token before every text, as Llama's tokenizers have it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(
        WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", *(f"w{i}" for i in range(60))])}, unk_token="<pad>")
    )
    raw.pre_tokenizer = WhitespaceSplit()
    if bos:
        raw.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<pad>")
    tokenizer.chat_template = chat
    return tokenizer


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """(the tokenizer's folder, the tokenizer, a random Llama and a GPT-2)"""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    folder = tmp_path_factory.mktemp("world")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=62, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=1, pad_token_id=0)
    ).eval()
    for model in (llama, gpt2):
        for p in model.parameters():
            p.data.mul_(4.0)  # sharper than an initialised model: ties would hide mistakes
    return folder, tokenizer, {"llama": llama, "gpt2": gpt2}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with Llamas `base`, `e0`, `e1`, tokenizers included, and `nanlogits`, whose weights are finite."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("checkpoints"), _tokenizer(bos=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in ("base", "e0", "e1", "nanlogits"):
        with torch.no_grad():
            for key, p in model.named_parameters():
                p.copy_(start[key] + 0.02 * torch.randn(p.shape))
            if name == "nanlogits":
                _overflow(model)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def _overflow(model, where="mlp"):
    """Weights that are finite, logits that are not: NaN (mlp), or infinite (head)."""
    with torch.no_grad():
        if where == "head":
            model.lm_head.weight.fill_(3e38)
            model.model.norm.weight.mul_(1e3)
        else:
            for weight in model.model.layers[0].mlp.parameters():
                weight.mul_(1e18)


@pytest.fixture(scope="session")
def make_tokenizer():
    return _tokenizer


@pytest.fixture(scope="session")
def overflow():
    return _overflow
