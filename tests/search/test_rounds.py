"""Searches in rounds: elites join the models, in memory and within its budget; killed and resumed; told; refused."""

import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from merge3.client import run
from merge3.client.progress import Lines
from merge3.engine import LocalEngine
from merge3.errors import BadInput, ConfigError
from merge3.export import merge_to_disk
from merge3.joined import joined, rehearsed
from merge3.memory import shown_size
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.search.config import EvolveConfig
from merge3.search.config_files import load_config
from merge3.search.context import Progress
from merge3.search.journal import Journal
from merge3.search.questions import load_questions
from merge3.search.run import run as search_run
from merge3.search.succession import budget_of, next_models
from merge3.space import Space, SpaceDefinition
from tests.killing import killed

SUBSETS = {"extract": {"method": "random", "size": 8}, "race": {"share": 0.5}}
HASH = "83ff9120a6a408c1"  # of test_a_run_without_rounds, before there were any
IDENTITY = '{"name":"cma","budget":300,"population":null,"sigma":0.16666666666666666,"seed":0,"surrogate":"auto"}'
OPTIMIZER = {"budget": 25, "population": 4, "seed": 3, "rounds": 3, "elites": 2}


def written(folder, world, name="rounds", genome=(), optimizer=(), **changes):
    """A configuration over the tiny world, which stays where it is."""
    models = {
        "base_model": str(world / "base"),
        "models": [str(world / m) for m in ("english", "italian", "translation")],
    }
    tasks = [{"items": str(world / f"{task}.jsonl")} for task in ("english", "translation")]
    data = {"genome": models | {"merge_method": "task_arithmetic"} | dict(genome), "tasks": tasks}
    data |= {"optimizer": OPTIMIZER | dict(optimizer)} | SUBSETS | changes
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    return folder / f"{name}.yaml"


def journal(directory):
    """Everything a resumed run must repeat to the last bit."""
    with sqlite3.connect(directory / "run.db") as db:
        candidates = db.execute(
            "SELECT generation, position, genome, recipe_hash, responses, value, stderr "
            "FROM candidates JOIN estimates USING (generation, position) ORDER BY 1, 2"
        ).fetchall()
        return candidates, db.execute("SELECT * FROM answers ORDER BY 1, 2").fetchall()


