"""Whether endpoints belong together: the settings they compute with, their vocabularies, and whether they seem to share
a pretraining. What differs here has equal shapes, so a merge runs; it is seldom what somebody wants."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge3.checkpoint import Checkpoint
from merge3.checkpoint.architecture import configuration
from merge3.checkpoint.beside import has_tokenizer, read_json
from merge3.checkpoint.layout import layout
from merge3.checkpoint.modules import module_settings
from merge3.checkpoint.vocabulary import embedding_of

# Settings that change neither what a layer computes nor how many there are; depth is the recipe's business.
_HARMLESS = {
    "_name_or_path", "_commit_hash", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype",
    "use_cache", "vocab_size", "tie_word_embeddings", "num_hidden_layers", "n_layer", "num_layers",
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class",
    "initializer_range", "initializer_factor", "output_attentions", "output_hidden_states", "return_dict",
    "torchscript", "pretraining_tp", "gradient_checkpointing", "chunk_size_feed_forward", "is_decoder",
    "add_cross_attention", "cross_attention_hidden_size", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "use_flash_attn", "router_aux_loss_coef", "output_router_logits", "prefix",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "classifier_dropout", "unsloth_version", "unsloth_fixed", "model_name",
}  # fmt: skip
_SAMPLES, _ELEMENTS = 3, 1 << 20
_FAR, _ALIGNED = 0.9, 0.2  # of a fine-tune, ‖τ‖/‖θ‖ is far below and the cosine of θ and its own weights near 1


def doubts(endpoints: Mapping[str, Checkpoint], words: bool, towers: Iterable[str]) -> list[str]:
    """One line for each thing about endpoints that can be merged and is seldom meant. endpoints: base first. words:
    whether vocabularies count. towers: those that are merged into the language model inside the base."""
    base, *others = endpoints
    lines = [*dict.fromkeys(line for checkpoint in endpoints.values() for line in checkpoint.warnings)]
    if words and (line := _wordless(endpoints)):
        lines.append(line)
    read = functools.cache(vocabulary)  # the base's once for all; of a large one this takes a second
    for model in others:
        lines += differences(base, endpoints[base], model, endpoints[model], words, model in towers, read)
    return lines


def _wordless(endpoints: Mapping[str, Checkpoint]) -> str:
    """A base that reads tokens and has no tokenizer, where another endpoint has one."""
    base, *others = endpoints
    if has_tokenizer(endpoints[base].path) or embedding_of(endpoints[base]) is None:
        return ""
    found = next((model for model in others if has_tokenizer(endpoints[model].path)), None)
    if found is None:
        return ""
    said = f"{base}: no tokenizer files, so the output has none, and {found} has some"
    return f"{said}; `tokenizer_source: {found}` in the recipe takes them"


def differences(
    base_name: str,
    base: Checkpoint,
    model: str,
    other: Checkpoint,
    words: bool,
    in_tower: bool,
    read: Callable[[Path], Mapping[str, int]],
) -> list[str]:
    """One line for each thing that sets an endpoint apart from the base, with both values.

    in_tower: compare it with the language model inside the base.

    words: whether vocabularies count; rows that were remapped to one vocabulary all match. read: `vocabulary`. Reads a
    few MB of weights.
    """
    lines = []
    base = _language_model(base) if in_tower else base
    own, theirs = dict(_flat(base.config)), dict(_flat(other.config))
    if own != theirs:  # with defaults filled in they may be equal yet
        own, theirs = _settings(base.config), _settings(other.config)
    for key in sorted(set(own) & set(theirs) if own and theirs else ()):
        if _of_depths(own[key], theirs[key]):
            continue
        if own[key] != theirs[key] and not (in_tower and key == "model_type"):  # such as qwen2 and qwen2_vl_text
            found = f"{key} is {theirs[key]!r}, {own[key]!r} in the base {base_name}"
            lines.append(f"{model}: {found}; the merge computes with the base's")
    mine, others = module_settings(base.path), module_settings(other.path)
    for what, value in others.items():
        if value != mine[what] and any(others.values()):  # an adapter says nothing of embeddings
            found = f"{what} of its embeddings: {value or 'none'}, {mine[what] or 'none'} in the base {base_name}"
            lines.append(f"{model}: {found}; the merge has the base's")
    if line := _stranger(base, other):
        lines.append(f"{model}: {line} {base_name}")
    own, theirs = (read(base.path), read(other.path)) if words else ({}, {})
    told = [_other_words(base_name, own, theirs)] if words else []
    if words and not in_tower:
        told.append(_other_rows(base_name, base, other))
    if words and not any(told):  # either says as much
        told.append(_lost_words(base, own, other, theirs))
    return lines + [f"{model}: {line}" for line in told if line]


def _of_depths(own: Any, theirs: Any) -> bool:
    """Whether two settings are lists with an entry for each layer, of unequal depths: what meets, the recipe says."""
    return isinstance(own, list) and isinstance(theirs, list) and len(own) != len(theirs)


def _language_model(base: Checkpoint) -> Checkpoint:
    """A model with eyes or ears as one of the language model inside: with its settings alone."""
    inner = base.config.get("text_config")
    return replace(base, config=dict(inner)) if isinstance(inner, Mapping) else base


def _other_rows(base_name: str, base: Checkpoint, other: Checkpoint) -> str:
    """Padded, cut or extended embeddings, which would stay the base's."""
    own, theirs = embedding_of(base), embedding_of(other)
    if own is None or theirs is None:
        return ""
    rows, found = base.tensors[own].shape[0], other.tensors[theirs].shape[0]
    if rows == found:
        return ""
    said = f"embeddings of {found:,} rows, {rows:,} in the base {base_name}: the base's stay as they are"
    return said + "; `tokenizer_source: base` or `union` in the recipe merges them token by token"


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting that matters, defaults filled in where transformers knows the type, nested ones by their path."""
    known = configuration(config)
    return dict(_flat(known.to_dict() if known is not None else config))


def _flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if key in _HARMLESS or key.endswith(("_token_id", "dropout", "_dropout_prob", "_pdrop", "_dropout")):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield path + key, list(value) if isinstance(value, tuple) else value


def _stranger(base: Checkpoint, other: Checkpoint) -> str:
    """What gives two pretrainings away: weights as far from the base as they are long, in another direction.

    Measured on up to a million elements each of three matrices of the stack; nothing for models without any.
    """
    found = layout(base.tensors)
    names = []
    for name, info in base.tensors.items():
        matrix = len(info.shape) >= 2 and min(info.shape) > 1 and info.dtype.is_floating_point
        shared = name in other.tensors and other.tensors[name].shape == info.shape
        if found.layer_of(name) is not None and matrix and shared:
            names.append(name)
    if not names:
        return ""
    names = sorted(names)[:: max(1, len(names) // _SAMPLES)][:_SAMPLES]
    far, cosines = [], []
    for name in names:
        theta, weights = (c.get(name).reshape(-1)[:_ELEMENTS].double() for c in (base, other))
        length, own = float(theta.norm()), float(weights.norm())
        if length == 0 or own == 0:
            return ""
        far.append(float((weights - theta).norm()) / length)
        cosines.append(float(theta @ weights) / (length * own))
    if min(far) > _FAR and max(cosines) < _ALIGNED:
        return (
            f"weights that are {min(far):.2g} times the base's away from it, at a cosine of {max(cosines):.2f} to it "
            f"(in {names[0]}); it does not seem to be a fine-tune of"
        )
    return ""


def _other_words(base_name: str, own: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """A token that has another number there. Tokens that only one of the two has are another matter."""
    if not any(theirs.get(token, number) != number for token, number in own.items()):
        return ""
    return f"its tokenizer numbers tokens otherwise than that of the base {base_name}: rows of embeddings do not match"


def _lost_words(base: Checkpoint, own: Mapping[str, int], other: Checkpoint, theirs: Mapping[str, int]) -> str:
    """Tokens that the output's tokenizer, which is the base's, takes apart: added in rows that padded, or renamed."""
    if not has_tokenizer(base.path):
        return ""
    theirs = theirs or _added(other.path)
    if not own:  # a vocabulary that only sentencepiece reads: what was added to it can be compared
        own, theirs = _added(base.path), _added(other.path)
    lost = sorted((token for token in theirs if token not in own), key=theirs.__getitem__)
    if not lost:
        return ""
    some = f"{'e.g. ' if len(lost) > 3 else ''}{', '.join(map(repr, lost[:3]))}"
    said = f"{len(lost):,} of its tokens {'is' if len(lost) == 1 else 'are'} not in the output's tokenizer ({some})"
    return f"{said}, which splits them; `tokenizer_source: union` in the recipe keeps them"


def vocabulary(folder: Path) -> dict[str, int]:
    """token -> number, added tokens included, of a folder's tokenizer.json, else of vocab.json or vocab.txt; empty
    where there is none to read."""
    try:
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        words = data["model"]["vocab"]
        # Unigram models list [token, score] in the order of their numbers.
        numbered = dict(words) if isinstance(words, dict) else {entry[0]: number for number, entry in enumerate(words)}
        return numbered | {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        pass
    words = _numbers(read_json(folder / "vocab.json"))
    if not words:
        with contextlib.suppress(OSError, ValueError):
            lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
            words = {line.rstrip("\r"): number for number, line in enumerate(lines) if line}
    if not words:
        return {}
    kept = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    special = {}
    for number, token in kept.items() if isinstance(kept, dict) else ():
        if isinstance(token, dict) and number.isdigit():
            special[token.get("content")] = int(number)
    return words | _numbers(special) | _added(folder)


def _added(folder: Path) -> dict[str, int]:
    return _numbers(read_json(folder / "added_tokens.json"))


def _numbers(words: Mapping[Any, Any]) -> dict[str, int]:
    """What numbers texts; a file may have that name and hold something else."""
    fits = all(isinstance(token, str) and isinstance(number, int) for token, number in words.items())
    return dict(words) if fits else {}
