"""`merge3-client fit` and `merge` of a recipe whose models are zipped: match units on items, write, measure."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge3.checkpoint import check_free
from merge3.client.fit_files import FitFiles
from merge3.client.fit_result import other_run
from merge3.client.zip_result import summary, told_sizes
from merge3.client.zip_work import Done, Work, read, work
from merge3.errors import RecipeError
from merge3.files import Held, write_atomically
from merge3.learn.zip_file import FILE, save_zip
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.tasks import items_hash


def merge_zip(file: Path, recipe: Recipe, directory: Path, as_json: bool = False, quiet: bool = False) -> None:
    """`merge` of such a recipe: the checkpoint alone is wanted, or those of both models."""
    check_free(directory)
    ready = work(read(file, recipe), quiet=quiet or as_json)
    done = ready.zipped(ready.asked.row.match)
    save(ready, done, directory)
    result = json.loads((directory / FILE).read_text(encoding="utf-8"))
    print(json.dumps(result) if as_json else told_sizes(result, directory))


def fit_zip(
    recipe: Recipe,
    file: Path,
    directory: Path,
    resume: bool,
    as_json: bool,
    quiet: bool,
    device: str,
    export: bool,
    compare: Sequence[Path],
) -> dict[str, Any]:
    """As fit.fit, which hands over to this. It takes one pass over the items, and is begun anew by --resume."""
    asked = read(file, recipe)
    if asked.settings.heldout == 0:
        found = "found 0, and nothing would say what the zip is worth"
        raise RecipeError(f"{file}: fit.heldout", found, "a share of every task's items", "`merge` measures nothing")
    others = {str(run): other_run(run, asked.taught.heldout) for run in compare}
    began = time.perf_counter()
    ready = work(asked, device, quiet or as_json)
    files = FitFiles(directory, resume)
    with Held(directory):
        files.begin(_identity(ready))
        write_atomically(directory / "recipe.yaml", recipe.to_yaml())
        done = ready.zipped(asked.row.match)
        seconds = time.perf_counter() - began
        if export and not (directory / "model").exists():
            save(ready, done, directory / "model")
        result = summary(ready, done, others, seconds)
        write_atomically(directory / "result.json", json.dumps(result, indent=2))
    return result


def save(ready: Work, done: Done, directory: Path) -> None:
    """Write what came of the models, and zip.json."""
    asked, settings = ready.asked, ready.asked.settings
    told = {
        "method": asked.row.name,
        "models": [str(model) for model in asked.recipe.models()],
        "layers": ready.seen.depth,
        "of": ready.seen.map.layers,
        "alpha": settings.alpha,
        "beta": settings.beta,
        "items": items_hash(asked.taught.learned),
    }
    save_zip(done.zipped, done.models, dict(zip(asked.names, ready.folders)), told, directory, ready.dtype)


def _identity(ready: Work) -> dict[str, str]:
    asked = ready.asked
    settings = asked.settings.model_dump(mode="json", exclude={"items"})
    found = {"method": asked.row.name, "settings": json.dumps(settings, sort_keys=True)}
    for name, items in (("learned items", asked.taught.learned), ("held-out items", asked.taught.heldout)):
        found[name] = items_hash(items)
    for place, source in enumerate(asked.recipe.slices[0].sources):
        found[f"checkpoint {place}"] = Pool.open(source.model, ()).content_hashes()[str(source.model)]
    return found
