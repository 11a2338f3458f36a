"""The commands of item response theory: calibrate, extract, estimate."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from merge3 import irt
from merge3.client.terminal import bar
from merge3.errors import BadInput, ConfigError
from merge3.files import Held, write_atomically
from merge3.irt import Responses, read_responses
from merge3.irt.diagnostics import fit_statistics
from merge3.irt.extraction import Subset
from merge3.irt.responses import ResponsesError
from merge3.search import calibration as calibrations
from merge3.search.calibration_files import load, save
from merge3.tasks import keys_by_task


def calibrate(
    out: Path,
    config_file: Path | None,
    responses_file: Path | None,
    endpoints: tuple[str, ...],
    dimensions: int,
    seed: int,
    device: str,
    quiet: bool,
    skip_too_long: bool = False,
    task_path: Sequence[Path] = (),
) -> dict[str, Any]:
    """Fit banks to a response file, or to the answers of a configuration's endpoints and random merges."""
    if (out / "calibration.json").exists():
        raise BadInput(out, "a calibration is there already", "a new directory")
    if config_file is None and responses_file is None:
        raise BadInput("calibrate", "neither a configuration nor --responses", "one of them, or both")
    if config_file is None and skip_too_long:
        raise BadInput("--skip-too-long", "given without a configuration", "one, whose base says how long items may be")
    if config_file is not None:
        asked = _configured(config_file, responses_file, out, device, quiet, dimensions, skip_too_long, task_path)
    else:
        responses = read_responses(responses_file)
        asked = Asked(responses, calibrations.key_groups(responses), dimensions=dimensions, seed=seed)
    responses, endpoints = asked.responses, endpoints or asked.models
    unknown = [e for e in endpoints if e not in responses.models]
    if unknown and config_file is None:
        raise ResponsesError(responses_file, f"no rows of endpoint {unknown[0]!r}", "one of its models")
    show = lambda task, step, steps: quiet or bar(f"fitting {task}", step, steps)
    how = asked.dimensions, asked.seed
    found = calibrations.calibrate(responses, asked.groups, endpoints, *how, report=show)
    save(replace(found, asked=dict(asked.digests), checkpoints=list(asked.checkpoints)), out)
    tasks = {task: _described(found, task) for task in found.banks}
    return {"path": str(out), "answers": found.answers, "tasks": tasks, "skipped": dict(asked.skipped)}


@dataclass(frozen=True)
class Asked:
    """What banks are fitted to. groups: task -> keys of its items; models: a configuration's; skipped: task -> items
    that were too long; digests, checkpoints: of what was asked, and of whom, where a configuration says it."""

    responses: Responses
    groups: Mapping[str, Sequence[str]]
    models: Sequence[str] = ()
    dimensions: int = 1
    seed: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    checkpoints: Sequence[str] = ()


def _configured(
    config_file: Path,
    responses_file: Path | None,
    out: Path,
    device: str,
    quiet: bool,
    dimensions: int,
    skip_too_long: bool,
    task_path: Sequence[Path] = (),
) -> Asked:
    from merge3.client.run import open_engine
    from merge3.search.config_files import load_config
    from merge3.search.context import Search
    from merge3.search.gathering import digests, gather
    from merge3.search.identity import beside
    from merge3.search.journal import Journal
    from merge3.search.questions import load_questions
    from merge3.search.start import started
    from merge3.space import Space

    config = load_config(config_file, skip_too_long, task_path)
    if config.fit is not None:
        expected = "none: random merges lie around a start, such as the fitted.yaml of `merge3-client fit`"
        raise ConfigError(f"{config_file}: fit", "in a calibration", expected)
    questions = load_questions(config)
    if not quiet:
        print(*questions.notes, sep="\n", end="\n" if questions.notes else "", file=sys.stderr)
    dimensions = max(dimensions, config.estimate.dimensions)
    asked = digests(questions)
    settings = config.models, dimensions, config.optimizer.seed, questions.skipped, asked
    if responses_file is not None:
        return Asked(read_responses(responses_file), keys_by_task(questions.search), *settings)
    engine = open_engine(config, device, quiet)
    space = Space(config.genome.definition(), engine.info().layout)
    # What was answered before a kill is not asked again.
    with Held(out), closing(Journal(out)) as journal:
        hashes, search = engine.info().content_hashes, Search(config, questions, engine, space, journal)
        identity = {f"checkpoint {name}": digest for name, digest in hashes.items()}
        also = {"asked": {f"what task {task!r} asks": digest for task, digest in asked.items()}}
        journal.begin({"calibration of": config.hash()} | identity, beside(search) | also)
        show = lambda done, total: quiet or bar("models answering", done, total)
        responses = gather(started(search), show)
    return Asked(responses, keys_by_task(questions.search), *settings, list(hashes.values()))


