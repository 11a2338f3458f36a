"""The tokens of a pool's output: one tokenizer made of those of all endpoints, and which of every endpoint's rows
belongs to which of its tokens.

Tokens are the same where their texts are. The numbering is that of one endpoint, the donor, which also says where a
text ends; `union` adds what the others have beside, in the order of the endpoints and of their own numbers. (mergekit
adds the same tokens in the order of a hash table, another one every time.)
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from merge3.checkpoint.beside import GENERATION, Words, copy_speaking, has_tokenizer
from merge3.checkpoint.modules import copy_modules
from merge3.checkpoint.naming import is_embedding
from merge3.checkpoint.read import Checkpoint
from merge3.errors import CheckpointError, RecipeError
from merge3.files import resource_error
from merge3.recipe import BASE, UNION, Tokenizer

_SIZES = ("vocab_size", "padded_vocab_size")
_NUMBERS = ("_token_id", "_token_index")  # keys of config.json that name tokens
# Those that a model may do without; others, such as an image's token, are asked for.
_OF_TEXTS = {
    f"{name}_token_id"
    for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "decoder_start", "forced_bos", "forced_eos")
}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """tokenizer: as it was asked for, its source being union or an endpoint. donor: see above. tokens: text -> number.
    rows: of every tensor that has one for each token, those that pad included. own: endpoint -> its own row of each
    token, int64 [rows], -1 where it has none. numbers: endpoint -> text -> number, as its own tokenizer has them.
    folder: the output's tokenizer, generation settings and configuration; beside it is room for tensors. unused:
    endpoint -> how many rows of its embedding no token has, which are left out. notes: what is seldom meant. sources:
    the endpoints' own folders.

        vocabulary = open_vocabulary(open_endpoints(["base", "chat"])[0], Tokenizer("union"))
        vocabulary.own["chat"][vocabulary.tokens["<|im_end|>"]]
    """

    tokenizer: Tokenizer
    donor: str
    tokens: dict[str, int]
    rows: int
    own: dict[str, torch.Tensor]
    numbers: dict[str, dict[str, int]] = field(repr=False)
    folder: Path
    unused: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    temporary: object = field(default=None, repr=False)  # what removes the folder when nobody needs it any more
    sources: tuple[Path, ...] = ()

    @cached_property
    def words(self) -> Words:
        """The output's tokenizer, under its own chat template or another."""
        return Words(self.folder, self, self.sources)

    def describe(self) -> str:
        """One line: how many tokens, and whose."""
        said = f"vocabulary: {len(self.tokens):,} tokens, numbered as in {self.donor}, {self.rows:,} rows"
        return said + "".join(f"; {count:,} of {model} left out" for model, count in self.unused.items())

    def describes(self, config: Mapping[str, Any], donor: Mapping[str, Any]) -> dict[str, Any]:
        """A model's config.json with this vocabulary's size and the donor's special tokens. Raises CheckpointError
        where one of them has no row."""
        config = json.loads(json.dumps(config))
        donors = _sections(donor)
        for place, section in enumerate(_sections(config)):
            other = donors[min(place, len(donors) - 1)]  # a language model's for the language model inside another
            for key in [key for key in dict.fromkeys((*section, *other)) if key.endswith(_NUMBERS)]:
                if key in other:
                    section[key] = other[key]
                elif key in _OF_TEXTS:
                    del section[key]
                else:
                    found = f"config.json says nothing of {key}, {section[key]} in a model of another numbering"
                    raise CheckpointError(self.donor, found, "its number", "`tokenizer_source: base` or `union`")
                self._check_number(key, section.get(key))
        sizes = [(section, key) for section in _sections(config) for key in _SIZES if key in section]
        for section, key in sizes or [(_sections(config)[-1], _SIZES[0])]:
            section[key] = self.rows
        return config

    def _check_number(self, key: str, value: Any) -> None:
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and number >= self.rows:
                found = f"config.json: {key} is {number}"
                expected = f"a token: the output's tokenizer has {self.rows}"
                raise CheckpointError(self.donor, found, expected, "a tokenizer that has this token, or another number")


