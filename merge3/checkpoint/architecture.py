"""What transformers itself says of a configuration: its settings with every default, and which parameters it needs.

Nothing is read for it: models are built, and tensors loaded, on the `meta` device, by transformers' own loading code, so
that renamed, fused, tied and ignored tensors count as they do when somebody loads the checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Loading:
    """What loading would say. missing: parameters without a tensor; unexpected: tensors without a parameter;
    mismatched: (tensor, stored shape, the architecture's shape). architecture: the class, e.g. LlamaForCausalLM."""

    architecture: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, Shape, Shape], ...]


def loading(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Loading | None:
    """Load tensors of these names and shapes into the architecture of a config.json, on the meta device.

    None where this transformers has no such architecture (custom code, or none named).
    """
    import transformers

    architecture = (config.get("architectures") or [""])[0]
    kind, settings = getattr(transformers, architecture or "-", None), configuration(config)
    if kind is None or settings is None or not hasattr(kind, "from_pretrained"):
        return None
    tensors = {name: torch.empty(shape, dtype=torch.float32, device="meta") for name, shape in shapes.items()}
    with _silence():
        _, found = kind.from_pretrained(
            None, config=settings, state_dict=tensors, device_map={"": "meta"}, dtype=torch.float32,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    mismatched = tuple(sorted((name, tuple(stored), tuple(own)) for name, stored, own in found["mismatched_keys"]))
    wrong = {name for name, *_ in mismatched}
    return Loading(
        architecture, tuple(sorted(set(found["missing_keys"]) - wrong)), tuple(sorted(found["unexpected_keys"])), mismatched
    )


def configuration(config: Mapping[str, Any]):
    """The transformers configuration object of a config.json, defaults filled in; None for a type it does not know."""
    from transformers import AutoConfig

    settings = {k: v for k, v in config.items() if k != "model_type"}
    try:
        with _silence():
            return AutoConfig.for_model(config.get("model_type", ""), **settings)
    except (KeyError, ValueError, TypeError, AttributeError, ImportError):
        return None


def tied(config: Mapping[str, Any]) -> bool:
    """Whether a config.json ties the head to the embedding; where it does not say, its class's default counts."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, Mapping) else {}):
        if "tie_word_embeddings" in section:
            return bool(section["tie_word_embeddings"])
    settings = configuration(config) if config.get("model_type") else None
    return bool(getattr(settings, "tie_word_embeddings", False))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """transformers reports missing and unexpected tensors itself, and with a progress bar; here they are a result."""
    from transformers.utils import logging as reports

    level, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity(logging.CRITICAL)
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(level)
        if bars:
            reports.enable_progress_bar()
