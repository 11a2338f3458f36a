"""A search that asks the next candidate when one is answered: what it asks follows from the order of arrival alone."""

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from merge3.client import run as client_run
from merge3.engine import LocalEngine
from merge3.errors import ConfigError, RecipeError, ResumeMismatch
from merge3.fitness import Answered, estimates
from merge3.pool import Pool
from merge3.protocol import Evaluation
from merge3.recipe import Recipe
from merge3.search import optimizers, steady
from merge3.search import run as search_run
from merge3.search.config import EvolveConfig
from merge3.search.config_files import load_config
from merge3.search.context import Search
from merge3.search.journal import Journal
from merge3.search.questions import load_questions
from merge3.search.steady import begun_with, in_flight
from merge3.space import Space
from tests.commands import client
from tests.killing import killed
from tests.search.test_path_search import BOTH, written

BUDGET, POPULATION = 23, 5
KINDS = {
    "cma": {"name": "cma", "surrogate": False},
    "assisted": {"name": "cma", "surrogate": True},
    "random": {"name": "random"},
    "catcma": {"name": "catcma"},
}


class Scripted:
    """Answers for LocalEngine, at once. choose: of the genomes under way, the place of the one that is done next.
    fails: which genomes cannot be merged. most: how many were under way at once. asked: (items, genome) as taken."""

    def __init__(self, local, choose, fails=lambda genome: False, workers=3):
        self._info, self._local = replace(local.info(), workers=workers), local
        self.choose, self.fails, self.most, self.asked = choose, fails, 0, []

    def info(self):
        return self._info

    def prepare(self, registration, recipe=None):
        pass

    def check(self, recipe):
        self._local.check(recipe)

    def evaluate(self, registration, subjects):
        for index, subject in enumerate(subjects):
            yield self._evaluation(index, registration, subject)

    def evaluate_each(self, questions, in_flight):
        pulled = enumerate(questions)
        flying = list(islice(pulled, in_flight))
        calibrating = any(isinstance(subject, str) for _, (_, subject) in flying)  # which begins with the endpoints
        while flying:
            subjects = [subject for _, (_, subject) in flying]
            index, question = flying.pop(0 if calibrating else self.choose(subjects))
            if not calibrating:
                self.most = max(self.most, len(subjects))
                self.asked.append((tuple(item.id for item in question[0].items), question[1]))
            yield self._evaluation(index, *question)
            flying.extend(islice(pulled, 1))

    def _evaluation(self, index, asked, subject):
        none = np.full(len(asked.objectives), np.nan)
        if isinstance(subject, np.ndarray) and self.fails(subject):
            error = RecipeError("weight", "no such thing")
            return Evaluation(index, "", None, asked.objectives, none, none, 0.01, error=error)
        recipe = Space(asked.space, self._info.layout).recipe(subject) if isinstance(subject, np.ndarray) else subject
        name = recipe.hash() if isinstance(recipe, Recipe) else ""
        able = -float(np.sum((subject - 0.3) ** 2)) if isinstance(subject, np.ndarray) else len(str(subject)) % 3 - 1.0
        luck = [np.random.default_rng([len(item.prompt), *item.id.encode()]).normal() for item in asked.items]
        responses = (np.array(luck) < able).astype(float)
        found = estimates(asked, Answered(responses))
        return Evaluation(index, name, responses, asked.objectives, *found, 0.01)


def anyhow(seed):
    """Whichever, at random."""
    rng = np.random.default_rng(seed)
    return lambda genomes: int(rng.integers(len(genomes)))


def as_recorded(rows):
    """In the order of a journal's rows."""
    order = iter([row[3] for row in rows])

    def choose(genomes):
        wanted = next(order)
        return next(i for i, genome in enumerate(genomes) if genome.tobytes() == wanted)

    return choose


def nobody(genomes):
    raise AssertionError("what is in the journal was asked again")


def rows_of(directory):
    """All that a run is, in the order in which it came."""
    with closing(sqlite3.connect(directory / "run.db")) as db:
        return db.execute(
            "SELECT arrived, generation, position, genome, recipe_hash, responses, value, stderr, error "
            "FROM candidates JOIN estimates USING (generation, position) ORDER BY arrived"
        ).fetchall()


