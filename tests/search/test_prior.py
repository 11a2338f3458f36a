"""`optimizer.prior: norms`: what it is made of, what it does to a search, and that a run keeps it."""

import json
import shutil
import sqlite3
from contextlib import closing

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from merge3.client import run
from merge3.engine import LocalEngine
from merge3.errors import ConfigError, ResumeMismatch
from merge3.pool import Pool
from merge3.search import optimizers
from merge3.search.config_files import load_config
from merge3.search.journal import Journal
from merge3.search.prior import steps_of
from merge3.search.sections import LATER_OF_OPTIMIZERS, Optimizer
from merge3.space import Space

EXPERTS = ("english", "italian", "translation")
PRIOR = {"budget": 12, "population": 6, "seed": 3, "prior": "norms"}


def configuration(folder, genome=None, **changes):
    data = yaml.safe_load((folder / "evolve.yaml").read_text()) | {"optimizer": PRIOR, "limit": 6} | changes
    data["genome"] |= genome or {}
    data["genome"] = {key: value for key, value in data["genome"].items() if value is not None}
    (folder / "prior.yaml").write_text(yaml.safe_dump(data))
    return load_config(folder / "prior.yaml")


def opened(config):
    engine = LocalEngine(Pool.open(config.models[0], config.models[1:]))
    return engine, Space(config.genome.definition(), engine.info().layout)


def journal_of(directory):
    with closing(Journal(directory)) as journal:
        return journal.identity(), [(c.genome.tobytes(), c.value) for c in journal.candidates()]


# -- what it is made of


SPACES = {
    "ties": {},
    "one group": {"layer_granularity": 0},
    "filters": {"filters": ["mlp", "self_attn"]},
    "shared genes": {"genes": ["weight", "lambda"]},
    "derived": {"merge_method": "tsv_m", "layer_granularity": 2},
    "no base": {"merge_method": "linear", "base_model": None, "models": ["./base", "./english", "./italian"]},
}


@pytest.mark.parametrize("case", SPACES)
def test_norms_are_those_of_the_tensors_that_a_gene_governs(own_world, case):
    """By hand from the files: a gene is named by what changing it changes in the recipe."""
    engine, space = opened(configuration(own_world, SPACES[case], optimizer={"budget": 6}))
    found = engine.relative_norms(space.definition)
    models, based = space.definition.models, space.definition.base is not None
    read = lambda model: {k: v.astype(np.float64) for k, v in load_file(f"{model}/model.safetensors").items()}
    files = {model: read(model) for model in {*models, *([space.definition.base] if based else [])}}
    mean = lambda name: np.mean([files[model][name] for model in models], axis=0)
    base = files[space.definition.base] if based else {name: mean(name) for name in files[models[0]]}
    near = 1e-5 if based else 1e-3  # without a base they are small differences of large numbers

    def group(name):
        layer = space.layout.layer_of(name)
        if not space.outside:
            return 0 if layer is None or space.whole else layer // 2
        return 0 if name in space.layout.pre else space.groups - 1 if layer is None else layer // 2 + 1

    def set_of(name):
        filters = space.definition.filters
        inside = space.layout.layer_of(name) is not None
        return next((i for i, f in enumerate(filters) if inside and f in name), len(filters))

    of_shared = []
    own = found[: int(np.prod(space.shape))].reshape(space.shape)
    for g in range(space.groups):
        squares = np.zeros((len(models), space.sets))
        below = np.zeros(space.sets)
        for name in base:
            if group(name) == g:
                below[set_of(name)] += (base[name] ** 2).sum()
                for m, model in enumerate(models):
                    squares[m, set_of(name)] += ((files[model][name] - base[name]) ** 2).sum()
        with np.errstate(invalid="ignore"):
            expected = np.sqrt(squares / below)
        assert own.size or space.shared == ("lambda",)
        np.testing.assert_allclose(own[g], np.repeat(expected[..., None], len(space.own), -1), rtol=near)
        of_shared += [np.sqrt(squares.sum() / below.sum() / len(models))] * len(space.shared)
    np.testing.assert_allclose(found[own.size :], of_shared, rtol=near)
    assert found.shape == (space.size,) and np.isfinite(found).any()


