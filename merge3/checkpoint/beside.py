"""What a checkpoint needs to read and write text: its tokenizer's files, its chat template, where a text ends."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from merge3.checkpoint.modules import copy_modules
from merge3.files import resource_error

# Each of these says which tokens there are: `vocab_files_names` of transformers' tokenizers, and those of remote code.
_TOKENS = (
    "tokenizer.json", "tekken.json", "*.model", "*.spm", "*.tiktoken", "vocab*", "*vocab.json", "sentencepiece*",
    "dict.txt", "prophetnet.tokenizer",
)  # fmt: skip
# Others only say how they are treated.
TOKENIZER_FILES = (
    *_TOKENS, "tokenizer*", "audio_tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "bpe.codes", "byte_maps.json", "emoji.json", "normalizer.json", "word_shape.json", "word_pronunciation.json",
    "chat_template.*", "additional_chat_templates/*.jinja",
)  # fmt: skip
GENERATION = "generation_config.json"
# What prepares prompts with images in them beside a tokenizer.
PROCESSORS = ("config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_NOT_TOLD = ("_name_or_path", "transformers_version")  # keys that say where a file comes from
# What a snapshot of the hub is asked for: weights, settings, code, whatever a tokenizer has; and what it is not.
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.py", *TOKENIZER_FILES)
NO_HUB_FILES = tuple(f"*{suffix}" for suffix in _WEIGHTS if suffix != ".safetensors")


def speaking_files(folder: Path) -> dict[str, Path]:
    """Name in a checkpoint -> file, of all that goes with a tokenizer, generation settings included: they name its
    tokens."""
    found = (file for pattern in (*TOKENIZER_FILES, GENERATION) for file in sorted(folder.glob(pattern)))
    return {file.relative_to(folder).as_posix(): file for file in found if _speaks(file)}


def copy_speaking(source: Path, target: Path) -> None:
    """Lay speaking_files of one folder into another. Raises OSError where they cannot be written."""
    for name, file in speaking_files(source).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    return any(_speaks(file) for pattern in _TOKENS for file in folder.glob(pattern))


def _speaks(file: Path) -> bool:
    return file.is_file() and file.suffix not in _WEIGHTS


def template_of(folder: Path) -> str | None:
    """A checkpoint's chat template, `default` where it has several; None where it has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = read_json(folder / name).get("chat_template")
        if isinstance(found, list):
            named = [entry for entry in found if isinstance(entry, dict)]
            found = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty where there is none to read."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def digests(folder: Path) -> dict[str, str]:
    """File -> a digest of what it says, of those beside the weights that change what a model answers: tokenizer, chat
    template, generation settings, configuration, processors."""
    files = speaking_files(folder) | {name: folder / name for name in PROCESSORS}
    return {name: _digest(file) for name, file in sorted(files.items()) if file.is_file()}


def _digest(file: Path) -> str:
    content = file.read_bytes()
    if file.name in (*PROCESSORS, GENERATION) and (said := read_json(file)):
        content = json.dumps({key: said[key] for key in sorted(said) if key not in _NOT_TOLD}, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


class Words:
    """What a model is asked with: a folder's tokenizer, and the same under other chat templates, which are folders of
    their own and go with this object. keep: what else has to stay as long; sources: folders that it was made of, the
    base's first, where it is not that one's own."""

    def __init__(self, folder: Path, keep: object = None, sources: Sequence[Path] = ()):
        self._folders: dict[str | None, Path] = {None: folder}
        self._keep, self._sources = keep, tuple(sources) or (folder,)

    @cached_property
    def files(self) -> dict[str, str]:
        """`the base's FILE` -> its digest; where others' tokenizers count too, theirs as `model N's FILE`."""
        found = {}
        for place, folder in enumerate(self._sources):
            whose = f"model {place}'s" if place else "the base's"
            found |= {f"{whose} {name}": digest for name, digest in digests(folder).items()}
        return found

    def folder(self, template: str | None = None) -> Path:
        """The folder with this chat template, with its own where that is None. Raises ResourceError."""
        if template not in self._folders:
            base, made = self._folders[None], Path(self._temporary.name) / str(len(self._folders))
            try:
                made.mkdir()
                for file in (f for name in PROCESSORS for f in base.glob(name)):
                    shutil.copyfile(file, made / file.name)
                copy_speaking(base, made)
                copy_modules(base, made)
                (made / "chat_template.jinja").write_text(template, encoding="utf-8")
            except OSError as error:
                raise resource_error(made, error) from None
            self._folders[template] = made
        return self._folders[template]

    @cached_property
    def _temporary(self) -> tempfile.TemporaryDirectory:
        return tempfile.TemporaryDirectory(prefix="merge3-words-")
