"""Tiny sentence encoders, for tests of embeddings."""

import json

import torch

from merge3.tasks.sentences import POOLINGS


def make_tokenizer():
    """One token per word, between <cls> and <sep>."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<cls>", "<sep>", *(f"w{i}" for i in range(57))]
    raw = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    raw.pre_tokenizer = WhitespaceSplit()
    raw.post_processor = TemplateProcessing(single="<cls> $A <sep>", special_tokens=[("<cls>", 1), ("<sep>", 2)])
    special = dict(pad_token="<pad>", cls_token="<cls>", sep_token="<sep>", unk_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def make_model(kind, scale=3.0):
    """A random model without a head, sharper than an initialised one: ties would hide mistakes."""
    import transformers as t

    torch.manual_seed(0)
    common = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    makers = {
        "bert": lambda: t.BertModel(t.BertConfig(**common, max_position_embeddings=40)),
        "deberta": lambda: t.DebertaV2Model(t.DebertaV2Config(**common, max_position_embeddings=40)),
        "llama": lambda: t.LlamaModel(t.LlamaConfig(**common, max_position_embeddings=40, pad_token_id=0)),
        "t5": lambda: t.T5EncoderModel(
            t.T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        ),
    }
    model = makers[kind]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale) if p.dim() > 1 else p.add_(0.1 * torch.randn(p.shape))
    return model


def lay_out(folder, pooling=("mean",), prompts=None, limit=None, **more):
    """Beside a checkpoint, what sentence-transformers writes. more: of 1_Pooling/config.json."""
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    steps = [{"idx": i, "path": path, "type": f"sentence_transformers.models.{k}"} for i, (k, path) in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(steps))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {flag: name in pooling for flag, name in POOLINGS.items()}
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32} | flags | more))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts or {}}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit, "do_lower_case": False}))
