"""Tiny Llamas that classify, for tests of heads, and a tokenizer for them."""

import torch


def make_classifier(labels, seed=0, vocabulary=32, **settings):
    """One with random weights. settings: of LlamaConfig."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        num_labels=labels,
        **settings,
    )
    return LlamaForSequenceClassification(config)


def save_words(*folders, count=20):
    """A tokenizer of the words w0, w1, .. into each folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0} | {f"w{i}": i + 1 for i in range(count)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    for folder in folders:
        PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>").save_pretrained(folder)


def save_with_own_heads(folder, models):
    """folder/<name> of every model (name -> labels `name-0`, `name-1`, ..), equal but for noise and their heads."""
    start = make_classifier(2).state_dict()
    for seed, (name, labels) in enumerate(models.items()):
        model = make_classifier(labels, seed)
        own = {key: value for key, value in model.state_dict().items() if "score" in key}
        model.load_state_dict({key: value for key, value in start.items() if "score" not in key} | own)
        model.config.id2label = {i: f"{name}-{i}" for i in range(labels)}
        model.config.label2id = {label: i for i, label in model.config.id2label.items()}
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "score" not in key:
                    value.add_(0.005 * torch.randn_like(value))
        model.save_pretrained(folder / name)
    save_words(*(folder / name for name in models))