def open_vocabulary(endpoints: dict[str, Checkpoint], tokenizer: Tokenizer) -> Vocabulary:
    """Read the endpoints' tokenizers (no weights) and make the output's. endpoints: base first.

    Raises RecipeError or CheckpointError for models that are not there, tokenizers that are missing, cannot be read
    without running code, have more tokens than their model has rows, or write tokens otherwise than another one.
    """
    tokenizer.check_models(endpoints)
    base = next(iter(endpoints))
    tokenizer = replace(tokenizer, source=base if tokenizer.source == BASE else tokenizer.source)
    donor = base if tokenizer.source == UNION else tokenizer.source
    loaded, notes = _load(endpoints, donor, tokenizer.source == UNION)
    numbers = {model: _numbers(own) for model, own in loaded.items()}
    for model, checkpoint in endpoints.items():
        _check_rows(model, checkpoint, numbers[model])
    output, new = loaded[donor], _new_tokens(tokenizer, donor, loaded)
    keep = tempfile.TemporaryDirectory(prefix="merge3-vocabulary-")
    folder = Path(keep.name) / "tokenizer"
    try:
        folder.mkdir()
        if new:
            output = _extended(output, new, folder)
        else:
            copy_speaking(endpoints[donor].path, folder)
        if (settings := endpoints[donor].path / GENERATION).is_file():
            shutil.copyfile(settings, folder / GENERATION)
        copy_modules(endpoints[base].path, folder)  # what an encoder's states become is the model's, not the tokens'
    except OSError as error:
        raise resource_error(folder, error) from None
    tokens = _numbers(output)
    rows = max(tokens.values()) + 1
    if multiple := tokenizer.pad_to_multiple_of:
        rows = -(-rows // multiple) * multiple
    own = {model: _own_rows(tokens, numbers[model], rows) for model in endpoints}
    counts = {model: _row_count(checkpoint) - len(numbers[model]) for model, checkpoint in endpoints.items()}
    unused = {model: count for model, count in counts.items() if count}
    folders = tuple(checkpoint.path for checkpoint in endpoints.values())
    made = Vocabulary(tokenizer, donor, tokens, rows, own, numbers, folder, unused, tuple(notes), keep, folders)
    _check_rows_of_tokens(made, endpoints)
    config = made.describes(endpoints[base].config, endpoints[donor].config)
    text = json.dumps(config, indent=2)  # for readers that ask it for the model's type
    (folder / "config.json").write_text(text, encoding="utf-8")
    return made


def embedding_of(checkpoint: Checkpoint) -> str | None:
    """The tensor with a row for every token that a model reads; None where none has such a name."""
    return next((name for name in sorted(checkpoint.tensors) if is_embedding(name)), None)


def _sections(config: Mapping[str, Any]) -> list[Any]:
    """A configuration, and that of its text model where it has one of its own."""
    text = config.get("text_config")
    return [config, text] if isinstance(text, Mapping) else [config]


def _load(endpoints: dict[str, Checkpoint], donor: str, union: bool) -> tuple[dict[str, Any], list[str]]:
    """(every endpoint's tokenizer, what had to be assumed). One without its own has the donor's, unless it is asked
    for its tokens, if its embedding has as many rows."""
    loaded: dict[str, Any] = {}
    notes = []
    for model in sorted(endpoints, key=lambda name: name != donor):
        checkpoint = endpoints[model]
        if has_tokenizer(checkpoint.path):
            loaded[model] = _tokenizer(model, checkpoint.path)
            continue
        sizes = [_row_count(endpoints[name]) for name in (model, donor)]
        if union or model == donor or sizes[0] != sizes[1]:
            hint = "copy the files of the tokenizer that it was trained with into its folder"
            raise CheckpointError(model, "no tokenizer files", "a tokenizer, where a recipe says `tokenizer`", hint)
        loaded[model] = loaded[donor]
        notes.append(f"{model}: no tokenizer files; its rows are taken to be numbered as those of {donor}")
    ways = {model: _notation(own) for model, own in loaded.items()}
    for model, way in ways.items():
        if way != ways[donor]:
            found = f"its tokenizer is {way}, that of {donor} {ways[donor]}"
            raise CheckpointError(model, found, "tokenizers that write tokens alike", "texts cannot be compared here")
    return {model: loaded[model] for model in endpoints}, notes


def _tokenizer(model: str, folder: Path):
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a Rust panic of `tokenizers` is a bare Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        found = f"its tokenizer cannot be read ({reason})"
        raise CheckpointError(model, found, "one that transformers reads without its own code") from None
    if not getattr(found, "is_fast", False) or not found.get_vocab():
        raise CheckpointError(model, f"its tokenizer is a {type(found).__name__}", "one with a tokenizer.json")
    return found


def _notation(tokenizer: Any) -> str:
    """How a tokenizer writes its tokens: the kind of its model, and whether bytes stand for themselves."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = data["model"]["type"]
    parts = json.dumps([data.get("pre_tokenizer"), data.get("decoder")], ensure_ascii=False)
    return f"byte-level {kind}" if "ByteLevel" in parts else f"{kind} with ▁" if "▁" in parts else kind


def _numbers(tokenizer: Any) -> dict[str, int]:
    """text -> number, in the order of the numbers."""
    return dict(sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]))


def _row_count(checkpoint: Checkpoint) -> int:
    name = embedding_of(checkpoint)
    return checkpoint.tensors[name].shape[0] if name is not None else 0


def _check_rows(model: str, checkpoint: Checkpoint, numbers: dict[str, int]) -> None:
    name = embedding_of(checkpoint)
    if name is None:
        expected = "one by a name that is known, where a recipe says `tokenizer`"
        raise CheckpointError(model, "no embedding of tokens", expected)
    rows = checkpoint.tensors[name].shape[0]
    token, number = max(numbers.items(), key=lambda pair: pair[1])
    if number >= rows:
        found = f"its tokenizer gives {token!r} the number {number}, tensor {name!r} has {rows} rows"
        raise CheckpointError(model, found, "a row for every token", "resize the model's embeddings, or drop the token")


def _new_tokens(tokenizer: Tokenizer, donor: str, loaded: dict[str, Any]) -> list[Any]:
    """What the donor's tokenizer is to be extended by, in order: plain tokens, then added ones as their tokenizers have
    them (the first where several do), then those that only the recipe names."""
    known, plain, added = set(loaded[donor].get_vocab()), {}, {}
    if tokenizer.source == UNION:
        order = [donor, *(model for model in loaded if model != donor)]
        for model in order:
            special = loaded[model].added_tokens_decoder
            texts = {token.content for token in special.values()}
            plain |= {text: text for text in _numbers(loaded[model]) if text not in texts}
            for _, token in sorted(special.items()):
                added.setdefault(token.content, token)
    wanted = [text for text in plain if text not in known and text not in added]
    own = {token.content for token in loaded[donor].added_tokens_decoder.values()}
    wanted += [token for text, token in added.items() if text not in own]
    seen = known | set(plain) | set(added)
    return wanted + [row.token for row in tokenizer.tokens if row.token not in seen]


def _extended(tokenizer: Any, new: list[Any], folder: Path) -> Any:
    """The tokenizer with more tokens, in a folder; the one given stays as it is."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    output = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    output.add_tokens(new)
    output.save_pretrained(folder)
    return output


def _own_rows(tokens: dict[str, int], numbers: dict[str, int], rows: int) -> torch.Tensor:
    own = torch.full((rows,), -1, dtype=torch.int64)
    at = torch.tensor(list(tokens.values()))
    own[at] = torch.tensor([numbers.get(text, -1) for text in tokens])
    return own


def _check_rows_of_tokens(vocabulary: Vocabulary, endpoints: dict[str, Checkpoint]) -> None:
    """What per-token sources name is there."""
    for row in vocabulary.tokenizer.tokens:
        at = f"tokenizer.tokens.{row.token}"
        if row.number is not None:
            count = _row_count(endpoints[row.model])
            if row.number >= count:
                expected = f"below {count}, the rows of {row.model}"
                raise RecipeError(f"{at}.source.token_id", f"found {row.number}", expected)
        elif row.model is not None:
            wanted = row.token if row.other is None else row.other
            if wanted not in vocabulary.numbers[row.model]:
                has = [model for model, numbers in vocabulary.numbers.items() if wanted in numbers]
                hint = f"{', '.join(has)} has it" if has else "no model has it; {kind: zero} makes a row of zeros"
                found = f"the tokenizer of {row.model} has no {wanted!r}"
                raise RecipeError(f"{at}.source", found, "one of its tokens", hint)
