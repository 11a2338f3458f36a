"""What a recipe's YAML may hold, key by key, and one clear line for everything else.

Every check takes what was found and `where` it stands, returns it as it is used, and raises RecipeError.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from merge3 import parameters as settings
from merge3.errors import Merge3Warning, RecipeError
from merge3.recipe.text import nearest

TOP_KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "chat_template", "tokenizer", "tower", "fit", "surgery", "tasks", "router", "merged",
)  # fmt: skip
# Keys at the top level that mean something, but not here.
_ELSEWHERE = {
    "modules": ("not supported", "one stack of layers: `models` or `slices`"),
    "experts": ("a mergekit-moe configuration", "a merge recipe"),
    "gate_mode": ("a mergekit-moe configuration", "a merge recipe"),
    "finetuned_model": ("not a merge recipe", "merge_method, models"),
}
PARAMETERS = (  # names of method parameters: where they stand by mistake, the message says where they belong
    "weight", "density", "gamma", "epsilon", "lambda", "normalize", "rescale", "int8_mask", "t", "select_topk", "scale",
    "filter_wise", "nuslerp_flatten", "nuslerp_row_wise", "normalize_weights", "eps", "max_iter", "tol", "r", "alpha",
    "closed", "mu", "steps", "learning_rate", "eta", "keep", "subspace", "others", "flatten",
    "merger", "share", "rank", "binary",
)  # fmt: skip
CHAT_TEMPLATES = ("auto", "chatml")
ALL_LAYERS = ("[0, depth], which is all layers", "layer ranges belong in `slices`")  # expected of `models`, and a hint
DTYPES = ("float32", "float16", "bfloat16")


def mapping(data: Any, where: str) -> dict:
    """A copy of a mapping."""
    if not isinstance(data, Mapping):
        raise RecipeError(where, f"found {type(data).__name__ if data is not None else 'nothing'}", "a mapping")
    return dict(data)


def entries(data: Any, where: str) -> list:
    """A list that is not empty."""
    if not isinstance(data, (list, tuple)) or not data:
        raise RecipeError(where, f"found {data!r}"[:100], "a list with at least one entry")
    return list(data)


def known_keys(data: Mapping, names: tuple[str, ...], where: str) -> None:
    """Refuse every key but these."""
    for key in data:
        if key not in names:
            hint = f"`{key}` belongs under `parameters`" if key in PARAMETERS else nearest(key, names)
            raise RecipeError(where, f"unknown key {key!r}", ", ".join(names), hint)


def top_keys(data: Mapping, where: str) -> None:
    """Refuse what is meant for another place or misspelt; say what is ignored (recipes keep YAML anchors so)."""
    for key in data:
        if key in TOP_KEYS:
            continue
        at = f"{where}: {key}"
        if key in _ELSEWHERE:
            raise RecipeError(at, *_ELSEWHERE[key])
        if key in PARAMETERS:
            raise RecipeError(at, "stands at the top level", f"`{key}` under `parameters`")
        if hint := nearest(key, TOP_KEYS, 0.75):
            raise RecipeError(where, f"unknown key {key!r}", ", ".join(TOP_KEYS), hint)
        warnings.warn(f"{at}: ignored, a recipe has no such key", Merge3Warning, stacklevel=3)


def numbers(data: Mapping, where: str) -> None:
    """Refuse whole numbers beyond float64, wherever they stand: some are too long even to be shown in an error."""
    waiting: list[tuple[Any, str]] = [(data[key], f"{where}: {_shown(key, where)}") for key in data]
    seen: set[int] = set()  # aliases: what is said once is looked at once
    for value, at in waiting:  # which grows on the way
        if isinstance(value, (Mapping, list, tuple)):
            if id(value) in seen:
                continue
            seen.add(id(value))
        if isinstance(value, Mapping):
            waiting += [(value[key], f"{at}.{_shown(key, at)}") for key in value]
        elif isinstance(value, (list, tuple)):
            waiting += [(entry, f"{at}[{i}]") for i, entry in enumerate(value)]
        else:
            _shown(value, at)


def _shown(value: Any, where: str) -> Any:
    if isinstance(value, int) and not -sys.float_info.max <= value <= sys.float_info.max:
        raise RecipeError(where, f"found a number of {len(f'{abs(value):x}')} hexadecimal digits", "a smaller one")
    return value


def models_or_slices(data: Mapping, where: str) -> None:
    """A recipe has one of both."""
    if ("models" in data) == ("slices" in data):
        found = "both `models` and `slices`" if "models" in data else "neither `models` nor `slices`"
        raise RecipeError(where, found, "exactly one")


def method_name(value: Any, where: str) -> str:
    """A text; whether there is such a method is not known here."""
    if not isinstance(value, str):
        raise RecipeError(f"{where}: merge_method", f"found {value!r}", "the name of a merge method")
    return value


def dtype(value: Any, where: str) -> str | None:
    """One of DTYPES, with or without `torch.`."""
    if isinstance(value, str):
        value = value.removeprefix("torch.")
    if value not in (None, *DTYPES):
        raise RecipeError(where, f"found {value!r}", ", ".join(DTYPES), nearest(value, DTYPES))
    return value


def layer_range(value: Any, where: str) -> tuple[int, int]:
    """[first, last)"""
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    whole = pair and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
    if not whole or not 0 <= value[0] <= value[1]:
        raise RecipeError(where, f"found {value!r}", "[first, last) with first <= last")
    return tuple(value)


def depth(value: Any, where: str) -> int:
    """How many layers a range is of that leaves out none: `models` merges models as a whole."""
    first, last = layer_range(value, where)
    if first:
        raise RecipeError(where, f"found {[first, last]} under `models`", *ALL_LAYERS)
    return last


def parameters(data: Any, where: str) -> dict[str, settings.Setting]:
    """Settings of a good form, with finite numbers."""
    if data is None:
        return {}
    data = mapping(data, where)
    for name, setting in data.items():
        if trouble := settings.problem(setting):
            raise RecipeError(f"{where}.{name}", trouble)
        for value in settings.scalars(setting):
            found = settings.number(value)
            if isinstance(found, float) and not math.isfinite(found):
                raise RecipeError(f"{where}.{name}", f"found {value}"[:100], "a finite number")
    return data


def section(data: Mapping, key: str, where: str) -> dict[str, Any]:
    """A section of its own, as it stands; empty where there is none."""
    if key not in data:
        return {}
    return mapping(data[key], f"{where}: {key}")


def merged(data: Any, where: str) -> dict[str, dict[str, Any]]:
    """Model -> a recipe's content, and perhaps the seed of its random keeps. mergekit has no such key."""
    found = {}
    for name, content in mapping(data or {}, where).items():
        found[name] = mapping(content, f"{where}: {name}")
        seed = found[name].get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise RecipeError(f"{where}: {name}: seed", f"found {seed!r}", "a whole number, 0 or more")
    return found


