"""Searches for a path, and from a merge on for one: found, resumed, exported, on a daemon too."""

import csv
import json
import shutil
import sqlite3
from contextlib import closing

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from merge3.client import run
from merge3.engine import LocalEngine
from merge3.errors import BadInput, ConfigError
from merge3.export import merge_to_disk
from merge3.joined import join
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.search import optimizers
from merge3.search.config_files import load_config
from merge3.search.journal import Journal
from tests.killing import killed

PATH = {"models": ["./english", "./translation"], "space": "path", "repetitions": 2, "max_hops": 7, "pinned": [1, 1]}
BOTH = {
    "models": ["./english", "./translation"],
    "base_model": "./base",
    "merge_method": "task_arithmetic",
    "max_hops": 8,
}
TASKS = [{"items": f"./{task}.jsonl", "limit": 12} for task in ("english", "translation")]
CATCMA = {"name": "catcma", "budget": 12, "population": 6, "seed": 3}


def written(folder, name="path", genome=PATH, **changes):
    data = {"genome": genome, "tasks": TASKS, "optimizer": CATCMA} | changes
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    return folder / f"{name}.yaml"


def hybrid(folder):
    stages = ["parameters", {"space": "path", "optimizer": {"name": "catcma"}}]
    optimizer = CATCMA | {"name": "cma"}
    return written(folder, "hybrid", BOTH, stages=stages, optimizer=optimizer)


def journal(directory):
    with sqlite3.connect(directory / "run.db") as db:
        return db.execute(
            "SELECT generation, position, genome, recipe_hash, responses, value, stderr "
            "FROM candidates JOIN estimates USING (generation, position) ORDER BY 1, 2"
        ).fetchall()


