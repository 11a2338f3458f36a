"""Whether a model's eyes are what they were: what it says of an image need not be asked again then.

Which weights that depends on is not guessed. It is everything outside the language model, and whatever the graph of one
pass over the first images shows beside that. They are copied, and compared bit by bit before every use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

KEPT = 1 << 30  # bytes of what a model's eyes said that are kept from one candidate to the next
_EYES: WeakKeyDictionary = WeakKeyDictionary()  # model -> its Eyes


def eyes_of(model) -> Eyes:
    """The one Eyes of a live model."""
    if model not in _EYES:
        _EYES[model] = Eyes()
    return _EYES[model]


class Said:
    """What a model's eyes said of one batch, and with which weights. Empty at first."""

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """As at first."""
        self.version, self.pixels, self.output = -1, None, None

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return sum(tensor.nbytes for tensor in tensors_in((self.pixels, self.output)))


class Eyes:
    """version: another number whenever weights that images pass through have changed since they were looked at."""

    def __init__(self):
        self.version = 0
        self._held: list[tuple[int, Said]] = []  # by the question that asked, in the order of use
        self._copies: dict[str, torch.Tensor] | None = None

    def look(self, model) -> None:
        """Compare the weights with what they were. Reads them once; nothing before the first `learn`."""
        if self._copies is None:
            return
        now = _weights(model)
        for name, copy in self._copies.items():
            if not torch.equal(now[name], copy):
                copy.copy_(now[name])
                self.version += 1

    def hold(self, said: Said, question: object) -> None:
        """Keep this, and of what other questions were told as much as there is room for, the oldest least."""
        self._held = [entry for entry in self._held if entry[1] is not said] + [(id(question), said)]
        while sum(entry.nbytes for _, entry in self._held) > KEPT:
            others = (entry for entry in self._held if entry[0] != id(question))
            oldest = next(others, self._held[-1])
            self._held.remove(oldest)
            oldest[1].forget()

    def learn(self, model, features: Callable[..., Any], *args, **kwargs) -> None:
        """Find out, once, which weights these are. features: as get_image_features, with its arguments."""
        if self._copies is not None:
            return
        language = _language(model)
        names = {name for name, tensor in _weights(model).items() if id(tensor) not in language}
        try:
            names |= _reached(model, features, *args, **kwargs)
        except RuntimeError:  # a model that has no backward pass: then any weight may be one of them
            names = set(_weights(model))
        with torch.inference_mode(False):
            self._copies = {name: tensor.detach().clone() for name, tensor in _weights(model).items() if name in names}


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in an output of a model, however deep."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def _weights(model) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _language(model) -> set[int]:
    """The language model's tensors, by identity; none where it is not a part of its own."""
    decoder = model.get_decoder()
    if decoder is model or decoder is model.base_model:
        return set()
    found = {id(tensor) for tensor in (*decoder.parameters(), *decoder.buffers())}
    output = model.get_output_embeddings()
    return found | ({id(tensor) for tensor in output.parameters()} if output is not None else set())


def _reached(model, features: Callable[..., Any], *args, **kwargs) -> set[str]:
    """Names of the parameters that the graph of these features ends in; activations are not kept."""
    parameters = dict(model.named_parameters())
    before = {name: p.requires_grad for name, p in parameters.items()}
    owned = lambda value: value.clone() if isinstance(value, torch.Tensor) else value
    with torch.inference_mode(False), torch.enable_grad():
        args, kwargs = [owned(a) for a in args], {name: owned(a) for name, a in kwargs.items()}
        try:
            for p in parameters.values():
                p.requires_grad_(p.is_floating_point())
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
                waiting = [t.grad_fn for t in tensors_in(features(*args, **kwargs)) if t.grad_fn is not None]
        finally:
            for name, p in parameters.items():
                p.requires_grad_(before[name])
    names, done, found = {id(p): name for name, p in parameters.items()}, set(), set()
    while waiting:
        node = waiting.pop()
        if node in done:
            continue
        done.add(node)
        if hasattr(node, "variable"):
            found.add(names.get(id(node.variable), ""))
        waiting += [other for other, _ in node.next_functions if other is not None]
    return found - {""}
