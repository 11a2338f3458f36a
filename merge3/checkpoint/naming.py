"""One model's tensors go by several names: with and without the backbone's prefix, old names of norms, a head that is
the embedding. And some tensors are no weights at all."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping

from merge3.checkpoint.layout import EMBEDDING, layout, stack_of

# Outputs that may share the weight of an input: a head's name -> what stores the shared tensor.
_TIES = {
    "lm_head.weight": EMBEDDING,
    "embed_out.weight": EMBEDDING,
    "cls.predictions.decoder.weight": EMBEDDING,
    "lm_head.decoder.weight": EMBEDDING,
    "vocab_projector.weight": EMBEDDING,
    "cls.predictions.decoder.bias": re.compile(r"^cls\.predictions\.bias$"),
    "lm_head.decoder.bias": re.compile(r"^lm_head\.bias$"),
}
# Heads of language models, tied or not: one row, and perhaps one bias, for every token.
_HEAD = re.compile(
    r"(^|\.)(lm_head(\.decoder)?|embed_out|output|output_layer|vocab_projector|cls\.predictions(\.decoder)?)\.(weight|bias)$"
    r"|(^|\.)final_logits_bias$"
)
_OLD_NORMS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_BUFFERS = re.compile(r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(^|\.)position_ids|\.masked_bias)$")
_MASKS = re.compile(r"\.(attn|attention|self_attention)\.bias$")


def renamed(names: Collection[str], base: Collection[str] | None = None) -> dict[str, str]:
    """What to call each tensor of a checkpoint: today's names of norms, and the prefix that the base's names have."""
    result = {name: _modern(name) for name in names}
    if base is None:
        return result
    own, theirs = layout(result.values()).prefix, layout(base).prefix
    if own == theirs or not own or not theirs:
        return result
    if theirs.endswith(f".{own}"):
        prefix = theirs.removesuffix(own)
        for name, new in result.items():
            if new not in base and not is_head(new):
                result[name] = prefix + new
        return result
    if own.endswith(f".{theirs}"):
        prefix = own.removesuffix(theirs)
        return {name: new.removeprefix(prefix) for name, new in result.items()}
    return result


def tie_source(name: str, names: Iterable[str]) -> str | None:
    """The tensor that a tied output shares; None where `name` is no such output, or the tensor is not there."""
    pattern = next((p for head, p in _TIES.items() if name == head or name.endswith(f".{head}")), None)
    return next((n for n in names if pattern.search(n)), None) if pattern else None


def tie_targets(names: Iterable[str]) -> list[str]:
    """The outputs among these names that a configuration may tie."""
    return [n for n in names if any(n == head or n.endswith(f".{head}") for head in _TIES)]


def has_copies(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the largest table outside layers is there twice under names that are no known outputs: its model may tie
    them, which its architecture has to be asked. shapes: of all tensors."""
    known = set(tie_targets(shapes))
    tables = [s for name, s in shapes.items() if len(s) == 2 and stack_of(name) is None and name not in known]
    return bool(tables) and tables.count(max(tables, key=math.prod)) > 1


def is_head(name: str) -> bool:
    """Whether a name stands outside the backbone, so that no prefix is missing there."""
    return name in _TIES or name.startswith(("lm_head.", "cls.", "classifier.", "score.", "qa_outputs.", "v_head."))


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a mask, a table of positions or frequencies: models compute these themselves."""
    return bool(_BUFFERS.search(name)) or (bool(_MASKS.search(name)) and len(shape) == 4)


def _modern(name: str) -> str:
    for old, new in _OLD_NORMS.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def is_embedding(name: str) -> bool:
    """Whether a tensor has a row for every token that a model reads."""
    return bool(EMBEDDING.search(name)) or name.endswith("backbone.embeddings.weight")  # the latter Mamba's


def by_token(name: str) -> bool:
    """Whether a tensor outside the layers has a row for every token: an embedding, a head of a language model."""
    return is_embedding(name) or bool(_HEAD.search(name))
