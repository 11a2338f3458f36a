"""Where models lie that a file names: relative to the file, by the names that a configuration knows them by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from merge3.recipe import ModelRef, Recipe


def model_path(model: str, folder: Path) -> str:
    """Local paths become absolute, hub ids stay; each side of `model+adapter` by itself."""
    parts = []
    for part in model.split("+"):
        local = (folder / Path(part).expanduser()).resolve()
        parts.append(str(local) if local.exists() or part.startswith((".", "/", "~")) else part)
    return "+".join(parts)


def read_start(path: str | Path, models: Sequence[str]) -> Recipe:
    """A recipe whose models bear the names they have in the configuration, where they are the same.

    models: as load_config names them. A relative path means what lies beside the recipe, else, as for mergekit, beside
    where the process runs. Raises RecipeError naming the file and key.
    """
    known = {str(ModelRef.parse(model)) for model in models}
    return Recipe.from_yaml(path).renamed(lambda ref: _known(ref, Path(path).parent, known))


def _known(ref: ModelRef, folder: Path, known: set[str]) -> ModelRef:
    """A model by the name that is known, if one is."""
    for place in (folder, Path.cwd()):
        name = model_path(str(ref), place)
        if name in known:
            return ModelRef.parse(name)
    return ref
