"""The objects of a recipe: models, sources, slices, the merge itself; from YAML and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merge3.errors import RecipeError
from merge3.parameters import Setting
from merge3.recipe import checks
from merge3.recipe.references import ModelRef
from merge3.recipe.text import dump_yaml, load_yaml, plain
from merge3.recipe.tokenizer import Tokenizer, read_tokenizer

Parameters = Mapping[str, Setting]


@dataclass(frozen=True)
class Source:
    """One input of a slice. layer_range: [first, last) in that model; None: all layers. depth: how many that is, where
    an entry of `models` says it; another number is refused when the model is met."""

    model: ModelRef
    layer_range: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)
    depth: int | None = None

    def check_depth(self, layers: int, where: str) -> None:
        """layers: that its model has. Raises RecipeError where `depth` is another number."""
        if self.depth not in (None, layers):
            found = f"[0, {self.depth}] under `models`, and {self.model} has {layers} layers"
            raise RecipeError(f"{where}: layer_range", found, *checks.ALL_LAYERS)


@dataclass(frozen=True)
class Slice:
    """A run of output layers, made from equally many layers of each source."""

    sources: tuple[Source, ...]
    base_model: ModelRef | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A merge. `models` in the YAML is one slice whose sources have no layer_range.

    sources = [{"model": "math", "parameters": {"weight": 0.7}}, {"model": "code", "parameters": {"weight": 0.3}}]
    recipe = Recipe.parse({"merge_method": "linear", "models": sources})
    print(recipe.to_yaml())

    fit: how the weights of a learned method are found; surgery: adapters on top of the merge; router: how a prompt
    finds its task's variant. They are as they stand in the file; what they may hold is known to those who fit. tasks:
    task -> the model it belongs to, of methods with a result per task. merged: model -> the recipe that makes it, of
    one that lies in no folder, and the `seed` of its random keeps; for engines, no file says so.
    """

    method: str
    slices: tuple[Slice, ...]
    base_model: ModelRef | None = None
    parameters: Parameters = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    tower: Mapping[str, str] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    surgery: Mapping[str, Any] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)
    router: Mapping[str, Any] = field(default_factory=dict)
    merged: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Written with `models`: every layer of every model, in place."""
        return len(self.slices) == 1 and all(s.layer_range is None for s in self.slices[0].sources)

    @property
    def tokenizer_source(self) -> str | None:
        """Where the output's tokenizer comes from: union, base, a model; None where nothing is said of it."""
        return self.tokenizer.source if self.tokenizer else None

    def levels(self, where: str) -> list[tuple[Parameters, str]]:
        """All its parameters, and where each of them stand."""
        found = [(self.parameters, f"{where}: parameters")]
        for i, part in enumerate(self.slices):
            at = f"{where}: models" if self.whole else f"{where}: slices[{i}].sources"
            found.append((part.parameters, f"{where}: slices[{i}].parameters"))
            found += [(s.parameters, f"{at}[{j}].parameters") for j, s in enumerate(part.sources)]
        return found

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
            data["models"] = [_source_dict(s) for s in self.slices[0].sources]
        else:
            data["slices"] = [_slice_dict(part) for part in self.slices]
        if self.parameters:
            data["parameters"] = plain(self.parameters)
        for key in ("dtype", "out_dtype"):
            if getattr(self, key) is not None:
                data[key] = getattr(self, key)
        if self.tokenizer is not None:
            data |= self.tokenizer.to_dict()
        if self.chat_template is not None:
            data["chat_template"] = self.chat_template
        for key in ("tower", "fit", "surgery", "tasks", "router", "merged"):
            if getattr(self, key):
                data[key] = plain(getattr(self, key))
        return data

    def to_yaml(self) -> str:
        """YAML that mergekit reads as the same merge, but for the keys after `chat_template`, which it has not; floats
        survive exactly."""
        return dump_yaml(self.to_dict())

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

        def find(ref: ModelRef) -> ModelRef:
            beside = not Path(ref.path).expanduser().exists() and (folder / ref.path).exists()
            path = str((folder / ref.path).resolve()) if beside else ref.path
            return replace(ref, path=path, lora=ref.lora and find(ref.lora))

        return self.renamed(find)

    def renamed(self, name: Callable[[ModelRef], ModelRef]) -> Recipe:
        """The same with other names for models."""
        slices = []
        for part in self.slices:
            sources = tuple(replace(s, model=name(s.model)) for s in part.sources)
            slices.append(replace(part, base_model=part.base_model and name(part.base_model), sources=sources))
        tokenizer = self.tokenizer and self.tokenizer.renamed(lambda model: str(name(ModelRef.parse(model))))
        base = self.base_model and name(self.base_model)
        tasks = {task: str(name(ModelRef.parse(model))) for task, model in self.tasks.items()}
        return replace(self, slices=tuple(slices), base_model=base, tokenizer=tokenizer, tasks=tasks)

    @staticmethod
    def parse(data: Any, where: str = "recipe") -> Recipe:
        """Validate a recipe's content. Raises RecipeError naming the key."""
        data = checks.mapping(data, where)
        checks.numbers(data, where)
        checks.top_keys(data, where)
        method = checks.method_name(data.get("merge_method"), where)
        checks.models_or_slices(data, where)
        if "models" in data:
            slices = (Slice(_sources(data["models"], f"{where}: models", ranged=False)),)
        else:
            parts = checks.entries(data["slices"], f"{where}: slices")
            slices = tuple(_slice(part, f"{where}: slices[{i}]") for i, part in enumerate(parts))
        dtype = checks.dtype(data.get("dtype"), f"{where}: dtype")
        out_dtype = checks.dtype(data.get("out_dtype"), f"{where}: out_dtype")
        recipe = Recipe(
            method,
            slices,
            _model(data.get("base_model"), f"{where}: base_model"),
            checks.parameters(data.get("parameters"), f"{where}: parameters"),
            dtype,
            out_dtype,
            chat_template=checks.chat_template(data.get("chat_template"), f"{where}: chat_template"),
            tower=checks.tower(data.get("tower"), f"{where}: tower"),
            fit=checks.section(data, "fit", where),
            surgery=checks.section(data, "surgery", where),
            tasks=checks.tasks(data.get("tasks"), f"{where}: tasks"),
            router=checks.section(data, "router", where),
            merged=checks.merged(data.get("merged"), f"{where}: merged"),
        )
        tokenizer = read_tokenizer(data, where)
        if tokenizer is None:
            return recipe
        return replace(recipe, tokenizer=replace(tokenizer, base=_has_base(recipe, where)))


