"""What transformers itself says of a configuration: its settings with every default, and which parameters it needs.

Nothing is read for it: models are built, and tensors loaded, on the `meta` device, by transformers' own loading code,
so that renamed, fused, tied and ignored tensors count as they do when somebody loads the checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from merge3 import __version__
from merge3.errors import ResourceError
from merge3.files import write_atomically

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

    None where this transformers has no such architecture (custom code, or none named), or cannot build it.
    Importing transformers takes longer than a small merge, and the answer depends on nothing but what is asked: it is
    remembered in the user's cache folder ($XDG_CACHE_HOME/merge3, or ~/.cache/merge3).
    """
    versions = [__version__, metadata.version("transformers"), torch.__version__]
    question = [config, sorted(shapes.items()), versions]
    file = _cache() / f"{hashlib.sha256(json.dumps(question, sort_keys=True, default=str).encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(file.read_text())
        wrong = tuple((name, tuple(stored), tuple(own)) for name, stored, own in kept["mismatched"])
        return Loading(kept["architecture"], tuple(kept["missing"]), tuple(kept["unexpected"]), wrong)
    found = _loading(config, shapes)
    if found is not None:
        with contextlib.suppress(OSError, ResourceError):  # a memory that cannot be written is no reason to fail
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(asdict(found)))
    return found


def _cache() -> Path:
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "merge3" / "architectures"


def _loading(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Loading | None:
    import transformers

    architecture = (config.get("architectures") or [""])[0]
    kind, settings = getattr(transformers, architecture or "-", None), configuration(config)
    if kind is None or settings is None or not hasattr(kind, "from_pretrained"):
        return None
    tensors = {name: torch.empty(shape, dtype=torch.float32, device="meta") for name, shape in shapes.items()}
    try:
        with _silence():
            _, found = kind.from_pretrained(
                None,
                config=settings,
                state_dict=tensors,
                device_map={"": "meta"},
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return None  # one that this transformers names and cannot build, such as for want of a package
    mismatched = tuple(sorted((name, tuple(stored), tuple(own)) for name, stored, own in found["mismatched_keys"]))
    wrong = {name for name, *_ in mismatched}
    return Loading(
        architecture,
        tuple(sorted(set(found["missing_keys"]) - wrong)),
        tuple(sorted(found["unexpected_keys"])),
        mismatched,
    )


def configuration(config: Mapping[str, Any]):
    """The transformers configuration object of a config.json, defaults filled in; None for a type it does not know."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    settings = {k: _with_floats(v) for k, v in config.items() if k != "model_type"}
    try:
        with _silence():
            return AutoConfig.for_model(config.get("model_type", ""), **settings)
    except (KeyError, ValueError, TypeError, AttributeError, ImportError, StrictDataclassError):
        return None


def _with_floats(value: Any) -> Any:
    """A value of config.json with the floats that JSON has no form for, as transformers writes them: infinity, NaN."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_floats(part) for key, part in value.items()}
    return [_with_floats(part) for part in value] if isinstance(value, list) else value


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
