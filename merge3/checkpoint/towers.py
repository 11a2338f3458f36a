"""Cross-domain merges: where a language model's tensors lie in a model that has eyes or ears beside its own language
model. A tower is that place: prefixes of the one's names -> prefixes of the other's, found by name and shape, or given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merge3.checkpoint.layout import EMBEDDING, beside_text, layout
from merge3.checkpoint.naming import is_buffer, is_head, tie_targets
from merge3.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
HINT = "another model, or say where it belongs: `tower` in the recipe, --tower FROM=TO of merge"


@dataclass(frozen=True)
class Tower:
    """One expert's place in the base. prefixes: of the expert's names -> of the base's; of several that fit a name the
    longest counts. fitting: how many of the expert's `tensors` the base has in a shape that can be merged."""

    prefixes: dict[str, str]
    fitting: int
    tensors: int

    def name(self, own: str) -> str:
        """The base's name of one of the expert's tensors; its own where no prefix fits."""
        fits = [prefix for prefix in self.prefixes if own.startswith(prefix)]
        prefix = max(fits, key=len, default=None)
        return own if prefix is None else self.prefixes[prefix] + own.removeprefix(prefix)

    def holds(self, name: str) -> bool:
        """Whether a tensor of the base is of this place, and none of what looks or listens beside it."""
        return not beside_text(name) and any(name.startswith(prefix) for prefix in self.prefixes.values())

    def describe(self, model: str, base: str) -> str:
        """One line: what goes where."""
        pairs = ", ".join(f"{own or '(every name)'} -> {other}" for own, other in self.prefixes.items())
        return (
            f"{model}: a language model, merged into the language tower of {base}: {pairs} "
            f"({self.fitting} of {self.tensors} tensors fit); mergekit has no such merge"
        )


def find_tower(model: str, own: Shapes, base_name: str, base: Shapes, given: Mapping[str, str]) -> Tower | None:
    """Where a language model belongs in the base; None where it is no such pair of models, and their names are compared
    as they are. own, base: shapes of all tensors by name. given: prefixes that are not to be found but known.

    Raises CheckpointError where no tensor fits there, or an output has two places.
    """
    if any(map(beside_text, own)):
        return None
    if given:
        return _checked(Tower(_given(model, own, given), 0, 0), model, own, base_name, base)
    if not any(map(beside_text, base)):
        return None
    inner, outer = (layout(names).prefix.rpartition(".")[0] for names in (own, base))
    if not any(EMBEDDING.sub("", name) == outer for name in base if EMBEDDING.search(name)):
        return None  # eyes alone, and no language model to be in
    prefixes = {_dotted(inner): _dotted(outer)}
    for name in sorted(own):
        if not (is_head(name) if inner == "" else not name.startswith(f"{inner}.")):
            continue
        stem = name.split(".")[0] + "."
        if stem not in prefixes:
            prefixes[stem] = _place_of_output(model, name, base_name, base, inner, outer).removesuffix(name) + stem
    return _checked(Tower(prefixes, 0, 0), model, own, base_name, base)


def _place_of_output(model: str, name: str, base_name: str, base: Shapes, inner: str, outer: str) -> str:
    """The base's name of a tensor outside the expert's backbone, such as its head."""
    found = [n for n in base if n == name or n.endswith(f".{name}")]
    if len(found) > 1:
        places = f"{found[0]!r} and {found[1]!r}"
        raise CheckpointError(model, f"tensor {name!r} may be {places} of the base {base_name}", "one place", HINT)
    if found:
        return found[0]
    # The base ties its output and stores none. Its name would stand where the expert's does, seen from the stack.
    return outer.removesuffix(inner) + name if inner and outer.endswith(f".{inner}") else name


def _given(model: str, own: Shapes, given: Mapping[str, str]) -> dict[str, str]:
    for prefix in given:
        if not any(name.startswith(prefix) for name in own):
            found = f"no tensor begins with {prefix!r}, which `tower` gives a place"
            raise CheckpointError(model, found, f"names such as {min(own)!r}")
    return dict(sorted(given.items()))  # a map from the wire has no order


def _checked(tower: Tower, model: str, own: Shapes, base_name: str, base: Shapes) -> Tower:
    """The tower with its counts. Raises CheckpointError where two tensors would have one name, or nothing fits."""
    placed: dict[str, str] = {}
    for name in own:
        other = tower.name(name)
        if other in placed:
            found = f"{placed[other]!r} and {name!r} would both be {other!r} of the base {base_name}"
            raise CheckpointError(model, found, "a place for each", HINT)
        placed[other] = name
    weights = {name: shape for name, shape in own.items() if not is_buffer(name, shape)}
    there = [name for name in weights if tower.name(name) in base]
    fitting = [name for name in there if _fits(tower.name(name), weights[name], base[tower.name(name)])]
    if not fitting:
        if there:
            name = there[0]
            found = f"{name!r} is {list(weights[name])}, {tower.name(name)!r} {list(base[tower.name(name)])}"
        else:
            found = f"{min(weights)!r} would be {tower.name(min(weights))!r}, and there is none"
        expected = f"a language model that fits into that of the base {base_name}"
        raise CheckpointError(model, f"none of its tensors fits: {found}", expected, HINT)
    return Tower(tower.prefixes, len(fitting), len(weights))


def _fits(name: str, own: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Equal, or a table of words of which one of the two has more."""
    words = EMBEDDING.search(name) or tie_targets([name])
    return own == other or (bool(words) and len(own) == len(other) > 1 and own[1:] == other[1:])


def _dotted(prefix: str) -> str:
    return f"{prefix}." if prefix else ""
