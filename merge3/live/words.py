"""A live model over a pool's vocabulary: as many rows, and texts end where its tokens say."""

from __future__ import annotations

import torch

from merge3.checkpoint.beside import GENERATION
from merge3.pool import Pool


def speak(model: torch.nn.Module, pool: Pool) -> None:
    """Give a model of the base, as it was loaded, the vocabulary's rows (their values come with the first swap) and the
    special tokens that the exported model will have."""
    from transformers import GenerationConfig

    vocabulary = pool.vocabulary
    model.resize_token_embeddings(vocabulary.rows, mean_resizing=False)
    config = pool.base_checkpoint.config
    own, text = model.config, model.config.get_text_config()
    for section, settings in ((own, config), (text, config.get("text_config", config))):
        for key, value in settings.items():
            if key.endswith("_token_id"):
                setattr(section, key, value)
    if vocabulary.donor == pool.base or not model.can_generate():
        return
    if (vocabulary.folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(vocabulary.folder)
    else:
        model.generation_config = GenerationConfig.from_model_config(own)