def asked_at(rows):
    """(generation, position) in order of arrival."""
    return [row[1:3] for row in rows]


def configured(world, **changes):
    data = yaml.safe_load((world / "evolve.yaml").read_text())
    genome = data["genome"]
    genome |= {"base_model": str(world / "base"), "models": [str(world / model) for model in genome["models"]]}
    data["tasks"] = [{"items": str(world / task["items"])} for task in data["tasks"]]
    data["optimizer"] = {"budget": BUDGET, "population": POPULATION, "seed": 3, "asking": "steady"}
    for key, value in changes.items():
        data[key] = data.get(key, {}) | value if isinstance(value, dict) else value
    return EvolveConfig.model_validate(data)


@pytest.fixture(scope="module")
def local(tiny_world):
    base, *experts = configured(tiny_world).models
    return LocalEngine(Pool.open(base, experts))


@pytest.fixture(scope="module")
def search(tiny_world, local, tmp_path_factory):
    """(optimizer's settings, choose, ...) -> (directory, outcome, engine); stop_after: candidates, then it is left."""

    def go(choose, directory=None, stop_after=None, engine=None, changes=None, **optimizer):
        config = configured(tiny_world, optimizer=optimizer, **(changes or {}))
        directory = directory or tmp_path_factory.mktemp("run")
        engine = engine or Scripted(local, choose)
        with closing(Journal(directory)) as journal:
            left = lambda: stop_after is not None and journal.count() >= stop_after
            resume = journal.begun
            outcome = search_run.run(config, load_questions(config), engine, journal, resume, stop=left)
        return directory, outcome, engine

    return go


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(sorted(KINDS)), st.integers(0, 1000), st.integers(1, 9), st.lists(st.integers(1, 22), max_size=2)
)
def test_a_run_that_was_left_goes_on_to_the_bits_of_the_one_that_was_not(search, local, kind, seed, workers, stops):
    """Whatever the order of arrival, wherever it is left, for fewer and more under way than a generation has."""
    extract = {"extract": {"method": "random", "size": 4, "renew": 2}}
    how = dict(changes=extract, **KINDS[kind])
    whole, first, engine = search(None, engine=Scripted(local, anyhow(seed), workers=workers), **how)
    rows = rows_of(whole)
    assert len(rows) == BUDGET and engine.most == min(BUDGET, workers + max(1, workers // 4))
    directory = None
    for stop in sorted(stops):
        done = len(rows_of(directory)) if directory else 0
        if stop > done:
            again = Scripted(local, as_recorded(rows[done:]), workers=workers)
            directory, outcome, _ = search(None, directory, stop, engine=again, **how)
            assert outcome is None and len(rows_of(directory)) == stop
    done = len(rows_of(directory)) if directory else 0
    rest = Scripted(local, as_recorded(rows[done:]), workers=workers + 5)  # the run counts on those it began with
    rest = rest if done else Scripted(local, as_recorded(rows), workers=workers)
    directory, second, _ = search(None, directory, engine=rest, **how)
    assert rows_of(directory) == rows
    assert second.best.genome.tobytes() == first.best.genome.tobytes() and second.heldout == first.heldout
    over, third, _ = search(None, directory, engine=Scripted(local, nobody, workers=workers), **how)
    assert third.recipe.hash() == first.recipe.hash() and rows_of(over) == rows


@pytest.mark.parametrize("kind", KINDS)
def test_one_at_a_time_it_is_the_search_by_generations(search, local, kind, monkeypatch):
    calibrated = kind == "assisted"
    changes = {"extract": {"method": "irt" if calibrated else "random", "size": 8}}
    changes["estimate"] = {"models": 6, "check_every": 1}
    in_order = lambda genomes: 0
    monkeypatch.setattr(Scripted, "evaluate_each", LocalEngine.evaluate_each)
    by_generations, _, _ = search(in_order, asking="generations", changes=changes, **KINDS[kind])
    for module in (steady, search_run):
        monkeypatch.setattr(module, "in_flight", lambda search: 1)
    one_by_one, outcome, _ = search(in_order, changes=changes, **KINDS[kind])
    assert rows_of(one_by_one) == rows_of(by_generations)
    assert len(outcome.checks) == calibrated * (BUDGET - 1) // POPULATION


@settings(max_examples=6, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(0, 999), st.integers(1, 8))
def test_numbers_say_what_was_known_when_a_candidate_was_asked(search, local, kind, seed, workers):
    directory, _, _ = search(None, engine=Scripted(local, anyhow(seed), workers=workers), **KINDS[kind])
    rows, many = rows_of(directory), workers + max(1, workers // 4)
    for number, at in enumerate(sorted(asked_at(rows))):
        # the first ones are asked at once, each other one when another has come: so much was told
        came = max(0, number - many + 1)
        assert at[0] == came // POPULATION, (number, at)
    for generation in {at[0] for at in asked_at(rows)}:
        own = sorted(position for g, position in asked_at(rows) if g == generation)
        assert own == list(range(len(own)))


def test_another_order_is_another_run_and_a_journal_in_another_order_is_refused(search):
    kind = KINDS["cma"]
    one, _, _ = search(anyhow(1), **kind)
    other, _, _ = search(anyhow(2), **kind)
    assert {row[3] for row in rows_of(one)} != {row[3] for row in rows_of(other)}
    with closing(sqlite3.connect(one / "run.db")) as db, db:
        db.execute("UPDATE candidates SET arrived = 100 - arrived")
    with pytest.raises(ResumeMismatch, match="candidate .* is not what the optimizer asks now"):
        search(nobody, one, **kind)


def test_those_under_way_keep_their_items_and_the_others_get_new_ones(search, local):
    changes = {"extract": {"method": "irt", "size": 8}, "estimate": {"models": 8, "check_every": 1}}
    engine = Scripted(local, anyhow(5))
    directory, outcome, _ = search(None, engine=engine, changes=changes, surrogate=True)
    rows = rows_of(directory)
    items = {}
    for (asked, genome), row in zip(engine.asked, rows):
        assert genome.tobytes() == row[3]
        items.setdefault(row[1], set()).add(asked)
    assert all(len(subsets) == 1 for subsets in items.values())  # one for each generation, also for those who come late
    assert len({subset for (subset,) in items.values()}) == len(items) > 2
    late = [row for before, row in pairwise(rows) if row[1] < before[1]]
    assert late and [check.generation for check in outcome.checks] == list(range(len(items) - 1))
    # left while some have the items of before, and taken up
    left = next(number for number, row in enumerate(rows) if row in late)
    again, _, _ = search(as_recorded(rows), stop_after=left, changes=changes, surrogate=True)
    _, second, _ = search(as_recorded(rows[left:]), again, changes=changes, surrogate=True)
    assert rows_of(again) == rows and second.checks == outcome.checks


def test_the_start_comes_first_and_the_favourite_last(search, local, tiny_world, tmp_path):
    values = {"english": 0.4, "italian": 0.1, "translation": 0.1}
    weights = [
        {"model": str(tiny_world / name), "parameters": {"weight": weight, "density": 0.5}}
        for name, weight in values.items()
    ]
    start = {"merge_method": "ties", "base_model": str(tiny_world / "base"), "models": weights}
    (tmp_path / "start.yaml").write_text(yaml.safe_dump(start))
    genome = configured(tiny_world).genome.model_dump() | {"start": str(tmp_path / "start.yaml")}
    told = []

    def favourite(genomes):
        told.append(len(genomes))
        return 0

    directory, _, _ = search(favourite, changes={"genome": genome}, **KINDS["cma"])
    rows = sorted(rows_of(directory), key=lambda row: row[1:3])
    first, last = (np.frombuffer(row[3]) for row in (rows[0], rows[-1]))
    assert told[:2] == [4, 4] and first.mean() != last.mean()
    config = configured(tiny_world, genome=genome, optimizer=KINDS["cma"])
    with closing(Journal(directory)) as journal:
        space = Space(config.genome.definition(), local.info().layout)
        given_one = search_run.near_start(Search(config, load_questions(config), local, space, journal))[0].start
    assert np.array_equal(first, given_one)


def test_candidates_that_fail_are_told_and_a_generation_of_them_ends_the_run(search, local):
    some = Scripted(local, anyhow(3), fails=lambda genome: genome[0] > np.median(genome))
    for kind in KINDS.values():
        some.choose = anyhow(3)
        directory, outcome, _ = search(None, engine=some, **kind)
        assert 0 < outcome.failed < BUDGET and len(rows_of(directory)) == BUDGET
    for budget in (BUDGET, POPULATION - 2):  # told when a generation has come, and at the end
        every = Scripted(local, anyhow(3), fails=lambda genome: True)
        with pytest.raises(ConfigError, match=r"generation 0: every candidate failed \(weight: no such thing\)"):
            search(None, engine=every, budget=budget)


def test_the_last_few_may_all_fail(search, local):
    """They are no generation: what is known by then stands."""
    fails = Scripted(local, lambda genomes: 0, fails=lambda genome: len(fails.asked) > 20)
    _, outcome, _ = search(None, engine=fails, **KINDS["assisted"])
    assert outcome.failed == BUDGET - 20


@pytest.mark.parametrize("name", ["cma", "catcma"])
def test_one_from_long_ago_draws_the_search_no_further_than_samples_do(name):
    """It was best, and lies many times as far away as the samples of now."""
    low, high = -np.full(6, 9.0), np.full(6, 9.0)
    climbing = optimizers.make(name, np.full(6, 2.0), low, high, 1 / 6, 6, seed=0)
    long_ago = climbing.ask()
    for _ in range(25):
        genomes = climbing.ask()
        climbing.tell_arrived(genomes, [-float((g**2).sum()) for g in genomes], [0.0] * 6, [0] * 6)
    now = climbing.ask()
    spread = np.mean([np.linalg.norm(genome - climbing.favorite()) for genome in now])
    before, late = climbing.favorite(), max(long_ago, key=lambda genome: np.linalg.norm(genome - climbing.favorite()))
    assert np.linalg.norm(late - before) > 5 * spread
    climbing.tell_arrived([late, *now[:5]], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 6, [25] + [0] * 5)
    assert 0 < np.linalg.norm(climbing.favorite() - before) < 2 * spread


# -- when


def test_auto_is_steady_where_there_are_workers_and_an_optimizer_that_can(tiny_world, local, tmp_path):
    def many(workers, **optimizer):
        config = configured(tiny_world, optimizer={"asking": "auto"} | optimizer)
        with closing(Journal(tmp_path / "run")) as journal:
            engine = Scripted(local, nobody, workers=workers)
            space = Space(config.genome.definition(), local.info().layout)
            return in_flight(begun_with(Search(config, load_questions(config), engine, space, journal)))

    assert many(1) is None and many(2) == 3 and many(8) == 10
    assert many(1, asking="steady") == 2 and many(8, asking="generations") is None


def test_several_objectives_are_searched_steadily_at_random_and_else_by_generations(search, local):
    pytest.importorskip("pymoo")
    changes = {"objectives": ["english", "translation"]}
    directory, outcome, engine = search(anyhow(2), name="random", asking="auto", changes=changes)
    assert outcome.front is not None and engine.most == 4 and len(rows_of(directory)) == 2 * BUDGET
    engine = Scripted(local, nobody, workers=4)
    directory, outcome, _ = search(None, engine=engine, name="nsga2", asking="auto", changes=changes)
    assert outcome.front is not None and asked_at(rows_of(directory)[::2]) == sorted(asked_at(rows_of(directory)[::2]))


def test_a_run_of_one_worker_goes_on_by_generations_and_names_nothing_new(search, local):
    """Its journal is one that an older version could have written, and stays so beside more workers."""
    one = Scripted(local, nobody, workers=1)
    directory, outcome, _ = search(None, stop_after=7, engine=one, asking="auto")
    assert outcome is None
    with closing(Journal(directory)) as journal:
        known = journal.identity()
        assert "workers" not in known and "in flight" not in known and "asking" not in known["optimizer"]
    search(None, directory, engine=Scripted(local, nobody, workers=4), asking="auto")
    whole, _, _ = search(None, engine=Scripted(local, nobody, workers=1), asking="generations")
    assert [row[1:] for row in rows_of(directory)] == [row[1:] for row in rows_of(whole)]


def test_a_journal_says_how_many_were_under_way(search, local):
    directory, _, _ = search(anyhow(1), stop_after=9)
    with closing(sqlite3.connect(directory / "run.db")) as db, db:
        known = dict(db.execute("SELECT key, value FROM run"))
        assert (known["workers"], known["in flight"]) == ("3", "4")
        db.execute("UPDATE run SET value = '7' WHERE key = 'in flight'")
    with pytest.raises(ResumeMismatch, match="in flight is 4, was 7 when the run began"):
        search(nobody, directory)
    with closing(sqlite3.connect(directory / "run.db")) as db, db:
        db.execute("UPDATE run SET value = 'many' WHERE key = 'workers'")
    with pytest.raises(ResumeMismatch, match="workers is 'many' in its journal; expected a number"):
        search(nobody, directory)


@pytest.mark.parametrize(
    "optimizer, more, said",
    [
        ({"asking": "sometimes"}, {}, "asking"),
        (
            {"asking": "steady", "name": "nsga2"},
            {"objectives": ["english", "translation"]},
            "asking: steady with nsga2; expected generations, or another optimizer: cma, random, catcma",
        ),
        (
            {"asking": "steady", "name": "como"},
            {"objectives": ["english", "translation"]},
            "asking: steady with como; expected generations",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(own_world, tmp_path, optimizer, more, said):
    data = yaml.safe_load((own_world / "evolve.yaml").read_text()) | more
    data["optimizer"] |= optimizer
    (own_world / "bad.yaml").write_text(yaml.safe_dump(data))
    done = client("evolve", str(own_world / "bad.yaml"), "--run-dir", str(tmp_path / "run"))
    line = done.stderr.strip()
    assert done.returncode == 2 and said in line and "bad.yaml" in line and len(line.splitlines()) == 1
    assert not (tmp_path / "run").exists()


# -- the real thing


@pytest.fixture(scope="module")
def real(tiny_world, tmp_path_factory):
    """(configuration file, the finished run of it)"""
    folder = tmp_path_factory.mktemp("real")
    config = configured(tiny_world, optimizer=KINDS["assisted"], extract={"method": "random", "size": 8})
    (folder / "steady.yaml").write_text(config.to_yaml())
    client_run.evolve(load_config(folder / "steady.yaml"), folder / "whole", quiet=True, export=False)
    return folder / "steady.yaml", folder / "whole"


def test_a_run_that_is_killed_goes_on_to_the_same_bits(real, tmp_path):
    (config, whole), cut = real, tmp_path / "run"
    killed(config, cut, (7,), BUDGET)
    client_run.evolve(load_config(config), cut, resume=True, quiet=True, export=False)
    assert rows_of(cut) == rows_of(whole)
    assert (cut / "best.yaml").read_bytes() == (whole / "best.yaml").read_bytes()
    first, second = (json.loads((d / "result.json").read_text()) for d in (whole, cut))
    assert first["heldout"] == second["heldout"] and first["ledger"] == second["ledger"]
    assert (cut / "report.html").exists()


@pytest.mark.parametrize("second", ["steady", "generations"])
def test_stages_that_are_left_in_either_go_on(own_world, tmp_path, second):
    optimizer = {"budget": 12, "population": 5, "seed": 3, "asking": "steady"}
    stages = ["parameters", {"space": "path", "optimizer": {"name": "catcma", "asking": second}}]
    config = load_config(written(own_world, "stages", BOTH, stages=stages, optimizer=optimizer))

    def go(directory, stop_after=None):
        engine = LocalEngine(Pool.open(config.models[0], config.models[1:]))
        with closing(Journal(directory)) as journal:
            left = lambda: stop_after is not None and journal.count() >= stop_after
            outcome = search_run.run(config, load_questions(config), engine, journal, journal.begun, stop=left)
            known = journal.identity()
        assert known["in flight"] == ("2, 2" if second == "steady" else "2, a generation")
        return outcome

    whole = go(tmp_path / "whole")
    assert go(tmp_path / "left", 7) is None and go(tmp_path / "left", 18) is None
    again = go(tmp_path / "left")
    unnamed = lambda rows: [row[:4] + row[5:] for row in rows]  # recipes name the run's folder
    rows = rows_of(tmp_path / "whole")
    assert unnamed(rows_of(tmp_path / "left")) == unnamed(rows) and len(rows) == 24
    assert again.heldout == whole.heldout and again.ledger == whole.ledger
    first, rest = rows[:12], rows[12:]
    assert max(row[1] for row in first) < min(row[1] for row in rest) and len(first[0][3]) != len(rest[0][3])
