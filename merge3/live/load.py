"""The base as a transformers model, and which of its tensors a checkpoint's names stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from merge3.checkpoint.architecture import configuration, loading, tied
from merge3.checkpoint.layout import Ref
from merge3.checkpoint.naming import is_buffer
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
    """The base as a transformers model, for inference, on the pool's device. Raises CheckpointError."""
    import transformers

    base = pool.base_checkpoint
    config = None
    if pool.outputs and tied(base.config):  # another endpoint has an output of its own
        config = transformers.AutoConfig.from_pretrained(base.path, trust_remote_code=False)
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = False
    settings = {} if config is None else {"config": config}
    try:
        model = loader(base.config).from_pretrained(
            base.path, dtype=dtype, trust_remote_code=False, use_safetensors=True, **settings
        )
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).split("\n")[0][:200]
        hint = "its own code is never run" if base.config.get("auto_map") else ""
        found = f"transformers cannot load it ({reason})"
        raise CheckpointError(pool.base, found, "a supported architecture", hint) from None
    if pool.vocabulary is not None:
        speak(model, pool)
    return model.to(pool.device).eval().requires_grad_(False)


def promoted(pool: Pool) -> torch.dtype:
    """The common dtype of the largest tensor: what a recipe without a dtype is exported in."""
    tensors = pool.base_checkpoint.tensors
    floating = [name for name, info in tensors.items() if info.dtype.is_floating_point]
    return pool.common_dtype(Ref(pool.base, max(floating, key=lambda name: tensors[name].nbytes)))


def bind(model: torch.nn.Module, pool: Pool) -> dict[str, torch.Tensor]:
    """Checkpoint name -> the live tensor, for every tensor of the base, and every output that is held apart.

    Raises CheckpointError for a tensor that is no parameter, unless the model computes or ignores it.
    """
    live = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    prefix = getattr(model, "base_model_prefix", "")
    bound, missing = {}, []
    shapes = {name: info.shape for name, info in pool.base_checkpoint.tensors.items()}
    apart = {name: pool.shape(Ref(pool.base, name)) for name in pool.outputs}
    for name, shape in (shapes | apart).items():
        tensor = live.get(name, live.get(f"{prefix}.{name}", live.get(name.removeprefix(f"{prefix}."))))
        if tensor is None or tuple(tensor.shape) != shape:
            missing.append(name)
        else:
            bound[name] = tensor.data
    missing = [name for name in missing if not is_buffer(name, shapes.get(name, ()))]
    if missing and (said := loading(pool.base_checkpoint.config, shapes)):
        missing = [name for name in missing if name not in said.unexpected]  # transformers does not load them either
    if missing:
        found = f"tensor {missing[0]!r} (one of {len(missing)}) is no parameter of {type(model).__name__}"
        raise CheckpointError(pool.base, found, "an architecture whose checkpoint names are its parameters")
    return bound