def tasks(data: Any, where: str) -> dict[str, str]:
    """Task -> model, in a form that names files too. mergekit has no such key."""
    if data is None:
        return {}
    data = mapping(data, where)
    for task, model in data.items():
        if not isinstance(task, str) or not task.strip() or "/" in task or task.startswith("."):
            raise RecipeError(where, f"found {task!r}", "names of tasks, without a slash and not beginning with a dot")
        if not isinstance(model, str) or not model.strip():
            raise RecipeError(f"{where}.{task}", f"found {model!r}", "one of the models")
    return data


def tower(data: Any, where: str) -> dict[str, str]:
    """Prefixes of a language model's tensor names -> of the base's. mergekit has no such key."""
    if data is None:
        return {}
    data = mapping(data, where)
    for prefix, place in data.items():
        if not isinstance(prefix, str) or not isinstance(place, str):
            raise RecipeError(where, f"found {prefix!r}: {place!r}", "prefixes of names, such as `model.: llm.model.`")
    return data


def chat_template(value: Any, where: str) -> str | None:
    """One of CHAT_TEMPLATES, or a template that Jinja reads."""
    if value is None or value in CHAT_TEMPLATES:
        return value
    if not isinstance(value, str) or "{" not in value:
        raise RecipeError(where, f"found {value!r}"[:120], f"{', '.join(CHAT_TEMPLATES)}, or a Jinja template")
    import jinja2

    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(value)
    except jinja2.TemplateSyntaxError as error:
        raise RecipeError(where, f"not a Jinja template ({error})"[:200], "one that Jinja reads") from None
    return value
