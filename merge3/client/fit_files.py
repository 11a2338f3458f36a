"""A fit's run directory: what it is a run of, how far it has come, and every step's loss.

fit.json             what must be equal for a run to be continued
state.safetensors    the latest step from which it can be continued
latest.yaml          the recipe that it merges
seconds.json         how long its steps took, over all times that the run was continued
history.jsonl        a line a step, up to that one and perhaps further
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from merge3 import __version__
from merge3.errors import ResourceError, ResumeMismatch
from merge3.files import write_atomically
from merge3.learn.fitting import State
from merge3.recipe import Recipe

IDENTITY, STATE, HISTORY, LATEST = "fit.json", "state.safetensors", "history.jsonl", "latest.yaml"
SECONDS = "seconds.json"


def identity(recipe: Recipe, hashes: Mapping[str, str], items: Mapping[str, str]) -> dict[str, str]:
    """Name -> what it is for this run. By place, not by path: a folder that was moved is the same run.

    hashes: of every endpoint's contents; items: name -> hash of items.
    """
    places = {str(model): f"model {i}" for i, model in enumerate(recipe.models())}
    data = recipe.to_dict()
    for section in ("fit", "surgery"):  # files count by their content, models by their place
        data.pop(section, None)
        if own := getattr(recipe, section):
            data[section] = {key: value for key, value in own.items() if key != "items"}
    text = json.dumps(data, sort_keys=True)
    for name, place in sorted(places.items(), key=lambda entry: -len(entry[0])):
        text = text.replace(json.dumps(name), json.dumps(place))
    found = {"merge3": __version__, "recipe": hashlib.sha256(text.encode()).hexdigest()[:16], **items}
    for place, content in enumerate(hashes.values()):
        found[f"checkpoint {place}"] = content
    return found


class FitFiles:
    """The files of one run. Raises ResumeMismatch where there is another run, or none to resume."""

    def __init__(self, directory: Path, resume: bool):
        self.directory, self.resume = directory, resume
        try:
            there = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
            if resume and IDENTITY not in there:
                raise ResumeMismatch(directory, f"no {IDENTITY}", "the directory of a fit to resume")
            # A run that ended before its first state leaves nothing to keep.
            left = {name for name in there if not name.startswith(".")} - {IDENTITY, "recipe.yaml"}
            if not resume and left:
                expected = "a new or empty directory" if IDENTITY not in there else "a new directory, or --resume"
                raise ResumeMismatch(directory, "not empty", expected)
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(directory, error.strerror or str(error), "a directory that can be written") from None

    def begin(self, found: Mapping[str, str]) -> None:
        """Write down what this is a run of; of a run that is resumed, compare."""
        file = self.directory / IDENTITY
        if not file.exists() or not self.resume:
            write_atomically(file, json.dumps(dict(found), indent=2))
            return
        with _readable(file):
            before = dict(json.loads(file.read_text(encoding="utf-8")))
        for key in sorted({*before, *found}):
            if before.get(key) != found.get(key):
                where = f"{self.directory}: {key}"
                raise ResumeMismatch(where, f"found {found.get(key)}", f"{before.get(key)}, as this run began with")

    def state(self) -> State | None:
        """The latest step that was saved."""
        file = self.directory / STATE
        if not file.exists():
            return None
        with _readable(file):
            found = load_file(file)
            return State(int(found["step"]), found["raw"], (found["exp_avg"], found["exp_avg_sq"]))

    def latest(self, recipe: Recipe) -> Recipe:
        """What the state that was saved last merges. recipe: this run's; its models may lie elsewhere by now."""
        found = Recipe.from_yaml(self.directory / LATEST)
        now = dict(zip(found.models(), recipe.models()))
        return found.renamed(lambda ref: now.get(ref, ref))

    @property
    def seconds(self) -> float:
        """Of the steps that are saved."""
        file = self.directory / SECONDS
        if not file.exists():
            return 0.0
        with _readable(file):
            return float(json.loads(file.read_text(encoding="utf-8")))

    def save(self, state: State, lines: Iterable[Mapping[str, Any]], recipe: Recipe, seconds: float) -> None:
        """State, history and recipe, in an order in which none can lack what the state has. seconds: in all."""
        write_atomically(self.directory / SECONDS, json.dumps(seconds))
        write_atomically(self.directory / LATEST, recipe.to_yaml())
        self.tell(lines)
        first, second = state.moments
        tensors = {"step": torch.tensor(state.step), "raw": state.raw, "exp_avg": first, "exp_avg_sq": second}
        write_atomically(self.directory / STATE, save(tensors))

    def tell(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write the history."""
        write_atomically(self.directory / HISTORY, "".join(json.dumps(line) + "\n" for line in lines))

    def history(self, until: int) -> list[dict[str, Any]]:
        """Lines of steps up to `until`."""
        file = self.directory / HISTORY
        if not file.exists():
            return []
        with _readable(file):
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            return [line for line in lines if line["step"] <= until]


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ResumeMismatch(file, f"damaged ({reason})", "a file of this run as it was written") from None