def _slice(data: Any, where: str) -> Slice:
    data = checks.mapping(data, where)
    checks.known_keys(data, ("sources", "base_model", "parameters"), where)
    sources = _sources(data.get("sources"), f"{where}: sources", ranged=True)
    lengths = {s.layer_range[1] - s.layer_range[0] for s in sources}
    if len(lengths) > 1:
        raise RecipeError(f"{where}: sources", f"ranges of {sorted(lengths)} layers", "equally many from each source")
    base = _model(data.get("base_model"), f"{where}: base_model")
    return Slice(sources, base, checks.parameters(data.get("parameters"), f"{where}: parameters"))


def _sources(data: Any, where: str, ranged: bool) -> tuple[Source, ...]:
    sources = []
    for i, entry in enumerate(checks.entries(data, where)):
        at = f"{where}[{i}]"
        entry = checks.mapping(entry, at)
        checks.known_keys(entry, ("model", "layer_range", "parameters"), at)
        layers, depth = entry.get("layer_range"), None
        if ranged:
            layers = checks.layer_range(layers, f"{at}: layer_range")
        elif layers is not None:  # mergekit-evolve writes it here too, always that of all layers
            layers, depth = None, checks.depth(layers, f"{at}: layer_range")
        model = ModelRef.parse(entry.get("model"), f"{at}: model")
        sources.append(Source(model, layers, checks.parameters(entry.get("parameters"), f"{at}: parameters"), depth))
    return tuple(sources)


def _model(data: Any, where: str) -> ModelRef | None:
    return ModelRef.parse(data, where) if data is not None else None


def _has_base(recipe: Recipe, where: str) -> bool:
    """Whether a token that a model lacks takes the base's row; embeddings are in the first slice, heads in the last."""
    bases = {part.base_model or recipe.base_model for part in (recipe.slices[0], recipe.slices[-1])}
    if len(bases) > 1 or bases - {None, recipe.models()[0]}:
        found = ", ".join(sorted(str(base) for base in bases | {recipe.base_model}))
        raise RecipeError(f"{where}: slices", f"several bases ({found})", "one, where the tokenizer is said")
    return bases != {None}


def _slice_dict(part: Slice) -> dict:
    data: dict[str, Any] = {"sources": [_source_dict(s) for s in part.sources]}
    if part.base_model:
        data["base_model"] = str(part.base_model)
    if part.parameters:
        data["parameters"] = plain(part.parameters)
    return data


def _source_dict(source: Source) -> dict:
    data: dict[str, Any] = {"model": str(source.model)}
    if source.layer_range is not None:
        data["layer_range"] = list(source.layer_range)
    if source.depth is not None:
        data["layer_range"] = [0, source.depth]
    if source.parameters:
        data["parameters"] = plain(source.parameters)
    return data
