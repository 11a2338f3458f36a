"""What makes and what reads each space of a model's units, by family of transformers' architectures.

A space is what one matching is about: the residual stream, the hidden channels of one MLP, what attention heads make.
A row says for each dimension of a module's weight which space it makes (`+space`) or reads (`-space`), in torch's own
order; a bias, a norm and its statistics have the first alone. Heads are matched as blocks: their queries, keys, values
and what they write are four spaces with one matching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from merge3.errors import BadInput


class Row(NamedTuple):
    """axes: of the weight's dimensions. layer: of the stack; what comes before it counts as of the first layer, what
    comes after as of the last, and heads as of one more."""

    axes: tuple[str, ...]
    layer: int


class Point(NamedTuple):
    """Where a space is seen: what a module is given, or gives."""

    module: str
    given: bool
    layer: int


@dataclass(frozen=True)
class Attention:
    """One layer's. query, key, value, mixed: names of its spaces; mixed is what the heads write. heads: of keys and
    values; each has `share` heads of queries, all of `width`. rotary: whether the places within a head mean
    something."""

    query: str
    key: str
    value: str
    mixed: str
    heads: int
    share: int
    width: int
    rotary: bool

    @property
    def spaces(self) -> tuple[str, str, str, str]:
        """All four."""
        return self.query, self.key, self.value, self.mixed


@dataclass
class Map:
    """Of one model. rows: module, or tensor that is no module's -> Row; seen: space -> where; attentions: of layers
    with heads. layers: how many steps of depth there are."""

    layers: int
    rows: dict[str, Row] = field(default_factory=dict)
    seen: dict[str, list[Point]] = field(default_factory=dict)
    attentions: list[Attention] = field(default_factory=list)

    def add(self, layer: int, modules: Mapping[str, tuple[str, ...]]) -> None:
        """Rows of one layer."""
        for name, axes in modules.items():
            self.rows[name] = Row(axes, layer)

    def see(self, space: str, module: str, layer: int, given: bool = False) -> None:
        """One more place where a space is seen."""
        self.seen.setdefault(space, []).append(Point(module, given, layer))

    def row(self, tensor: str) -> Row | None:
        """Of a tensor of the state; None where the map has none."""
        owner, _, last = tensor.rpartition(".")
        if tensor in self.rows:
            return self.rows[tensor]
        if owner not in self.rows:
            return None
        axes, layer = self.rows[owner]
        if last == "weight":
            return Row(axes, layer)
        return Row(axes[:1] if last in ("bias", "running_mean", "running_var") else (), layer)

    def made(self) -> Iterator[tuple[str, Row]]:
        """(space, the row of what makes it), once a row."""
        for row in self.rows.values():
            for axis in row.axes:
                if axis.startswith("+"):
                    yield axis[1:], row


def map_of(model: torch.nn.Module) -> Map:
    """The map of a live transformers model. Raises BadInput for a family without one, or a tensor that it lacks."""
    kind = model.config.model_type
    name = type(model).__name__
    if kind not in FAMILIES:
        raise BadInput(name, f"no map of its units, model_type {kind!r}", f"one of {', '.join(FAMILIES)}")
    bare = model is model.base_model
    found = FAMILIES[kind](model, "" if bare else f"{model.base_model_prefix}.")
    there: set[str] = set()
    for tensor in model.state_dict():
        if found.row(tensor) is None:
            raise BadInput(name, f"tensor {tensor!r}, of which the map of {kind} says nothing", "a plain model")
        there |= {tensor, tensor.rpartition(".")[0]}
    found.rows = {name: row for name, row in found.rows.items() if name in there}
    spaces = {axis[1:] for row in found.rows.values() for axis in row.axes}
    found.seen = {space: seen for space, seen in found.seen.items() if space in spaces}
    return found


def _llama(model, p: str) -> Map:
    """Llama, and what is built as it is. RoPE turns pairs of places within a head, so these stay in their order."""
    config = model.config
    found, last = Map(config.num_hidden_layers), config.num_hidden_layers
    found.add(0, {f"{p}embed_tokens": ("", "+stream")})
    found.see("stream", f"{p}embed_tokens", 0)
    for i in range(last):
        a = f"{p}layers.{i}."
        q, k, v, o, mlp = (f"layer {i} {what}" for what in ("queries", "keys", "values", "heads", "mlp"))
        found.add(i, {
            f"{a}input_layernorm": ("+stream",),
            f"{a}self_attn.q_proj": (f"+{q}", "-stream"),
            f"{a}self_attn.k_proj": (f"+{k}", "-stream"),
            f"{a}self_attn.v_proj": (f"+{v}", "-stream"),
            f"{a}self_attn.o_proj": ("+stream", f"-{o}"),
            f"{a}post_attention_layernorm": ("+stream",),
            f"{a}mlp.gate_proj": (f"+{mlp}", "-stream"),
            f"{a}mlp.up_proj": (f"+{mlp}", "-stream"),
            f"{a}mlp.down_proj": ("+stream", f"-{mlp}"),
        })  # fmt: skip
        found.see("stream", f"{p}layers.{i}", i)
        found.see(mlp, f"{a}mlp.down_proj", i, given=True)
        for space, module in ((q, "q_proj"), (k, "k_proj"), (v, "v_proj")):
            found.see(space, f"{a}self_attn.{module}", i)
        found.see(o, f"{a}self_attn.o_proj", i, given=True)
        heads, width = config.num_key_value_heads, model.get_submodule(f"{a}self_attn").head_dim
        share = config.num_attention_heads // heads
        found.attentions.append(Attention(q, k, v, o, heads, share, width, rotary=True))
    found.add(last - 1, {f"{p}norm": ("+stream",)})
    found.add(last, {name: ("", "-stream") for name in ("lm_head", "score")})
    return found


def _encoder(model, found: Map, layer: Callable[[int], str], names: Mapping[str, str], norms: tuple[str, str]) -> None:
    """Layers of a transformer without RoPE, by what its modules are called: q, k, v, o, up, down."""
    config = model.config
    for i in range(config.num_hidden_layers):
        a = layer(i)
        at = {role: f"{a}.{module}" for role, module in names.items()}
        q, k, v, o, mlp = (f"layer {i} {what}" for what in ("queries", "keys", "values", "heads", "mlp"))
        found.add(i, {
            at["q"]: (f"+{q}", "-stream"),
            at["k"]: (f"+{k}", "-stream"),
            at["v"]: (f"+{v}", "-stream"),
            at["o"]: ("+stream", f"-{o}"),
            at["up"]: (f"+{mlp}", "-stream"),
            at["down"]: ("+stream", f"-{mlp}"),
            **{f"{a}.{norm}": ("+stream",) for norm in norms},
        })  # fmt: skip
        found.see("stream", a, i)
        found.see(mlp, at["down"], i, given=True)
        for space, role in ((q, "q"), (k, "k"), (v, "v")):
            found.see(space, at[role], i)
        found.see(o, at["o"], i, given=True)
        heads = config.num_attention_heads
        width = model.get_submodule(at["q"]).out_features // heads
        found.attentions.append(Attention(q, k, v, o, heads, 1, width, rotary=False))


def _vit(model, p: str) -> Map:
    found, last = Map(model.config.num_hidden_layers), model.config.num_hidden_layers
    found.add(0, {
        f"{p}embeddings.cls_token": ("", "", "+stream"),
        f"{p}embeddings.mask_token": ("", "", "+stream"),
        f"{p}embeddings.position_embeddings": ("", "", "+stream"),
        f"{p}embeddings.patch_embeddings.projection": ("+stream", "", "", ""),
    })  # fmt: skip
    found.see("stream", f"{p}embeddings", 0)
    names = {role: f"attention.{role}_proj" for role in "qkvo"} | {"up": "mlp.fc1", "down": "mlp.fc2"}
    _encoder(model, found, lambda i: f"{p}layers.{i}", names, ("layernorm_before", "layernorm_after"))
    found.add(last - 1, {f"{p}layernorm": ("+stream",), f"{p}pooler.dense": ("+pooled", "-stream")})
    found.see("pooled", f"{p}pooler", last - 1)
    found.add(last, {"classifier": ("", "-stream")})
    return found


def _bert(model, p: str) -> Map:
    """A tied decoder reads the space that the embeddings make, so its transform makes that one too."""
    found, last = Map(model.config.num_hidden_layers), model.config.num_hidden_layers
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    found.add(0, {f"{p}embeddings.{table}": ("", "+stream") for table in tables})
    found.add(0, {f"{p}embeddings.LayerNorm": ("+stream",)})
    found.see("stream", f"{p}embeddings", 0)
    names = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
             "o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}  # fmt: skip
    norms = "attention.output.LayerNorm", "output.LayerNorm"
    _encoder(model, found, lambda i: f"{p}encoder.layer.{i}", names, norms)
    found.add(last - 1, {f"{p}pooler.dense": ("+pooled", "-stream")})
    found.see("pooled", f"{p}pooler", last - 1)
    pooled = getattr(model.base_model, "pooler", None) is not None
    shown = "-pooled" if pooled else "-stream"
    found.add(last, {"classifier": ("", shown), "cls.seq_relationship": ("", shown), "qa_outputs": ("", "-stream")})
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    space = "stream" if tied else "transform"
    transform = "cls.predictions.transform"
    found.add(last, {
        f"{transform}.dense": (f"+{space}", "-stream"),
        f"{transform}.LayerNorm": (f"+{space}",),
        "cls.predictions.decoder": ("", f"-{space}"),
        "cls.predictions.bias": ("",),
    })  # fmt: skip
    found.see(space, transform, last)
    return found


def _resnet(model, p: str) -> Map:
    """Each stage has a residual stream of its own, from the block whose shortcut is a convolution on."""
    modules = dict(model.named_modules())
    blocks = [(s, b) for s, depth in enumerate(model.config.depths) for b in range(depth)]
    found, stream = Map(len(blocks)), "stem"
    stem = f"{p}embedder.embedder"
    found.add(0, {f"{stem}.convolution": ("+stem", ""), f"{stem}.normalization": ("+stem",)})
    found.see("stem", stem, 0)
    for i, (stage, block) in enumerate(blocks):
        a, before = f"{p}encoder.stages.{stage}.layers.{block}", stream
        if f"{a}.shortcut.convolution" in modules:
            stream = f"stage {stage}"
            shortcut = f"{a}.shortcut."
            axes = (f"+{stream}", f"-{before}")
            found.add(i, {f"{shortcut}convolution": axes, f"{shortcut}normalization": axes[:1]})
        reads, inside = before, len(modules[f"{a}.layer"])
        for at in range(inside):
            makes = stream if at == inside - 1 else f"layer {i} inner {at}"
            axes = (f"+{makes}", f"-{reads}")
            found.add(i, {f"{a}.layer.{at}.convolution": axes, f"{a}.layer.{at}.normalization": axes[:1]})
            if at < inside - 1:
                found.see(makes, f"{a}.layer.{at}", i)
            reads = makes
        found.see(stream, a, i)
    found.add(len(blocks), {"classifier.1": ("", f"-{stream}")})
    return found


FAMILIES: dict[str, Callable[..., Map]] = {
    "resnet": _resnet,
    "vit": _vit,
    "bert": _bert,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
}
