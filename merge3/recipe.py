"""What to merge: mergekit's YAML as validated, frozen objects, and back.

A recipe knows names only. Whether layers exist and tensors fit is found when it meets checkpoints
(program.py). Which parameters a method takes is found there too: `Recipe` accepts any.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from merge3 import parameters as settings
from merge3.errors import Merge3Warning, RecipeError

Parameters = Mapping[str, settings.Setting]
TOP_KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "chat_template", "tokenizer",
)  # fmt: skip
# Keys at the top level that mean something, but not here.
_ELSEWHERE = {
    "modules": ("not supported", "one stack of layers: `models` or `slices`"),
    "experts": ("a mergekit-moe configuration", "a merge recipe"),
    "gate_mode": ("a mergekit-moe configuration", "a merge recipe"),
    "finetuned_model": ("not a merge recipe", "merge_method, models"),
}
_PARAMETERS = (  # names of method parameters: where they stand by mistake, the message says where they belong
    "weight", "density", "gamma", "epsilon", "lambda", "normalize", "rescale", "int8_mask", "t", "select_topk", "scale",
    "filter_wise", "nuslerp_flatten", "nuslerp_row_wise", "normalize_weights", "eps", "max_iter", "tol", "r", "alpha",
)  # fmt: skip
CHAT_TEMPLATES = ("auto", "chatml")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ModelRef:
    """A model: a directory or hub id, a revision, and a LoRA adapter to apply: `path@rev+lora@rev`."""

    path: str
    revision: str | None = None
    lora: ModelRef | None = None

    @staticmethod
    def parse(text: Any, where: str = "model") -> ModelRef:
        if isinstance(text, Mapping):  # mergekit's long form, or a model entry's short one
            model = text.get("model", text)
            if isinstance(model, str) and not text.get("lora"):
                return ModelRef.parse(model, where)
            if not isinstance(model, Mapping) or not isinstance(model.get("path"), str):
                raise RecipeError(where, f"found {dict(text)!r}", "a path or hub id")
            lora = text.get("lora")
            return ModelRef(model["path"], model.get("revision"), ModelRef.parse(lora, where) if lora else None)
        if not isinstance(text, str) or not text.strip():
            raise RecipeError(where, f"found {text!r}", "a path or hub id")
        model, *lora = text.split("+")
        if len(lora) > 1:
            raise RecipeError(where, f"found {text!r}", "at most one `+adapter`")
        path, _, revision = model.partition("@")
        return ModelRef(path, revision or None, ModelRef.parse(lora[0], where) if lora else None)

    def __str__(self) -> str:
        text = self.path + (f"@{self.revision}" if self.revision else "")
        return text + (f"+{self.lora}" if self.lora else "")


@dataclass(frozen=True)
class Source:
    """One input of a slice. layer_range: [first, last) in that model; None: all layers."""

    model: ModelRef
    layer_range: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """A run of output layers, made from equally many layers of each source."""

    sources: tuple[Source, ...]
    base_model: ModelRef | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A merge. `models` in the YAML is one slice whose sources have no layer_range."""

    method: str
    slices: tuple[Slice, ...]
    base_model: ModelRef | None = None
    parameters: Parameters = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    chat_template: str | None = None

    @property
    def whole(self) -> bool:
        """Written with `models`: every layer of every model, in place."""
        return len(self.slices) == 1 and all(s.layer_range is None for s in self.slices[0].sources)

    def models(self) -> list[ModelRef]:
        """Every model named, base first, then in order of appearance."""
        found = [self.base_model] if self.base_model else []
        for part in self.slices:
            found += [part.base_model] if part.base_model else []
            found += [s.model for s in part.sources]
        return list(dict.fromkeys(found))

    def to_dict(self) -> dict:
        """The YAML's content: only plain dicts, lists and scalars, without defaults."""
        data: dict[str, Any] = {"merge_method": self.method}
        if self.base_model:
            data["base_model"] = str(self.base_model)
        if self.whole:
            data["models"] = [
                {"model": str(s.model)} | ({"parameters": _plain(s.parameters)} if s.parameters else {})
                for s in self.slices[0].sources
            ]
        else:
            data["slices"] = [_slice_dict(part) for part in self.slices]
        if self.parameters:
            data["parameters"] = _plain(self.parameters)
        for key in ("dtype", "out_dtype", "tokenizer_source", "chat_template"):
            if getattr(self, key) is not None:
                data[key] = getattr(self, key)
        return data

    def to_yaml(self) -> str:
        """YAML that mergekit reads as the same merge; floats survive exactly."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, width=100)

    def hash(self) -> str:
        """Names the recipe: equal recipes, equal hash."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    @staticmethod
    def from_yaml(path: str | Path) -> Recipe:
        """Read a recipe file. Raises RecipeError naming the file and key."""
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecipeError(path, f"not UTF-8 at byte {error.start}", "a recipe in YAML") from None
        except OSError as error:
            raise RecipeError(path, error.strerror or str(error), "a recipe file") from None
        return Recipe.parse(load_yaml(text, str(path)), str(path)).located(Path(path).parent)

    def located(self, folder: Path) -> Recipe:
        """The recipe with absolute paths for models that lie beside it, in `folder`, and not where the process runs."""

        def find(ref: ModelRef | None) -> ModelRef | None:
            if ref is None:
                return None
            beside = not Path(ref.path).expanduser().exists() and (folder / ref.path).exists()
            return replace(ref, path=str((folder / ref.path).resolve()) if beside else ref.path, lora=find(ref.lora))

        slices = tuple(
            replace(part, base_model=find(part.base_model), sources=tuple(replace(s, model=find(s.model)) for s in part.sources))
            for part in self.slices
        )
        named = self.tokenizer_source not in (None, "base", "union")
        tokenizer = str(find(ModelRef.parse(self.tokenizer_source))) if named else self.tokenizer_source
        return replace(self, slices=slices, base_model=find(self.base_model), tokenizer_source=tokenizer)

    @staticmethod
    def parse(data: Any, where: str = "recipe") -> Recipe:
        """Validate a recipe's content. Raises RecipeError naming the key."""
        data = _mapping(data, where)
        _top_keys(data, where)
        method = data.get("merge_method")
        if not isinstance(method, str):
            raise RecipeError(f"{where}: merge_method", f"found {method!r}", "the name of a merge method")
        if ("models" in data) == ("slices" in data):
            raise RecipeError(where, "both `models` and `slices`" if "models" in data else "neither `models` nor `slices`",
                              "exactly one")  # fmt: skip
        if "models" in data:
            sources = _sources(data["models"], f"{where}: models", ranged=False)
            slices = (Slice(sources),)
        else:
            slices = tuple(
                _parse_slice(part, f"{where}: slices[{i}]") for i, part in enumerate(_list(data["slices"], f"{where}: slices"))
            )
        for key in ("dtype", "out_dtype"):
            if isinstance(data.get(key), str):
                data[key] = data[key].removeprefix("torch.")
            if data.get(key) not in (None, *DTYPES):
                hint = nearest(data[key], DTYPES)
                raise RecipeError(f"{where}: {key}", f"found {data[key]!r}", ", ".join(DTYPES), hint)
        base = data.get("base_model")
        return Recipe(
            method,
            slices,
            ModelRef.parse(base, f"{where}: base_model") if base is not None else None,
            _parameters(data.get("parameters"), f"{where}: parameters"),
            data.get("dtype"),
            data.get("out_dtype"),
            _tokenizer_source(data, where),
            _chat_template(data.get("chat_template"), where),
        )


