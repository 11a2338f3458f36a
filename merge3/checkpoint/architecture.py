"""What transformers itself says of a configuration: its settings with every default, and which parameters it needs.

Nothing is read for it: models are built, and tensors loaded, on the `meta` device, by transformers' own loading code,
so that renamed, fused, tied and ignored tensors count as they do when somebody loads the checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from merge3 import __version__
from merge3.checkpoint.depth import per_layer_lists, stack_section
from merge3.errors import CheckpointError, ResourceError
from merge3.files import write_atomically

Shape = tuple[int, ...]
_NO_CONFIGURATION = (LookupError, ValueError, TypeError, AttributeError, ImportError, StrictDataclassError)
# Attributes of a layer's modules that say where it stands, or that only training needs.
_NO_KIND = re.compile(r"^_|(^|_)(idx|index|id|number)$|layer_?(idx|id)|drop|^training$")


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
    return _remembered([config, sorted(shapes.items())], lambda: _loading(config, shapes), asdict, _read_loading)


def ties(config: Mapping[str, Any]) -> list[list[str]]:
    """Parameters that are one and the same in the architecture of a config.json, by their names in the model: the one
    that is stored first, then those that share it. Empty where `loading` is None. Remembered as that is."""
    return _ties_of(json.dumps(config, sort_keys=True, default=str))


@functools.lru_cache(64)
def _ties_of(text: str) -> list[list[str]]:
    config = json.loads(text)
    return _remembered(["of one tensor", config], lambda: _ties(config), list, list) or []


def _ties(config: Mapping[str, Any]) -> list[list[str]] | None:
    built = _built(config, {})
    if built is None:
        return None
    groups: dict[str, list[str]] = {}
    for name, source in built[0].all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(name)
    for source in [source for source in groups if any(source in group[1:] for group in groups.values())]:
        other = next(group for group in groups.values() if source in group[1:])
        other += [name for name in groups.pop(source) if name not in other]
    return list(groups.values())


def _remembered(question: list, ask: Callable[[], Any], said: Callable[[Any], Any], read: Callable[[Any], Any]) -> Any:
    """The answer to a question, kept in a file of the cache where it is not None. said, read: to JSON and back."""
    question = [*question, [__version__, metadata.version("transformers"), torch.__version__]]
    file = _cache() / f"{hashlib.sha256(json.dumps(question, sort_keys=True, default=str).encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return read(json.loads(file.read_text(encoding="utf-8")))
    found = ask()
    if found is not None:
        with contextlib.suppress(OSError, ResourceError):  # a memory that cannot be written is no reason to fail
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(said(found)))
    return found


def _read_loading(kept: Mapping[str, Any]) -> Loading:
    wrong = tuple((name, tuple(stored), tuple(own)) for name, stored, own in kept["mismatched"])
    return Loading(kept["architecture"], tuple(kept["missing"]), tuple(kept["unexpected"]), wrong)


def _cache() -> Path:
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "merge3" / "architectures"


def _loading(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Loading | None:
    built = _built(config, shapes)
    if built is None:
        return None
    found = built[1]
    mismatched = tuple(sorted((name, tuple(stored), tuple(own)) for name, stored, own in found["mismatched_keys"]))
    wrong = {name for name, *_ in mismatched}
    return Loading(
        config["architectures"][0],
        tuple(sorted(set(found["missing_keys"]) - wrong)),
        tuple(sorted(found["unexpected_keys"])),
        mismatched,
    )


def _built(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> tuple[Any, dict[str, Any]] | None:
    """(the model of a config.json on the meta device, what was said of tensors of these names and shapes); None as of
    `loading`."""
    import transformers

    architecture = (config.get("architectures") or [""])[0]
    kind, settings = getattr(transformers, architecture or "-", None), configuration(config)
    if kind is None or settings is None or not hasattr(kind, "from_pretrained"):
        return None
    tensors = {name: torch.empty(shape, dtype=torch.float32, device="meta") for name, shape in shapes.items()}
    try:
        with _silence():
            return kind.from_pretrained(
                None,
                config=settings,
                state_dict=tensors,
                device_map={"": "meta"},
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (ImportError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError):
        return None  # one that this transformers names and cannot build, such as for want of a package


def layer_kinds(config: Mapping[str, Any], prefix: str) -> list[dict[str, Any]] | None:
    """What the modules of each layer are and compute with, beside tensors: `self_attn.sliding_window` -> 512. Where a
    layer stands is no part of it, nor what only training needs. prefix: what stands before the layers' numbers.

    None where `loading` would be, or the model has no such stack. Remembered as that is.
    """
    return _remembered(["kinds of layers", config, prefix], lambda: _layer_kinds(config, prefix), list, list)


def _layer_kinds(config: Mapping[str, Any], prefix: str) -> list[dict[str, Any]] | None:
    built = _built(config, {})
    if built is None:
        return None
    stacks = {name: m for name, m in built[0].named_modules() if isinstance(m, torch.nn.ModuleList)}
    # A checkpoint may have a prefix more or less than the model, and names of old.
    near = [name for name in stacks if f".{name}".endswith(f".{prefix}") or f".{prefix}".endswith(f".{name}")]
    like = [name for name in stacks if name.rpartition(".")[2] == prefix.rpartition(".")[2]]
    places = near or like
    return [_kind(layer) for layer in stacks[places[0]]] if len(places) == 1 else None


def _kind(layer: torch.nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        found[name] = type(module).__name__
        for key, value in vars(module).items():
            if isinstance(value, bool | int | float | str | None) and not _NO_KIND.search(key):
                found[f"{name}.{key}".removeprefix(".")] = value
    return found


def layer_lists(config: Mapping[str, Any], prefix: str) -> dict[str, list] | None:
    """The settings with one entry for each layer that transformers makes of a config.json; None for a type that it does
    not know. prefix: as of `layer_kinds`. Remembered as `loading` is."""
    return _lists_of(json.dumps(config, sort_keys=True, default=str), prefix)


@functools.lru_cache(64)  # in a process too: a live model asks it for every merge whose layers are not the base's
def _lists_of(text: str, prefix: str) -> dict[str, list] | None:
    config = json.loads(text)
    return _remembered(["lists of layers", config, prefix], lambda: _layer_lists(config, prefix), dict, dict)


def _layer_lists(config: Mapping[str, Any], prefix: str) -> dict[str, list] | None:
    known = configuration(config)
    return None if known is None else per_layer_lists(stack_section(known.to_dict(), prefix))


def why_not(config: Mapping[str, Any]) -> str:
    """In one line, why transformers makes no configuration object of a config.json; empty where it does."""
    try:
        _configured(config)
    except _NO_CONFIGURATION as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[-1].strip()[:300]
    return ""


def configuration(config: Mapping[str, Any]):
    """The transformers configuration object of a config.json, defaults filled in; None for a type it does not know."""
    try:
        return _configured(config)
    except _NO_CONFIGURATION:
        return None


def _configured(config: Mapping[str, Any]):
    from transformers import AutoConfig

    settings = {k: _with_floats(v) for k, v in config.items() if k != "model_type"}
    with _silence():
        return AutoConfig.for_model(config.get("model_type", ""), **settings)


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


def refuse_made_up(where: object, model: torch.nn.Module, missing: Iterable[str]) -> None:
    """Raises CheckpointError for parameters that transformers found no tensor for. where: the checkpoint."""
    if names := sorted(missing):
        found = f"no tensor {names[0]!r} (one of {len(names)}), and numbers would be made up for it"
        raise CheckpointError(where, found, f"every parameter of {type(model).__name__}")


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