def same_weights(one, other):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def undisturbed(solving_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    file = written(folder, solving_world)
    result = run.evolve(load_config(file), folder / "run", quiet=True)
    return folder / "run", file, result


def test_a_run_in_rounds_has_one_journal_one_ledger_one_report_and_one_winner(undisturbed):
    directory, _, result = undisturbed
    assert json.loads((directory / "result.json").read_text()) == json.loads(json.dumps(result))
    assert [one["candidates"] for one in result["rounds"]] == [9, 8, 8] and result["candidates"] == 25
    ledger = result["ledger"]
    assert ledger["elites"] == sum(one["contenders"] * one["items"] for one in result["rounds"][:2]) > 0
    assert ledger["total"] == sum(ledger[k] for k in ("calibration", "search", "checks", "elites", "race"))
    assert ledger["search"] == 25 * 16 and ledger["full"] == 25 * 56
    assert ledger["race"] <= 0.5 * ledger["search"]
    assert [one["won"] for one in result["rounds"]].count(True) == 1
    for one in result["rounds"][:2]:
        assert [elite["name"] for elite in one["elites"]] == [f"{one['round']}-1", f"{one['round']}-2"]
        first, second = one["elites"]
        assert first["recipe_hash"] != second["recipe_hash"] and first["together"] <= second["together"]
        assert set(first["tasks"]) == {"english", "translation"}
    page = (directory / "report.html").read_text()
    assert "The rounds" in page and page.count('class="round"') == 2 and ">round 3<" in page and ">2-2<" in page
    assert '"marks":[9,17]' in page
    with closing(Journal(directory)) as store:
        generations = [c.generation for c in store.candidates()]
    assert generations == sorted(generations) and len(set(generations)) == 3 + 2 + 2


def test_the_winner_is_a_recipe_that_merges_to_the_model(undisturbed, tmp_path):
    """And so are the elites, from the first on, in place of those that the run exported."""
    directory, _, result = undisturbed
    best = Recipe.from_yaml(directory / "best.yaml")
    named = {str(m).rpartition("/")[2] for m in best.models() if "/elites/" in str(m)}
    there = {p.name for p in (directory / "elites").iterdir() if p.is_dir()}
    won = next(one["round"] for one in result["rounds"] if one["won"])
    assert named == there == (set() if won == 1 else {f"{won - 1}-1", f"{won - 1}-2"})
    merge_to_disk(best, tmp_path / "again")
    assert same_weights(directory / "model", tmp_path / "again")
    copy = tmp_path / "run"
    shutil.copytree(directory / "elites", copy / "elites", ignore=lambda _, names: set(names) & there)
    for name in ("1-1", "1-2", "2-1", "2-2"):
        text = (copy / "elites" / f"{name}.yaml").read_text().replace(str(directory), str(copy))
        (copy / "elites" / f"{name}.yaml").write_text(text)
        merge_to_disk(Recipe.from_yaml(copy / "elites" / f"{name}.yaml"), copy / "elites" / name)
        assert name not in there or same_weights(copy / "elites" / name, directory / "elites" / name)


@pytest.mark.heavy
@pytest.mark.parametrize("counts", [(12,), (4, 9, 12, 17, 20)])
def test_a_run_that_is_killed_in_any_round_goes_on_to_the_same_bits(undisturbed, tmp_path, counts):
    directory, file, result = undisturbed
    aside = tmp_path / "aside"
    shutil.move(directory, aside)  # the same name, which elites' are made of
    try:
        killed(file, directory, counts, 25)
        again = run.evolve(load_config(file), directory, resume=True, quiet=True)
        shutil.move(directory, tmp_path / "killed")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.move(aside, directory)
    assert journal(tmp_path / "killed") == journal(directory)
    for name in ("best.yaml", *(f"elites/{at}.yaml" for at in ("1-1", "1-2", "2-1", "2-2"))):
        assert (tmp_path / "killed" / name).read_bytes() == (directory / name).read_bytes()
    for key in ("heldout", "baselines", "ledger", "rounds", "race", "race_of_rounds"):
        assert again[key] == result[key]
    assert same_weights(tmp_path / "killed" / "model", directory / "model")


def searched(file, directory, resume=False, stop=lambda: False, told=lambda p: None, **how):
    config = load_config(file)
    with closing(Journal(directory)) as store, closing(run.open_engine(config, quiet=True, **how)) as engine:
        return search_run(config, load_questions(config), engine, store, resume, told, stop)


def test_stopped_among_contenders_and_told_of_rounds(undisturbed, tmp_path):
    directory, file, _ = undisturbed
    told = []

    def seen(progress):
        told.append(Progress(**vars(progress)))

    halted = lambda: bool(told) and told[-1].stage == "elites" and told[-1].round == 2 and told[-1].done == 1
    aside = tmp_path / "aside"
    shutil.move(directory, aside)
    try:
        assert searched(file, directory, stop=halted, told=seen) is None
        assert [(p.round, p.rounds, p.later) for p in told if p.stage == "search" and p.done == 1] == [
            (1, 3, 16),
            (2, 3, 8),
        ]
        assert len(journal(directory)[0]) == 17
        told.clear()
        outcome = searched(file, directory, resume=True, told=seen)
        assert {p.round for p in told if p.stage == "search"} == {3} and outcome.candidates == 25
        found = journal(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.move(aside, directory)
    assert found == journal(directory)


def test_where_all_items_are_answered_nothing_more_is_asked_and_the_highest_value_wins(solving_world, tmp_path):
    file = written(
        tmp_path, solving_world, extract={"method": "all"}, optimizer={"rounds": 2, "budget": 12, "originals": True}
    )
    result = run.evolve(load_config(file), tmp_path / "run", quiet=True, export=False)
    assert result["ledger"]["elites"] == result["ledger"]["race"] == 0 and result["race_of_rounds"] is None
    with closing(Journal(tmp_path / "run")) as store:
        candidates = store.candidates()
    assert result["search_value"] == max(c.value for c in candidates)
    (first, *_), second = result["rounds"][0]["elites"], candidates[6]
    assert first["value"] == max(c.value for c in candidates[:6])
    # five models: two elites and the three that there were; the first elite comes first
    assert len(second.genome) == len(candidates[0].genome) + 2 and second.genome[:5].tolist() == [1, 0, 0, 0, 0]
    assert second.value == pytest.approx(first["value"], abs=0.05)
    assert not (tmp_path / "run" / "elites" / "1-1").exists()


def test_random_keeps_are_the_same_in_an_elite_in_memory_and_on_disk(solving_world, tmp_path):
    file = written(
        tmp_path,
        solving_world,
        genome={"merge_method": "dare_ties", "dtype": "bfloat16"},
        optimizer={"rounds": 2, "budget": 8},
    )
    run.evolve(load_config(file), tmp_path / "run", quiet=True)
    merge_to_disk(Recipe.from_yaml(tmp_path / "run" / "elites" / "1-2.yaml"), tmp_path / "elite", seed=3)
    if (tmp_path / "run" / "elites" / "1-2").exists():
        assert same_weights(tmp_path / "elite", tmp_path / "run" / "elites" / "1-2")
    merge_to_disk(Recipe.from_yaml(tmp_path / "run" / "best.yaml"), tmp_path / "again", seed=3)
    assert same_weights(tmp_path / "run" / "model", tmp_path / "again")


def test_progress_says_the_round_and_the_time_left_for_all(capsys):
    lines = Lines()
    of = {"budget": 8, "done": 4, "seconds": 2.0, "round": 2, "rounds": 3, "later": 8}
    for progress in (Progress(**of), Progress(stage="elites", done=1), Progress(stage="elites", done=2), Progress()):
        lines(progress)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("round 2/3  generation 0  4/8") and "0:06 left" in first
    assert second.startswith("choosing elites") and third.startswith("generation 0")


# -- what is refused


PATHS = {"space": "path", "base_model": None, "merge_method": None}
REFUSED = {
    "no round": ({"rounds": 0}, {}, "optimizer.rounds: found 0: Input should be greater than or equal to 1"),
    "no elite": ({"elites": 0}, {}, "optimizer.elites: found 0"),
    "elites of no rounds": (
        {"rounds": 1},
        {},
        "optimizer.elites: of a search in rounds: expected `rounds: 2`, or more",
    ),
    "models of no rounds": (
        {"rounds": 1, "elites": 3, "originals": True},
        {},
        "optimizer.originals: of a search in rounds",
    ),
    "more elites than candidates": (
        {"elites": 9},
        {},
        "optimizer.elites: 9 of 8 candidates a round: expected at most 8",
    ),
    "more elites than a method merges": (
        {"elites": 3},
        {"genome": {"merge_method": "slerp", "models": ["english"]}},
        "optimizer.elites: 3 elites with slerp, which takes 1 model: expected 1$",
    ),
    "more models than a method merges": (
        {"elites": 6, "originals": True},
        {},
        "optimizer.elites: 6 elites and 3 of the models with task_arithmetic, which takes 1 to 8 models: expected 1 to",
    ),
    "an expert that is derived once": (
        {},
        {"genome": {"merge_method": "iso_c"}},
        "optimizer.rounds: 3 with iso_c, which derives an expert of all models once",
    ),
    "a path": ({}, {"genome": PATHS}, "optimizer.rounds: 3 in a search of space path: expected parameters"),
    "stages": ({}, {"stages": ["parameters", "path"]}, "optimizer.rounds: 3 beside stages: expected one of them"),
    "rounds of a stage": (
        {"rounds": 1, "elites": 3},
        {"stages": ["parameters", {"space": "path", "optimizer": {"rounds": 2}}]},
        "stages: optimizer.rounds in a stage",
    ),
    "several objectives": (
        {"name": "nsga2"},
        {"objectives": ["english", "translation"]},
        r"optimizer.rounds: 3 beside objectives \(english, translation\): expected accuracy alone",
    ),
    "a vocabulary": (
        {},
        {"genome": {"tokenizer_source": "union"}},
        "optimizer.rounds: 3 beside a tokenizer or tower of the genome's",
    ),
    "rounds without a generation each": (
        {"budget": 10},
        {},
        "optimizer.budget: 10 candidates for 3 rounds; expected 12 or more: a generation of round 1 has 4",
    ),
    "a later round without one": (
        {"population": None, "budget": 26, "elites": 7},
        {},
        "optimizer.budget: 26 candidates for 3 rounds; expected 27 or more: a generation of round 2 has 9",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_in_one_line_before_the_search(solving_world, tmp_path, name):
    optimizer, changes, message = REFUSED[name]
    genome = dict(changes.get("genome", {}))
    for key in ("models", "base_model"):
        place = lambda model: str(solving_world / model)
        if genome.get(key):
            genome[key] = place(genome[key]) if isinstance(genome[key], str) else [place(m) for m in genome[key]]
    others = {key: value for key, value in changes.items() if key != "genome"}
    with pytest.raises(ConfigError, match=message) as error:
        file = written(tmp_path, solving_world, genome=genome, optimizer=optimizer, **others)
        run.evolve(load_config(file), tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    if (tmp_path / "run" / "run.db").exists():
        with closing(Journal(tmp_path / "run")) as store:
            assert not store.begun


def test_a_run_without_rounds_is_known_by_what_it_was_before_there_were_any():
    data = {"genome": {"models": ["a", "b"], "merge_method": "linear"}, "tasks": [{"items": "c.jsonl"}]}
    config = EvolveConfig.model_validate(data)
    assert config.hash() == HASH and config.optimizer.identity() == IDENTITY
    in_rounds = EvolveConfig.model_validate(data | {"optimizer": {"rounds": 2}})
    assert in_rounds.hash() != HASH and '"rounds":2' in in_rounds.optimizer.identity()


def test_budgets_are_split_evenly_and_the_first_rounds_have_what_is_left_over():
    data = {"genome": {"models": ["a", "b"], "merge_method": "linear"}, "tasks": [{"items": "c.jsonl"}]}
    for budget, rounds in ((25, 3), (24, 3), (7, 2)):
        config = EvolveConfig.model_validate(data | {"optimizer": {"budget": budget, "rounds": rounds, "elites": 2}})
        split = [budget_of(config, number) for number in range(rounds)]
        assert sum(split) == budget and split == sorted(split, reverse=True) and split[0] - split[-1] <= 1
    genome = {"models": ["b", "x", "y"], "base_model": "b", "merge_method": "linear"}
    for originals, expected in ((False, ["b", "1", "2"]), (True, ["b", "1", "2", "x", "y"])):
        config = {"optimizer": {"rounds": 2, "elites": 2, "originals": originals}, "genome": genome}
        assert next_models(EvolveConfig.model_validate(data | config), ["1", "2"]) == expected


# -- merges of merges, in memory


def chain(world):
    """(models, recipes: an elite's of the second round, and one of the third, whose models lie nowhere)"""
    models = [str(world / name) for name in ("base", "english", "italian")]
    rng, merged = np.random.default_rng(1), {}
    parts, recipes = models[1:], []
    for number in (1, 2, 3):
        space = SpaceDefinition(tuple(parts), "ties", models[0], merged=json.dumps(merged))
        with closing(LocalEngine(Pool.open(models[0], models[1:]))) as engine:
            own = Space(space, engine.info().layout)
        low, high = own.bounds()
        recipes.append(own.recipe(rng.uniform(low, high)))
        parts = [f"it/{number}-1", f"it/{number}-2"]
        for name in parts:
            recipe = own.recipe(rng.uniform(low, high))
            merged[name] = replace(recipe, merged={}).to_dict()
    return models, recipes


def test_merges_of_merges_are_what_a_chain_of_files_is(solving_world, tmp_path):
    models, (_, second, third) = chain(solving_world)
    places = lambda ref: type(ref).parse(str(ref).replace("it/", f"{tmp_path}/"))
    for name, content in third.merged.items():
        merge_to_disk(Recipe.parse(dict(content)).renamed(places), tmp_path / name.removeprefix("it/"))
    merge_to_disk(
        Recipe.parse({k: v for k, v in third.to_dict().items() if k != "merged"}).renamed(places), tmp_path / "end"
    )
    engine = LocalEngine(Pool.open(models[0], models[1:]))
    expected = load_file(tmp_path / "end" / "model.safetensors")

    def live():
        engine.slot.swap(joined(engine.pool, third))
        weights = engine.slot.written()
        return all(torch.equal(weights[name], tensor) for name, tensor in expected.items() if name in weights)

    assert live()
    assert list(engine.pool.joined) == ["it/2-1", "it/2-2"]  # those that they are made of are gone
    joined(engine.pool, second)
    assert set(engine.pool.joined) == {"it/1-1", "it/1-2"}
    assert live()  # made again, where others lay
    engine.export(third, tmp_path / "exported")
    assert same_weights(tmp_path / "exported", tmp_path / "end")
    other = dict(third.merged)
    first = dict(other["it/1-1"]) | {"parameters": {"lambda": 0.5}}
    changed = Recipe.parse(third.to_dict() | {"merged": other | {"it/1-1": first}})
    engine.slot.swap(joined(engine.pool, changed))  # of the same names, and another at their root
    weights = engine.slot.written()
    assert not all(torch.equal(weights[name], tensor) for name, tensor in expected.items() if name in weights)


def test_a_rehearsal_computes_nothing_and_leaves_nothing(solving_world, monkeypatch):
    models, (_, _, third) = chain(solving_world)
    engine = LocalEngine(Pool.open(models[0], models[1:]))
    monkeypatch.setattr("merge3.joined.merged_tensors", None)  # would be called to compute
    with rehearsed(engine.pool, third) as recipe:
        assert not recipe.merged and set(engine.pool.joined) == {"it/2-1", "it/2-2"}
    assert not engine.pool.joined and list(engine.pool.endpoints) == models
    engine.check(third)
    assert list(engine.pool.endpoints) == models
    loop = dict(third.merged) | {"it/1-1": dict(third.merged["it/2-1"])}  # made of itself
    with pytest.raises(BadInput, match=r"it/\d-\d' is not in the pool|it/\d-\d: not in the pool|it/"):
        engine.check(Recipe.parse(third.to_dict() | {"merged": loop}))
    assert list(engine.pool.endpoints) == models


def test_a_budget_pays_for_elites_first_or_says_before_the_search_that_it_cannot(undisturbed, solving_world, tmp_path):
    directory, file, _ = undisturbed
    pool = Pool.open(*((models := load_config(file).models)[0], models[1:]))
    model, whole = pool.memory.slot, pool.memory.total
    budget = whole + 2 * model  # of four elites at once, all that there are in the third round's beginning
    with pytest.raises(BadInput, match=r"memory_budget: found .*merges that join the models") as error:
        searched(file, tmp_path / "no", memory_budget=f"{model + 3 * model}")
    assert "\n" not in str(error.value)
    with closing(Journal(tmp_path / "no")) as store:
        assert not store.begun
    config = load_config(file)
    with closing(run.open_engine(config, quiet=True, memory_budget=str(budget))) as engine:
        aside = tmp_path / "aside"
        shutil.move(directory, aside)
        try:
            with closing(Journal(directory)) as store:
                search_run(config, load_questions(config), engine, store)
            plan = engine.pool.memory
            found = journal(directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            shutil.move(aside, directory)
    assert found == journal(directory), "what is streamed changes no bit"
    assert plan.total <= budget and plan.resident >= 2 * model, shown_size(plan.resident)