def load_yaml(text: str, where: str) -> Any:
    """YAML content, or a RecipeError with the line."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        found, hint = f"not YAML ({getattr(error, 'problem', error)})", ""
        if "single document" in str(getattr(error, "context", "")):
            found, hint = "several documents", "one recipe a file: merge the first, then name its folder in the second"
        elif text.lstrip().startswith("```"):
            hint = "take away the lines that begin with ```"
        elif "\t" in text:
            hint = "YAML is indented with spaces, not tabs"
        raise RecipeError(f"{where}{line}", found, "", hint) from None


def nearest(name: str, names: Iterable[str], cutoff: float = 0.5) -> str:
    """A hint naming the closest valid name, or nothing. cutoff: how alike it must be, 1 for equal."""
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else ""


def _top_keys(data: Mapping, where: str) -> None:
    """Refuse what is meant for another place or misspelt; say what is ignored (recipes keep YAML anchors so)."""
    for key in data:
        if key in TOP_KEYS:
            continue
        at = f"{where}: {key}"
        if key in _ELSEWHERE:
            raise RecipeError(at, *_ELSEWHERE[key])
        if key in _PARAMETERS:
            raise RecipeError(at, "stands at the top level", f"`{key}` under `parameters`")
        if hint := nearest(key, TOP_KEYS, 0.75):
            raise RecipeError(where, f"unknown key {key!r}", ", ".join(TOP_KEYS), hint)
        warnings.warn(f"{at}: ignored, a recipe has no such key", Merge3Warning, stacklevel=3)


def _tokenizer_source(data: Mapping, where: str) -> str | None:
    """`tokenizer_source`, or `source` of the newer `tokenizer`. Raises RecipeError for what is not done yet."""
    newer = data.get("tokenizer")
    if newer is None:
        return _text(data.get("tokenizer_source"), f"{where}: tokenizer_source")
    if "tokenizer_source" in data:
        raise RecipeError(where, "both `tokenizer_source` and `tokenizer`", "one of them")
    newer = _mapping(newer, f"{where}: tokenizer")
    for key in newer:
        if key in ("tokens", "pad_to_multiple_of") and newer[key]:
            raise RecipeError(f"{where}: tokenizer.{key}", "not supported yet", "`source` alone")
        if key not in ("source", "tokens", "pad_to_multiple_of"):
            raise RecipeError(f"{where}: tokenizer", f"unknown key {key!r}", "source")
    return _text(newer.get("source"), f"{where}: tokenizer.source")


def _text(value: Any, where: str) -> str | None:
    if isinstance(value, Mapping):
        return str(ModelRef.parse(value, where))
    if value is not None and not (isinstance(value, str) and value.strip()):
        raise RecipeError(where, f"found {value!r}", "union, base, or one of the models")
    return value


def _chat_template(value: Any, where: str) -> str | None:
    at = f"{where}: chat_template"
    if value is None or value in CHAT_TEMPLATES:
        return value
    if not isinstance(value, str) or "{" not in value:
        raise RecipeError(at, f"found {value!r}"[:120], f"{', '.join(CHAT_TEMPLATES)}, or a Jinja template")
    import jinja2

    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(value)
    except jinja2.TemplateSyntaxError as error:
        raise RecipeError(at, f"not a Jinja template ({error})"[:200], "one that Jinja reads") from None
    return value


def _parse_slice(data: Any, where: str) -> Slice:
    data = _mapping(data, where)
    _known(data, ("sources", "base_model", "parameters"), where)
    sources = _sources(data.get("sources"), f"{where}: sources", ranged=True)
    lengths = {s.layer_range[1] - s.layer_range[0] for s in sources}
    if len(lengths) > 1:
        raise RecipeError(f"{where}: sources", f"ranges of {sorted(lengths)} layers", "equally many from each source")
    base = data.get("base_model")
    return Slice(
        sources,
        ModelRef.parse(base, f"{where}: base_model") if base is not None else None,
        _parameters(data.get("parameters"), f"{where}: parameters"),
    )


def _sources(data: Any, where: str, ranged: bool) -> tuple[Source, ...]:
    sources = []
    for i, entry in enumerate(_list(data, where)):
        at = f"{where}[{i}]"
        entry = _mapping(entry, at)
        # mergekit-evolve writes a layer_range into `models` too, where it means nothing
        _known(entry, ("model", "layer_range", "parameters"), at)
        layer_range = None
        if ranged:
            layer_range = entry.get("layer_range")
            if (
                not isinstance(layer_range, (list, tuple)) or len(layer_range) != 2
                or not all(isinstance(n, int) and not isinstance(n, bool) for n in layer_range)
                or not 0 <= layer_range[0] <= layer_range[1]
            ):  # fmt: skip
                raise RecipeError(f"{at}: layer_range", f"found {layer_range!r}", "[first, last) with first <= last")
            layer_range = tuple(layer_range)
        sources.append(
            Source(ModelRef.parse(entry.get("model"), f"{at}: model"), layer_range,
                   _parameters(entry.get("parameters"), f"{at}: parameters"))
        )  # fmt: skip
    return tuple(sources)


def _parameters(data: Any, where: str) -> Parameters:
    if data is None:
        return {}
    data = _mapping(data, where)
    for name, setting in data.items():
        if trouble := settings.problem(setting):
            raise RecipeError(f"{where}.{name}", trouble)
        for value in settings.scalars(setting):
            if isinstance(value, float) and not math.isfinite(value):
                raise RecipeError(f"{where}.{name}", f"found {value}", "a finite number")
    return data


def _mapping(data: Any, where: str) -> dict:
    if not isinstance(data, Mapping):
        raise RecipeError(where, f"found {type(data).__name__ if data is not None else 'nothing'}", "a mapping")
    return dict(data)


def _list(data: Any, where: str) -> list:
    if not isinstance(data, (list, tuple)) or not data:
        raise RecipeError(where, f"found {data!r}"[:100], "a list with at least one entry")
    return list(data)


def _known(data: Mapping, names: tuple[str, ...], where: str) -> None:
    for key in data:
        if key not in names:
            hint = f"`{key}` belongs under `parameters`" if key in _PARAMETERS else nearest(key, names)
            raise RecipeError(where, f"unknown key {key!r}", ", ".join(names), hint)


def _slice_dict(part: Slice) -> dict:
    data: dict[str, Any] = {
        "sources": [
            {"model": str(s.model), "layer_range": list(s.layer_range)}
            | ({"parameters": _plain(s.parameters)} if s.parameters else {})
            for s in part.sources
        ]
    }
    if part.base_model:
        data["base_model"] = str(part.base_model)
    if part.parameters:
        data["parameters"] = _plain(part.parameters)
    return data


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


class _Dumper(yaml.SafeDumper):
    """Lists of numbers on one line, floats in their shortest exact form with a dot YAML 1.1 needs."""


def _represent_list(dumper: yaml.Dumper, data: list) -> yaml.Node:
    flow = all(isinstance(v, (int, float)) for v in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(list, _represent_list)
