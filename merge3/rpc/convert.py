"""Messages <-> our objects; errors are in statuses.py.

Numbers cross as float64, so what a driver sees is what an engine in its own process would have given it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import yaml

from merge3 import errors
from merge3.checkpoint.layout import Layout
from merge3.engine import Evaluation, PoolInfo
from merge3.experts import ExpertLoss
from merge3.irt import ItemBank
from merge3.irt.estimation import METHODS as ESTIMATORS
from merge3.irt.estimation import Estimator
from merge3.irt.extraction import Subset
from merge3.recipe import Recipe, built
from merge3.rpc import merge3_pb2 as pb
from merge3.rpc.statuses import error_of, error_to
from merge3.tasks.documents import Raw
from merge3.tasks.items import Item
from merge3.tasks.reading import make_document, make_item

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MAX_DEPTH = 64


def digest(message: Any) -> bytes:
    """What a message's content is known by: SHA-256 of its deterministic serialization."""
    return hashlib.sha256(message.SerializeToString(deterministic=True)).digest()


# -- items


def item_to(item: Item) -> pb.Item:
    """Without source and extra, which are no part of the question."""
    message = pb.Item(
        id=item.id,
        task=item.task,
        kind=item.kind,
        prompt=item.prompt,
        choices=item.choices,
        metric=item.metric,
        image=item.image or "",
        max_tokens=item.max_tokens,
        stop=item.stop,
    )
    for context, continuation in item.asks:
        message.asks.add(context=context, continuation=continuation)
    if isinstance(item.answer, int):
        message.index = item.answer
    elif isinstance(item.answer, str):
        message.label = item.answer
    else:
        message.texts.values.extend(item.answer)
    return message


def item_from(message: pb.Item, where: str) -> Item:
    """Raises ItemsError: an item from the wire is checked as one from a file is."""
    if message.asks:
        asks = tuple((ask.context, ask.continuation) for ask in message.asks)
        how = (message.metric, message.max_tokens, tuple(message.stop))
        return make_document(message.id, message.task, message.kind, asks, where, *how)
    which = message.WhichOneof("answer")
    answer = list(message.texts.values) if which == "texts" else getattr(message, which) if which else None
    data: dict[str, Any] = {"id": message.id or where, "kind": message.kind, "prompt": message.prompt, "answer": answer}
    for key in ("task", "choices", "metric", "image", "max_tokens", "stop"):
        if value := getattr(message, key):
            data[key] = list(value) if key in ("choices", "stop") else value
    return make_item(data, where, "items", where)


# -- estimators


def array_to(values: np.ndarray) -> pb.Array:
    """Any shape, as float64."""
    return pb.Array(shape=values.shape, values=np.ravel(values))


def array_from(message: pb.Array, where: str, *shape: int) -> np.ndarray:
    """float64 of a shape that must be as expected."""
    found = tuple(message.shape)
    values = np.array(message.values)
    if found != shape or len(values) != int(np.prod(shape)) or not np.isfinite(values).all():
        raise errors.BadInput(
            where, f"{len(values)} values, shape {list(found)}", f"finite numbers of shape {list(shape)}"
        )
    return values.reshape(shape)


def bank_to(bank: ItemBank) -> pb.ItemBank:
    """All but `meta`, how it was fitted."""
    return pb.ItemBank(
        items=bank.items,
        models=bank.models,
        a=array_to(bank.a),
        b=array_to(bank.b),
        theta=array_to(bank.theta),
        item_covariance=array_to(bank.item_covariance),
        theta_covariance=array_to(bank.theta_covariance),
    )


def bank_from(m: pb.ItemBank, where: str = "item bank") -> ItemBank:
    """What `bank_to` sent. Raises BadInput where shapes do not fit each other or numbers are not finite."""
    n, models, d = len(m.items), len(m.models), m.a.shape[1] if len(m.a.shape) == 2 else 0
    return ItemBank(
        tuple(m.items),
        tuple(m.models),
        array_from(m.a, f"{where}: a", n, d),
        array_from(m.b, f"{where}: b", n),
        array_from(m.theta, f"{where}: theta", models, d),
        array_from(m.item_covariance, f"{where}: item_covariance", n, d + 1, d + 1),
        array_from(m.theta_covariance, f"{where}: theta_covariance", models, d, d),
    )


def estimator_to(e: Estimator, bank: bytes) -> pb.Estimator:
    """bank: the digest of its bank's message."""
    return pb.Estimator(
        method=e.method,
        bank=bank,
        subset=e.subset.index.tolist(),
        weights=array_to(e.subset.weights),
        subset_method=e.subset.method,
        basis=array_to(e.basis),
        centre=array_to(e.centre),
        precision=array_to(e.precision),
        share=e.share,
        scale=e.scale,
        note=e.note,
    )


def estimator_from(m: pb.Estimator, bank: ItemBank, where: str = "estimator") -> Estimator:
    """What `estimator_to` sent; bank: the one it names. Raises BadInput for what cannot be estimated with."""
    if m.method not in ESTIMATORS:
        raise errors.BadInput(f"{where}: method", f"found {m.method!r}", ", ".join(ESTIMATORS))
    index, q = np.array(m.subset, dtype=int), len(m.centre.values)
    if len(index) == 0 or index.max() >= len(bank.items) or len(set(index)) < len(index):
        raise errors.BadInput(
            f"{where}: subset", f"{len(index)} positions", f"different positions below {len(bank.items)}"
        )
    subset = Subset(index, array_from(m.weights, f"{where}: weights", len(index)), m.subset_method)
    return Estimator(
        m.method,
        bank,
        subset,
        array_from(m.basis, f"{where}: basis", bank.dimensions, q),
        array_from(m.centre, f"{where}: centre", q),
        array_from(m.precision, f"{where}: precision", q, q),
        m.share,
        m.scale,
        m.note,
    )


