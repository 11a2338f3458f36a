"""Tiny Llamas that classify, for tests of heads."""

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
