"""The base as a live transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from merge3.checkpoint.architecture import configuration, refuse_made_up, tied
from merge3.checkpoint.layout import Ref
from merge3.checkpoint.read import INDEX, SINGLE
from merge3.errors import CheckpointError
from merge3.live.words import speak
from merge3.pool import Pool

# For an architecture that transformers has under no such name (a checkpoint with code of its own, or one that names
# none): how its name ends, and what loads the nearest that its model type has.
_LOADERS = (
    ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    ("ForImageClassification", "AutoModelForImageClassification"),
    ("ForMaskedLM", "AutoModelForMaskedLM"),
    ("ForSpeechSeq2Seq", "AutoModelForSpeechSeq2Seq"),
    ("ForSeq2SeqLM", "AutoModelForSeq2SeqLM"),
    ("ForImageTextToText", "AutoModelForImageTextToText"),
    ("", "AutoModelForCausalLM"),
)


def loader(config: Mapping[str, Any]):
    """What loads a checkpoint of this config.json: the class that it names, whatever that is for (LlamaForCausalLM,
    T5ForConditionalGeneration, LlavaForConditionalGeneration, BertModel, CLIPModel), so that the live model has exactly
    the checkpoint's parameters; where transformers has no such class for its model type, one of the auto classes."""
    import transformers

    architecture = (config.get("architectures") or [""])[0]
    named = getattr(transformers, architecture or "-", None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        settings = configuration(config) if config.get("model_type") else None
        if settings is not None and isinstance(settings, named.config_class or ()):
            return named
    return next(getattr(transformers, auto) for suffix, auto in _LOADERS if architecture.endswith(suffix))


def load_model(pool: Pool, dtype: torch.dtype) -> torch.nn.Module:
    """The base as a transformers model, for inference, on the pool's device. Raises CheckpointError where transformers
    cannot load it, or would load other weights than the pool reads, or it lacks a parameter."""
    import transformers

    base = pool.base_checkpoint
    if base.warnings and base.adapter is None:  # of two checkpoints in a folder transformers takes the other one
        raise CheckpointError(pool.base, f"{INDEX} and {SINGLE}, which it does not name", "one of the two")
    config = None
    if pool.outputs and tied(base.config):  # another endpoint has an output of its own
        config = transformers.AutoConfig.from_pretrained(base.path, trust_remote_code=False)
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = False
    settings = {} if config is None else {"config": config}
    try:
        model, said = loader(base.config).from_pretrained(
            base.path,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).split("\n")[0][:200]
        hint = "its own code is never run" if base.config.get("auto_map") else ""
        found = f"transformers cannot load it ({reason})"
        raise CheckpointError(pool.base, found, "a supported architecture", hint) from None
    missing = (name for name in said["missing_keys"] if not name.endswith(tuple(pool.outputs)))
    refuse_made_up(pool.base, model, missing)
    if pool.vocabulary is not None:
        speak(model, pool)
    return model.to(pool.device).eval().requires_grad_(False)


def promoted(pool: Pool) -> torch.dtype:
    """The common dtype of the largest tensor: what a recipe without a dtype is exported in."""
    tensors = pool.base_checkpoint.tensors
    floating = [name for name, info in tensors.items() if info.dtype.is_floating_point]
    return pool.common_dtype(Ref(pool.base, max(floating, key=lambda name: tensors[name].nbytes)))