# -- pools and candidates


def pool_to(info: PoolInfo, **extra: Any) -> pb.Pool:
    """extra: fields that only the daemon knows."""
    at = info.layout
    return pb.Pool(
        models=info.endpoints,
        content_hashes=info.content_hashes,
        parameters=info.parameters,
        kept=info.kept,
        device=info.device,
        warnings=info.warnings,
        notes=info.notes,
        own_heads=info.own_heads,
        tied=info.tied,
        workers=info.workers,
        experts=info.experts,
        losses=[pb.ExpertLoss(**loss._asdict()) for loss in info.losses],
        files=info.files,
        layout=pb.Layout(prefix=at.prefix, layers=at.layers, layer_names=at.layer_names, pre=at.pre, post=at.post),
        **extra,
    )


def pool_from(m: pb.Pool, where: str) -> PoolInfo:
    """where: the daemon's address, which becomes the pool's host."""
    at = m.layout
    layout = Layout(at.prefix, at.layers, tuple(at.layer_names), tuple(at.pre), tuple(at.post))
    hashes = {model: m.content_hashes[model] for model in m.models}  # base first: maps have no order on the wire
    losses = tuple(ExpertLoss(loss.model, loss.kept, loss.energy, loss.error) for loss in m.losses)
    said = tuple(m.warnings), tuple(m.notes), m.own_heads, tuple(m.tied), max(1, m.workers), m.experts or "full", losses
    return PoolInfo(tuple(m.models), hashes, m.parameters, dict(m.kept), m.device, layout, where, *said, dict(m.files))


def evaluation_to(e: Evaluation, index: int, queue_seconds: float = 0.0, worker: str = "") -> pb.Evaluation:
    """index: the request's, which is given back."""
    message = pb.Evaluation(
        index=index,
        recipe_hash=e.recipe_hash,
        responses=() if e.responses is None else e.responses,
        seconds=e.seconds,
        swap_seconds=e.swap_seconds,
        queue_seconds=queue_seconds,
        worker=worker,
        lengths=() if e.lengths is None else e.lengths,
        cost=e.cost,
    )
    for name, value, stderr in zip(e.objectives, e.values, e.stderrs):
        message.estimates.add(objective=name, value=value, stderr=stderr)
    if e.error is not None:
        message.error.CopyFrom(error_to(e.error))
    for position, raw in e.raw.items():
        message.raw.append(raw_to(position, raw))
    return message


def raw_to(position: int, raw: Raw) -> pb.RawAnswer:
    """What a document's asks came to; see documents.Raw."""
    message = pb.RawAnswer(item=position)
    for answer in raw:
        match answer:
            case str():
                message.texts.append(answer)
            case float():
                message.sums.append(answer)
            case (value, greedy):
                message.sums.append(value)
                message.greedy.append(greedy)
    return message


def raw_from(message: pb.RawAnswer) -> Raw:
    """What `raw_to` sent."""
    if message.texts:
        return tuple(message.texts)
    return tuple(zip(message.sums, message.greedy)) if message.greedy else tuple(message.sums)


def evaluation_from(m: pb.Evaluation) -> Evaluation:
    """What `evaluation_to` sent, bit for bit."""
    error = error_of(m.error) if m.HasField("error") else None
    return Evaluation(
        m.index,
        m.recipe_hash,
        np.array(m.responses) if error is None else None,
        tuple(e.objective for e in m.estimates),
        np.array([e.value for e in m.estimates]),
        np.array([e.stderr for e in m.estimates]),
        m.seconds,
        m.swap_seconds,
        error,
        {raw.item: raw_from(raw) for raw in m.raw},
        np.array(m.lengths) if m.lengths else None,
        m.cost or 1.0,  # an earlier daemon does not say it
    )


def recipe_to(recipe: Recipe) -> str:
    """Its `to_dict` as JSON, which `recipe_from` reads."""
    return json.dumps(recipe.to_dict())


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")  # YAML, of which JSON is a part, says which one
    return found


def recipe_from(text: str, where: str = "recipe") -> Recipe:
    """JSON, or YAML. Without aliases, a few of which, nested, would unfold to gigabytes, and not nested so deeply
    that reading it would never end; both are seen in the stream of events, before anything is built."""
    try:
        data = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        try:
            depth = 0
            for event in yaml.parse(text, _Loader):
                if isinstance(event, yaml.AliasEvent):
                    raise errors.RecipeError(where, "an alias", "YAML without anchors and aliases")
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > _MAX_DEPTH:
                    raise errors.RecipeError(where, "nested too deeply", "a recipe")
            data = built(text, where, _Loader)
        except errors.RecipeError:
            raise
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise errors.RecipeError(
                where, f"not YAML ({str(error).splitlines()[0]})"[:200], "a recipe in YAML or JSON"
            ) from None
    try:
        return Recipe.parse(data, where)
    except RecursionError:
        raise errors.RecipeError(where, "nested too deeply", "a recipe") from None