def _described(found: calibrations.Calibration, task: str) -> dict[str, Any]:
    bank = found.banks[task]
    outfit = fit_statistics(bank, found.responses[task]).item_outfit
    return {
        "items": len(bank.items),
        "models": len(bank.models),
        "answers": bank.meta["answers"],
        "steps": bank.meta["steps"],
        "ability_sd": float(bank.theta_sd.mean()),
        "misfitting_items": int((outfit > 1.5).sum()),
    }


def extract(directory: Path, method: str, size: int, seed: int, out: Path | None) -> dict[str, Any]:
    """Choose items of every task; {"method", "tasks": {task: {"items": [keys], "weights": [..]}}}."""
    found = load(directory)
    subsets = calibrations.subsets_of(found, method, size, seed)
    result = {
        "method": method,
        "tasks": {
            task: {"items": [found.banks[task].items[i] for i in s.index], "weights": s.weights.tolist()}
            for task, s in subsets.items()
        },
    }
    if out is not None:
        write_atomically(out, json.dumps(result, indent=1))
    return result


def estimate(directory: Path, subset_file: Path, responses_file: Path, method: str) -> list[dict[str, Any]]:
    """Accuracy of every model in a response file from its answers to a subset: one dict per model."""
    found, subset = load(directory), _read_subset(subset_file)
    answers = read_responses(responses_file)
    per_model: dict[str, dict[str, tuple[float, float]]] = {}
    for task, chosen in subset["tasks"].items():
        if task not in found.banks:
            raise ResponsesError(subset_file, f"unknown task {task!r}", ", ".join(found.banks))
        bank = found.banks[task]
        position = {item: i for i, item in enumerate(bank.items)}
        missing = [item for item in chosen["items"] if item not in position]
        if missing:
            raise ResponsesError(subset_file, f"item {missing[0]!r} is not in the calibration", f"items of {directory}")
        index = np.array([position[item] for item in chosen["items"]])
        estimator = irt.prepare(
            bank,
            found.responses[task],
            Subset(index, np.array(chosen["weights"]), subset["method"]),
            method,
            found.endpoints,
        )
        if estimator.note:
            print(f"{task}: {estimator.note}", file=sys.stderr)
        own = answers.only(chosen["items"], str(responses_file))
        result = irt.estimate(estimator, own.values)
        for name, value, stderr in zip(own.models, result.value.tolist(), result.stderr.tolist()):
            per_model.setdefault(name, {})[task] = (value, stderr)
    rows = []
    for name, tasks in per_model.items():
        values, errors = np.array(list(tasks.values())).T
        rows.append(
            {
                "model": name,
                "accuracy": float(values.mean()),
                "stderr": float((errors**2).sum() ** 0.5 / len(errors)),
                "tasks": {t: {"accuracy": v, "stderr": e} for t, (v, e) in tasks.items()},
                "complete": len(tasks) == len(subset["tasks"]),
            }
        )
    return sorted(rows, key=lambda row: -row["accuracy"])


def _read_subset(path: Path) -> dict[str, Any]:
    try:
        subset = json.loads(path.read_text(encoding="utf-8"))
        for task in subset["tasks"].values():
            if len(task["items"]) != len(task["weights"]) or not task["items"]:
                raise ValueError("as many weights as items")
        return {"method": subset["method"], "tasks": subset["tasks"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResponsesError(
            path, f"{type(error).__name__}: {error}"[:200], "what `merge3-client extract --out` wrote"
        ) from None