def test_steps_are_the_longer_the_less_a_gene_moves():
    norms = np.array([0.1, 0.2, 0.4, 0.05, 0.0, np.nan, 9.0])
    assert steps_of(norms).tolist() == [2.0, 1.0, 0.5, 2.0, 2.0, 1.0, 0.5]
    with pytest.raises(ConfigError, match="no model differs from the others"):
        steps_of(np.array([0.0, np.nan]))


# -- what it does


@pytest.mark.parametrize("assisted", [False, True])
def test_first_steps_have_these_lengths(assisted):
    steps = np.array([0.5, 1.0, 2.0, 2.0])
    low, high = np.zeros(4), np.array([1.0, 1.0, 1.0, 10.0])
    made = optimizers.make("cma", (low + high) / 2, low, high, 0.05, 400, 0, assisted, steps=steps)
    spread = np.std(made.ask(), axis=0) / (high - low)
    assert spread == pytest.approx(0.05 * steps, rel=0.15)


def test_a_run_keeps_its_steps(own_world, tmp_path):
    """It resumes to the same bits, by what the journal says, elsewhere too; another run's steps are no prior."""
    config = configuration(own_world)
    run.evolve(config, tmp_path / "whole", quiet=True, export=False)
    known, candidates = journal_of(tmp_path / "whole")
    engine, space = opened(config)
    steps = steps_of(engine.relative_norms(space.definition))
    assert json.loads(known["steps"]) == steps.tolist() and len(set(steps)) > 3
    copy = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    with closing(sqlite3.connect(copy / "run.db")) as db, db:
        db.execute("DELETE FROM candidates WHERE generation > 0")
        db.execute("DELETE FROM estimates WHERE generation > 0")
    run.evolve(config, copy, resume=True, quiet=True, export=False)
    assert journal_of(copy)[1] == candidates
    without = configuration(own_world, optimizer=PRIOR | {"prior": "none"})
    run.evolve(without, tmp_path / "without", quiet=True, export=False)
    assert journal_of(tmp_path / "without")[1] != candidates
    with closing(sqlite3.connect(copy / "run.db")) as db, db:
        db.execute("UPDATE run SET value = '[1.0]' WHERE key = 'steps'")
    with pytest.raises(ResumeMismatch, match="steps is 1 numbers, was written when the run began; expected"):
        run.evolve(configuration(own_world), copy, resume=True, quiet=True, export=False)


def test_runs_without_one_have_the_names_they_had(own_world):
    config = configuration(own_world, optimizer={"budget": 6})
    assert "prior" not in config.optimizer.identity()
    assert config.hash() == configuration(own_world, optimizer={"budget": 6, "prior": "none"}).hash()
    assert config.hash() != configuration(own_world, optimizer={"budget": 6, "prior": "norms"}).hash()
    assert json.loads(Optimizer().identity()).keys() | {*LATER_OF_OPTIMIZERS} == Optimizer.model_fields.keys()


# -- what is refused


REFUSED = {
    "an optimizer without steps": (
        {"optimizer": PRIOR | {"name": "random"}},
        "prior: norms with random, which has no steps; expected cma",
    ),
    "a path": (
        {"genome": {"space": "path", "merge_method": None, "base_model": None}},
        "optimizer.prior: norms of a path, which moves no weights; expected none",
    ),
    "a misspelt one": ({"optimizer": PRIOR | {"prior": "norm"}}, "prior: .*'none' or 'norms'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_prior_is_refused_with_the_configuration(own_world, case):
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as error:
        configuration(own_world, **changes)
    assert "\n" not in str(error.value)


def test_models_that_are_all_alike_are_refused(own_world, tmp_path):
    base = load_file(own_world / "base" / "model.safetensors")
    for expert in EXPERTS:
        save_file(base, own_world / expert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="optimizer.prior: norms, and no model differs from the others"):
        run.evolve(configuration(own_world), tmp_path / "run", quiet=True)
    assert journal_of(tmp_path / "run") == ({}, [])
