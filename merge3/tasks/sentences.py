"""What a sentence encoder's folder says of embeddings: how states become one vector, prompts, how long texts may be.

As sentence-transformers lays it out: modules.json lists the steps after the transformer, each in a folder of its own
(1_Pooling/config.json); config_sentence_transformers.json has prompts; sentence_*_config.json how long texts may be.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge3.errors import CheckpointError

# A flag of 1_Pooling/config.json -> the pooling's name, in the order in which several are joined.
POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_MODULES, _PROMPTS, _LENGTHS = "modules.json", "config_sentence_transformers.json", "sentence_*_config.json"
_ENDLESS = 10**9  # tokenizers without a limit have one of thirty digits
_PASSAGES = ("document", "passage", "corpus")  # what candidate texts' prompt is called, first found


@dataclass(frozen=True)
class Sentences:
    """poolings: names of POOLINGS whose results are joined; said: whether the folder says so. include_prompt: whether
    a prompt's tokens are pooled too. query, passage: what comes before a question, and before a text that may answer
    it. limit: how many tokens a text may have, None: as many as the model takes. lower: texts are lower-cased."""

    poolings: tuple[str, ...] = ("mean",)
    said: bool = False
    include_prompt: bool = True
    query: str = ""
    passage: str = ""
    limit: int | None = None
    lower: bool = False


def read_sentences(folder: str | Path) -> Sentences:
    """What a checkpoint's folder says of its sentence embeddings; where it says nothing: the mean of the states.

    Raises CheckpointError for files that cannot be read, and for steps after the transformer that have weights of their
    own or are unknown: the embeddings would be others than the checkpoint's.
    """
    folder = Path(folder)
    modules = _modules(folder)
    pooling = folder / "1_Pooling"
    for kind, path in modules:
        if kind == "Pooling":
            pooling = folder / path
        elif kind == "Transformer" and path:
            expected = "weights beside it, path ''"
            raise CheckpointError(folder / _MODULES, f"the transformer lies in {path!r}", expected, f"give {path}")
        elif kind not in ("Transformer", "Normalize"):
            expected = "Transformer, Pooling, Normalize: others change embeddings, and no merge has their weights"
            raise CheckpointError(folder / _MODULES, f"a module {kind!r}", expected)
    poolings, include = _pooling(pooling / "config.json")
    query, passage = _prompts(folder / _PROMPTS)
    limit, lower = _lengths(folder)
    return Sentences(poolings or ("mean",), bool(poolings), include, query, passage, limit, lower)


def _modules(folder: Path) -> list[tuple[str, str]]:
    """(the module's class, its folder) of modules.json, in order; none without the file."""
    data = _json(folder / _MODULES, list)
    found = []
    for entry in data or ():
        kind, path = (entry.get("type"), entry.get("path", "")) if isinstance(entry, dict) else (None, "")
        if not isinstance(kind, str) or not isinstance(path, str):
            raise CheckpointError(folder / _MODULES, f"an entry {str(entry)[:80]!r}", "modules with type and path")
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise CheckpointError(folder / _MODULES, f"path {path!r}", "a folder of the checkpoint")
        found.append((kind.rpartition(".")[2], path))
    return found


def _pooling(file: Path) -> tuple[tuple[str, ...], bool]:
    """(the poolings, whether prompts are pooled too); no poolings without the file."""
    data = _json(file, dict)
    if data is None:
        return (), True
    named = data.get("pooling_mode")
    named = (named,) if isinstance(named, str) else named
    if named is None:
        named = [name for flag, name in POOLINGS.items() if data.get(flag)]
    if not isinstance(named, (list, tuple)) or not named or not set(named) <= set(POOLINGS.values()):
        raise CheckpointError(file, f"pooling {named!r}", "one or more of " + ", ".join(POOLINGS.values()))
    return tuple(named), bool(data.get("include_prompt", True))


def _prompts(file: Path) -> tuple[str, str]:
    """(a query's prompt, a candidate text's)"""
    data = _json(file, dict) or {}
    prompts = data.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise CheckpointError(file, f"prompts are {str(prompts)[:80]!r}", "names and texts")
    default = data.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise CheckpointError(file, f"default_prompt_name is {default!r}", ", ".join(prompts) or "null")
    otherwise = "" if default is None else prompts[default]
    passage = next((prompts[name] for name in _PASSAGES if name in prompts), otherwise)
    return prompts.get("query", otherwise), passage


def _lengths(folder: Path) -> tuple[int | None, bool]:
    """(how many tokens a text may have, whether it is lower-cased): of the first sentence_*_config.json; the length
    else of the tokenizer, where newer files have it."""
    own = _json(folder / "tokenizer_config.json", dict) or {}
    longest = own.get("model_max_length")
    known = isinstance(longest, int) and 0 < longest < _ENDLESS
    for file in sorted(folder.glob(_LENGTHS)):
        data = _json(file, dict) or {}
        limit = data.get("max_seq_length")
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise CheckpointError(file, f"max_seq_length is {limit!r}", "a number of tokens, or null")
        return limit or (longest if known else None), bool(data.get("do_lower_case", False))
    return None, False  # no sentence encoder's folder


def _json(file: Path, kind: type) -> Any:
    """A file's content; None where there is no such file."""
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(file, f"unreadable ({str(error)[:100]})", "JSON") from None
    if not isinstance(data, kind):
        raise CheckpointError(file, f"found {type(data).__name__}", kind.__name__)
    return data