def test_a_search_for_a_path_leaves_a_recipe_and_a_model_that_are_the_winner(own_world, tmp_path):
    result = run.evolve(load_config(written(own_world)), tmp_path / "run", quiet=True)
    assert result["candidates"] == 12 and result["failed"] == 0
    best = Recipe.from_yaml(tmp_path / "run" / "best.yaml")
    merge_to_disk(best, tmp_path / "again")
    ours = load_file(tmp_path / "run" / "model" / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (
        config["num_hidden_layers"] <= 7
        and f"model.layers.{config['num_hidden_layers'] - 1}.mlp.up_proj.weight" in ours
    )
    page = (tmp_path / "run" / "report.html").read_text()
    assert "scales along the path" in page and "1: layer 0" in page


def test_what_a_path_takes_is_an_objective_to_the_end(solving_world, tmp_path):
    """Through the race and on held-out items too."""
    optimizer = {"name": "nsga2", "budget": 24, "population": 6, "seed": 3}
    how = {"objectives": ["accuracy", "cost"], "optimizer": optimizer, "race": {"candidates": 6, "share": 1.0}}
    how |= {"extract": {"method": "random", "size": 4}, "estimate": {"method": "mean"}, "heldout": {"fraction": 0.5}}
    file = written(shutil.copytree(solving_world, tmp_path / "world"), "costs", PATH | {"pinned": [0, 0]}, **how)
    result = run.evolve(load_config(file), tmp_path / "run", quiet=True)
    members = list(csv.DictReader((tmp_path / "run" / "front.csv").open()))
    for member in members:
        pieces = Recipe.from_yaml(tmp_path / "run" / member["recipe"]).slices
        ranges = [piece.sources[0].layer_range for piece in pieces]
        layers = sum(end - begin for begin, end in ranges)
        told = [float(member[f"cost{what}"]) for what in ("", "_se", "_heldout", "_heldout_se")]
        assert told == pytest.approx([layers / 4, 0, layers / 4, 0], abs=1e-3)
    assert {member["cost"] for member in members} > {"1"}
    assert result["front"]["hypervolume"]["reference"]["cost"] == 1.0


@pytest.mark.heavy
@pytest.mark.parametrize("counts", [(15,), (5, 18)])
def test_a_run_in_stages_that_is_killed_in_either_goes_on_to_the_same_bits(own_world, tmp_path, counts):
    file, directory = hybrid(own_world), tmp_path / "run"
    killed(file, directory, counts, 24)
    run.evolve(load_config(file), directory, resume=True, quiet=True)
    (tmp_path / "killed").mkdir()
    shutil.move(directory, tmp_path / "killed" / "run")  # the same name, which the winner's is made of
    result = run.evolve(load_config(file), directory, quiet=True)
    assert journal(directory) == journal(tmp_path / "killed" / "run")
    assert (directory / "best.yaml").read_bytes() == (tmp_path / "killed" / "run" / "best.yaml").read_bytes()
    other = json.loads((tmp_path / "killed" / "run" / "result.json").read_text())
    assert (other["heldout"], other["baselines"], other["ledger"]) == tuple(
        result[key] for key in ("heldout", "baselines", "ledger")
    )
    # one journal, one ledger, one report
    assert result["candidates"] == 24 and result["ledger"]["search"] == 24 * 24 == result["ledger"]["full"]
    assert (
        "parameters" in result["baselines"] and "task_arithmetic, then path" in (directory / "report.html").read_text()
    )
    # what the second stage began at is the first one's winner, which lies in a folder only now
    first = Recipe.from_yaml(directory / "parameters.yaml")
    merge_to_disk(first, tmp_path / "again")
    ours, again = (load_file(f / "model.safetensors") for f in (directory / "parameters", tmp_path / "again"))
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    merge_to_disk(Recipe.from_yaml(directory / "best.yaml"), tmp_path / "from files")
    ours, again = (load_file(f / "model.safetensors") for f in (directory / "model", tmp_path / "from files"))
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_a_merge_that_joins_is_what_would_have_been_written(tied_family, tmp_path):
    models = [str(tied_family / name) for name in ("base", "e0", "e1")]
    parts = [{"model": m, "parameters": {"weight": w}} for m, w in zip(models[1:], (0.4, 0.9))]
    recipe = Recipe.parse({"merge_method": "task_arithmetic", "base_model": models[0], "models": parts})
    merge_to_disk(recipe, tmp_path / "merged")
    pool = Pool.open(models[0], models[1:])
    engine = LocalEngine(pool)
    before = engine.info()
    join(pool, "it", recipe.to_dict())
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    found = pool.endpoints["it"]
    assert found.tensors.keys() == stored.keys()
    assert all(torch.equal(found.get(name), stored[name]) for name in stored)
    for name in stored:  # pages that were given back are there again
        found.release(name)
        assert torch.equal(found.get(name), stored[name])
    after = engine.info()
    assert (after.endpoints, after.content_hashes) == (before.endpoints, before.content_hashes)
    other = Recipe.parse(recipe.to_dict() | {"parameters": {"lambda": 0.5}})
    join(pool, "it", other.to_dict())
    assert not torch.equal(pool.endpoints["it"].get("model.norm.weight"), stored["model.norm.weight"])
    with pytest.raises(BadInput, match="is an endpoint"):
        join(pool, models[1], recipe.to_dict())
    for name in "abc":
        join(pool, name, recipe.to_dict())
    assert list(pool.joined) == ["b", "c"] and list(pool.endpoints) == [*models, "b", "c"]


REFUSED = {
    "pins outside the range": (dict(genome=PATH | {"pinned": [3, 2]}), "pinned"),
    "negative scales": (dict(genome=PATH | {"bounds": {"scale": [-1.0, 1.0]}}), "scales above 0"),
    "a method that merges": (dict(genome=PATH | {"merge_method": "ties"}), "found ties; expected passthrough"),
    "an empty path": (dict(genome=PATH | {"max_hops": 0}), "max_hops: found 0"),
    "paths without a path": (dict(genome=BOTH), "genome.max_hops: of a path"),
    "stages and a space": (dict(genome=PATH, stages=["parameters", "path"]), "genome.space: path beside stages"),
    "stages in another order": (dict(genome=BOTH, stages=["path", "parameters"]), "expected parameters, then path"),
    "one stage": (dict(genome=BOTH, stages=["path"]), "expected parameters, then path"),
    "a stage's optimizer": (
        dict(genome=BOTH, stages=["parameters", {"space": "path", "optimizer": {"nam": "cma"}}]),
        "nam",
    ),
    "pins of the second stage": (
        dict(genome=BOTH | {"pinned": [9, 9]}, stages=["parameters", "path"]),
        r"pinned: found \[9, 9\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_before_the_search(own_world, tmp_path, name):
    changes, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as error:
        run.evolve(load_config(written(own_world, **changes)), tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    if (tmp_path / "run" / "run.db").exists():
        with closing(Journal(tmp_path / "run")) as store:
            assert not store.begun


def test_a_start_of_another_space_is_refused_and_one_of_this_is_the_first_candidate(own_world, tmp_path):
    merge = {"merge_method": "linear", "models": [{"model": "./english", "parameters": {"weight": 1.0}}]}
    (own_world / "merge.yaml").write_text(yaml.safe_dump(merge))
    slices = [
        {"sources": [{"model": f"./{m}", "layer_range": r}]} for m, r in (("english", [0, 4]), ("translation", [3, 4]))
    ]
    slices.append({"sources": [{"model": "./english", "layer_range": [3, 4]}]})
    (own_world / "order.yaml").write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    with pytest.raises(ConfigError, match="found linear with `models`; expected passthrough slices"):
        run.evolve(
            load_config(written(own_world, genome=PATH | {"start": "./merge.yaml"})), tmp_path / "run", quiet=True
        )
    for name in ("catcma", "cma"):
        file = written(own_world, genome=PATH | {"start": "./order.yaml"}, optimizer=CATCMA | {"name": name})
        run.evolve(load_config(file), tmp_path / name, quiet=True, export=False)
        with closing(Journal(tmp_path / name)) as store:
            first = store.candidates()[0]
        engine = run.open_engine(load_config(file), quiet=True)
        space = engine.space(load_config(file).genome.definition())
        shown = [(hop.model.rpartition("/")[2], hop.layer) for hop in space.path(first.genome)]
        assert shown == [*(("english", n) for n in range(4)), ("translation", 3), ("english", 3)]


def target(n):
    """Bits and numbers to find: a number counts where its bit is on."""
    rng = np.random.default_rng(5)
    bits, numbers = rng.random(n) > 0.5, rng.uniform(0.6, 1.6, n)
    loss = lambda g: float(((g[:n] > 0.5) != bits).sum() + (bits * (g[n:] - numbers) ** 2).sum())
    return loss, np.arange(2 * n) < n


def climbed(name, generations, n=12, **others):
    loss, bits = target(n)
    initial = np.where(bits, 1 / 6, 1.0)
    low, high = np.where(bits, 0.0, 0.5), np.where(bits, 1.0, 2.0)
    optimizer = optimizers.make(name, initial, low, high, 1 / 6, None, 3, bits=bits, **others)
    asked = []
    for number in range(generations):
        genomes = optimizer.ask()
        asked.append(np.array(genomes))
        fitness = [-loss(genome) for genome in genomes]
        fitness[1] = float("nan") if number == 0 else fitness[1]
        optimizer.tell(genomes, fitness, [0.0] * len(genomes))
    return loss, initial, np.array(asked), optimizer


def test_catcma_finds_bits_and_numbers_together_and_begins_at_the_start():
    loss, initial, asked, optimizer = climbed("catcma", 40)
    assert np.array_equal(asked[0][0], np.where(np.arange(24) < 12, 0.0, 1.0))
    assert (
        set(np.unique(asked[..., :12])) == {0.0, 1.0} and asked[..., 12:].min() >= 0.5 and asked[..., 12:].max() <= 2.0
    )
    assert loss(initial) > 4 and loss(optimizer.favorite()) < 0.2


def test_catcma_replays_to_the_last_bit_and_leaves_numpys_generator_alone():
    np.random.seed(1)
    expected = np.random.rand()
    np.random.seed(1)
    first = climbed("catcma", 6)[2]
    assert np.random.rand() == expected
    assert np.array_equal(first, climbed("catcma", 6)[2])


def test_catcma_survives_generations_that_are_all_alike_and_genomes_without_bits_or_numbers():
    for bits in (np.zeros(4, bool), np.ones(4, bool), np.array([True, False, True, False]), None):
        optimizer = optimizers.make("catcma", np.full(4, 0.5), np.zeros(4), np.ones(4), 0.2, 6, 0, bits=bits)
        for _ in range(8):
            genomes = optimizer.ask()
            optimizer.tell(genomes, [0.5] * 6, [0.1] * 6)
        assert np.isfinite(genomes).all() and ((optimizer.favorite() >= 0) & (optimizer.favorite() <= 1)).all()


def test_the_papers_encoding_is_cma_over_the_same_genome():
    loss, initial, asked, optimizer = climbed("cma", 60)
    assert loss(asked[-1][0]) < loss(initial) and len(np.unique(asked[..., :12])) > 100


def test_a_budget_that_streams_layers_is_refused_before_a_search_for_a_path(own_world, tmp_path):
    file = written(own_world)
    config = load_config(file)
    whole = Pool.open(config.models[0], config.models[1:]).memory
    with pytest.raises(ConfigError, match=r"^memory_budget: 'model\.layers\..*' of .* is streamed; expected"):
        run.evolve(config, tmp_path / "run", quiet=True, memory_budget=str(whole.slot + whole.total // 2))
    with closing(Journal(tmp_path / "run")) as store:
        assert not store.begun


def test_a_budget_without_room_for_the_first_winner_is_refused_before_the_search(own_world, tmp_path):
    file = hybrid(own_world)
    config = load_config(file)
    whole = Pool.open(config.models[0], config.models[1:]).memory
    with pytest.raises(BadInput, match="memory_budget: found .*merges that join the models") as error:
        run.evolve(config, tmp_path / "run", quiet=True, memory_budget=str(3 * whole.slot))
    assert "\n" not in str(error.value)
    with closing(Journal(tmp_path / "run")) as store:
        assert not store.begun
