"""A calibration as a folder: responses.csv, a bank and a picture per task, calibration.json."""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from merge3.errors import Merge3Warning
from merge3.files import write_atomically
from merge3.irt import ItemBank, Responses, read_responses, write_responses
from merge3.irt.diagnostics import plot
from merge3.irt.responses import ResponsesError
from merge3.search.calibration import Calibration


def save(calibration: Calibration, directory: str | Path) -> None:
    """Write responses.csv, a bank and a diagnostic picture per task, and calibration.json, last. Without matplotlib
    a Merge3Warning stands for the pictures."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    models = tuple(dict.fromkeys(m for r in calibration.responses.values() for m in r.models))
    keys = tuple(k for r in calibration.responses.values() for k in r.items)
    values, column = np.full((len(models), len(keys)), np.nan), 0
    for responses in calibration.responses.values():
        rows = [models.index(m) for m in responses.models]
        values[rows, column : column + len(responses.items)] = responses.values
        column += len(responses.items)
    write_responses(Responses(models, keys, values), directory / "responses.csv")
    pictures = find_spec("matplotlib") is not None
    if not pictures:
        line = "no pictures of how well the items fit: they need matplotlib (pip install 'merge3-gpu[plots]')"
        warnings.warn(f"{directory}: {line}", Merge3Warning, stacklevel=2)
    for number, (task, bank) in enumerate(calibration.banks.items()):
        bank.save(directory, f"bank-{number}")
        if pictures:
            plot(bank, calibration.responses[task], directory / f"diagnostics-{number}.png", task)
    described = {"tasks": list(calibration.banks), "endpoints": calibration.endpoints, "answers": calibration.answers}
    described |= {"asked": dict(calibration.asked or {}), "checkpoints": list(calibration.checkpoints or ())}
    write_atomically(directory / "calibration.json", json.dumps(described, indent=1))


def load(directory: str | Path) -> Calibration:
    """Read what `save` wrote. Raises ResponsesError naming what is missing or damaged."""
    path = Path(directory) / "calibration.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        tasks, endpoints, answers = (described[k] for k in ("tasks", "endpoints", "answers"))
        of = described.get("asked"), described.get("checkpoints")
    except (OSError, ValueError, KeyError) as error:
        raise ResponsesError(
            path, f"{type(error).__name__}: {error}"[:200], "a folder made by `merge3-client calibrate`"
        ) from None
    banks = {task: ItemBank.load(directory, f"bank-{number}") for number, task in enumerate(tasks)}
    responses = read_responses(Path(directory) / "responses.csv")
    own = {task: responses.only(bank.items).rows(bank.models) for task, bank in banks.items()}
    return Calibration(own, banks, tuple(endpoints), answers, *of)
