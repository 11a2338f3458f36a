"""Configuration files: read, their paths resolved against their folder, what is wrong with them in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from merge3.errors import ConfigError
from merge3.recipe import Recipe, load_yaml, nearest
from merge3.search.config import EvolveConfig, Task
from merge3.search.places import model_path


def load_config(
    path: str | Path, skip_too_long: bool = False, task_path: Sequence[str] = (), **overrides: Any
) -> EvolveConfig:
    """Read a configuration file. overrides: optimizer settings from the command line, None to keep.
    skip_too_long: `too_long: skip` for every task that does not say what else. task_path: further folders of tasks.

    Raises ConfigError naming file and key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(path, f"not UTF-8 at byte {error.start}", "an evolve configuration") from None
    except OSError as error:
        raise ConfigError(path, error.strerror or str(error), "an evolve configuration") from None
    data = load_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(path, f"found {type(data).__name__}", "a mapping with `genome` and `tasks`")
    changes = {k: v for k, v in overrides.items() if v is not None}
    if changes:
        data["optimizer"] = {**(data.get("optimizer") or {}), **changes}
    try:
        config = EvolveConfig.model_validate(data)
    except ValidationError as error:
        raise _readable(path, error) from None
    return _resolved(config, path, skip_too_long, task_path)


def _resolved(config: EvolveConfig, path: Path, skip_too_long: bool, task_path: Sequence[str]) -> EvolveConfig:
    data, folder = config.model_dump(), path.parent
    genome = data["genome"]
    genome["models"] = [model_path(m, folder) for m in genome["models"]]
    if genome["base_model"]:
        genome["base_model"] = model_path(genome["base_model"], folder)
    if genome["start"] is not None:
        genome["start"] = str((folder / Path(genome["start"]).expanduser()).resolve())
        Recipe.from_yaml(genome["start"])  # what is no recipe is found before any model is opened
    if tokenizer := config.genome.recipe_tokenizer():
        tokenizer = tokenizer.renamed(lambda model: model_path(model, folder))
        named = [genome["base_model"]] if genome["base_model"] else []
        tokenizer.check_models(dict.fromkeys([*named, *genome["models"]]), f"{path}: genome.")
        genome |= {"tokenizer_source": None, "tokenizer": None} | tokenizer.to_dict()
    data["task_path"] = [str((folder / place).resolve()) for place in data["task_path"]] + [*map(str, task_path)]
    for task in data["tasks"]:
        if task["items"] is not None:
            task["items"] = str((folder / task["items"]).resolve())
        if task["head"]:
            task["head"] = model_path(task["head"], folder)
        if skip_too_long and task["too_long"] == "error":
            task["too_long"] = "skip"
    if data["estimate"]["calibration"] != "auto":
        data["estimate"]["calibration"] = str((folder / data["estimate"]["calibration"]).resolve())
    return EvolveConfig.model_validate(data)


def _readable(path: Path, error: ValidationError) -> ConfigError:
    """The first problem as one line, with the nearest valid key for an unknown one."""
    first = error.errors()[0]
    where = ".".join(str(p) for p in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        section: Any = EvolveConfig
        for part in first["loc"][:-1]:
            if isinstance(part, str):
                section = section.model_fields[part].annotation
        fields = getattr(section, "model_fields", None) or Task.model_fields
        key = first["loc"][-1]
        return ConfigError(f"{path}: {where}", "unknown key", ", ".join(fields), nearest(str(key), fields))
    if first["type"] == "missing":
        return ConfigError(f"{path}: {where}", "missing", "a value")
    if first["type"] == "literal_error":
        hint = "a task, or several, with `objectives: [..]`" if where == "objective" else ""
        return ConfigError(f"{path}: {where}", f"found {first['input']!r}", first["ctx"]["expected"], hint)
    if not first["loc"]:
        return ConfigError(path, message)
    found = "" if isinstance(first["input"], dict) else f"found {first['input']!r}: "
    return ConfigError(f"{path}: {where}", f"{found}{message}")
