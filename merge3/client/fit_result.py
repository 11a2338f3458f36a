"""What a fit came to, beside the endpoints, the default merges and other runs; what it cost; and the table of both."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from merge3.client.fit_items import Taught
from merge3.engine import Engine, Subject
from merge3.errors import BadInput, Merge3Warning
from merge3.learn.fit import Fit, others_of
from merge3.learn.losses import LOSSES
from merge3.methods.averages import AS_IT_IS
from merge3.recipe import ModelRef, Recipe, Slice, Source
from merge3.registration import Registration
from merge3.search.baselines import default_merges
from merge3.search.measure import Measured, items_name, measured, short_names
from merge3.tasks import Item, LogitsError


def measure(engine: Engine, held: Registration, subject: Subject) -> Measured:
    """Accuracy of one subject on a registration's items."""
    (evaluation,) = engine.evaluate(held, [subject])
    return measured(evaluation.answers(), held.items)


def baselines(engine: Engine, recipe: Recipe, held: Registration) -> dict[str, Measured]:
    """Held-out accuracy of the endpoints and the default merges; what has no answers is named and left out."""
    models = [str(model) for model in recipe.models()]
    base = None if recipe.base_model is None else str(recipe.base_model)
    merges = dict(default_merges(base, others_of(recipe), recipe.dtype, dict(recipe.tower)))
    names = short_names(models, merges)
    subjects: list[tuple[str, Recipe | str]] = [(names[model], _asked_as(model, recipe, held)) for model in models]
    for name, merge in merges.items():
        subjects.append((name, replace(merge, tokenizer=recipe.tokenizer, chat_template=recipe.chat_template)))
    found = {}
    for name, subject in subjects:
        try:
            if isinstance(subject, Recipe):
                engine.check(subject)
            found[name] = measure(engine, held, subject)
        except (LogitsError, BadInput) as error:
            warnings.warn(f"baseline {name} is left out: {error}", Merge3Warning, stacklevel=2)
            refused = error
    if not found:
        raise refused
    return found


def _asked_as(model: str, recipe: Recipe, held: Registration) -> Recipe | str:
    """An endpoint; where the recipe says what template prompts have, as a recipe of it alone that says so too."""
    if not held.chat or recipe.chat_template is None:
        return model
    alone = Slice((Source(ModelRef.parse(model)),))
    return replace(recipe, method=AS_IT_IS, slices=(alone,), base_model=None, parameters={}, fit={}, surgery={})


def other_run(run: Path, heldout: Sequence[Item]) -> dict[str, Any]:
    """What another run's result.json says. Raises BadInput for one that is not readable, or was measured otherwise."""
    try:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        detail = result["heldout_detail"]
        numbers = [detail["accuracy"], detail["stderr"], *dict(detail["tasks"]).values()]
        readable = all(isinstance(number, (int, float)) for number in numbers)
    except (OSError, ValueError, KeyError, TypeError):
        readable = False
    if not readable:
        raise BadInput("--compare", f"no readable result.json in {run}", "a finished run directory")
    if result.get("heldout_name") != items_name(heldout):
        expected = "one of the same files, share and seed, which has the same held-out items"
        raise BadInput("--compare", f"{run} was measured on other items", expected)
    return {"detail": detail, "answers": result.get("item_answers"), "items": result.get("heldout_items")}


def summary(
    recipe: Recipe,
    taught: Taught,
    history: Sequence[Mapping[str, Any]],
    cost: Mapping[str, int],
    heldout: Measured,
    beside: Mapping[str, Measured],
    others: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """result.json."""
    what = Fit(recipe, taught.experts)
    settings = what.settings
    passes = {"merges": cost["merges"], "forward": cost["items"], "backward": cost["items"]}
    if LOSSES[what.method.loss].expert:
        passes["forward of experts"] = len(taught.learned)
    return {
        "method": recipe.method,
        "models": [str(model) for model in recipe.models()],
        "seed": settings.seed,
        "heldout": heldout["accuracy"],
        "heldout_detail": heldout,
        "heldout_items": len(taught.heldout),
        "heldout_name": items_name(taught.heldout),
        "baselines": {name: detail["accuracy"] for name, detail in beside.items()},
        "baselines_detail": dict(beside),
        "best_baseline": max(beside, key=lambda name: beside[name]["accuracy"]),
        "learned_items": len(taught.learned),
        "labels": what.method.labels,
        "settings": settings.model_dump(mode="json"),
        "passes": passes,
        "item_answers": passes["forward"] + passes.get("forward of experts", 0),
        "losses": [line["loss"] for line in history],
        "others": dict(others),
        "seconds": seconds,
        "peak_memory": peak_memory(),
    }


def peak_memory() -> dict[str, int]:
    """Bytes that this process had at most, in memory and on a GPU."""
    import resource

    found = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.max_memory_allocated()
    return found


def print_fit(result: Mapping[str, Any], directory: Path) -> None:
    """The table a person reads at the end."""
    if "zip" in result:
        from merge3.client.zip_result import print_zip

        return print_zip(result, directory)
    if "surgery" in result:
        from merge3.client.surgery import print_surgery

        return print_surgery(result, directory)
    from rich.console import Console

    from merge3.client.run import accuracy_table

    rows = [("fitted", result["heldout_detail"])]
    rows += [(name, other["detail"]) for name, other in result["others"].items()]
    rows += sorted(result["baselines_detail"].items(), key=lambda row: -row[1]["accuracy"])
    console = Console()
    console.print(accuracy_table(rows, result["heldout_items"], "the fit", "fitted"))
    gain = result["heldout"] - result["baselines"][result["best_baseline"]]
    passes, learned = result["passes"], "labelled" if result["labels"] else "unlabelled"
    console.print(
        f"{passes['merges']} steps over {result['learned_items']} {learned} items in {result['seconds']:.0f} s, "
        f"{gain:+.3f} over the best baseline ({result['best_baseline']})"
    )
    counted = ", ".join(f"{name} {count:,}" for name, count in passes.items())
    console.print(f"passes: {counted}; peak memory {result['peak_memory']['resident'] / 2**30:.2f} GiB")
    model = f"model {directory / 'model'}, " if (directory / "model").exists() else ""
    console.print(f"recipe {directory / 'fitted.yaml'}, {model}report {directory / 'report.html'}")
