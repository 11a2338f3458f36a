"""A Llama and experts that differ from it by noise: nothing is trained, weights are all that matters."""

from __future__ import annotations

from pathlib import Path

import torch

SIZES = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=64, max_position_embeddings=128)


def make_family(
    folder: Path,
    experts: int = 3,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.02,
    layers: int = 4,
    tied: bool = False,
    **sizes: int,
) -> None:
    """Save folder/base and folder/e0, e1, ..: the base plus noise of `scale`. sizes: of LlamaConfig, beside SIZES."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**(SIZES | dict(num_hidden_layers=layers, tie_word_embeddings=tied) | sizes))
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder / "base")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for i in range(experts):
        g = torch.Generator().manual_seed(i + 1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_((start[name].float() + torch.randn(p.shape, generator=g) * scale).to(dtype))
        model.save_pretrained(folder / f"e{i}")
