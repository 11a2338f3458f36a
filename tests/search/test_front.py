"""Searches for several objectives: the race of a front's members, what a run leaves and what is picked, resume."""

import csv
import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from merge3.client import run
from merge3.engine import Evaluation
from merge3.errors import BadInput
from merge3.export import merge_to_disk
from merge3.irt.bank import sigmoid
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.search.asking import Asking
from merge3.search.config_files import load_config
from merge3.search.context import Search
from merge3.search.front import check_pick, measure_front
from merge3.search.front_race import Believed, contenders, dominated, settle_front, settled, together
from merge3.search.journal import Candidate, Journal
from merge3.search.questions import Questions, load_questions
from merge3.tasks import Item
from tests.killing import killed

SEVERAL = {
    "objectives": ["english", "translation", "length"],
    "extract": {"method": "random", "size": 8},
    "estimate": {"method": "mean"},
    "race": {"candidates": 4, "share": 1.0},
    "optimizer": {"name": "nsga2", "budget": 24, "population": 6, "seed": 3},
}


# -- the race, with a scripted engine


class Scripted:
    """Genome [c] answers task `a` with ability abilities[c] and writes lengths[c] tokens, give or take one."""

    def __init__(self, abilities, lengths):
        g = np.random.default_rng(0)
        self.difficulty, self.luck = g.normal(size=400), g.random(400)
        self.abilities, self.lengths, self.asked = abilities, lengths, 0

    def evaluate(self, registration: Registration, subjects):
        for i, genome in enumerate(subjects):
            c, at = int(genome[0]), [int(item.id) for item in registration.items]
            self.asked += len(at)
            responses = (self.luck[at] < sigmoid(self.abilities[c] - self.difficulty[at])).astype(float)
            lengths = self.lengths[c] + np.array(at) % 3 - 1.0
            none = np.zeros(2)
            yield Evaluation(i, "", responses, registration.objectives, none, none, 0.0, lengths=lengths)


@pytest.fixture
def scripted(own_world, tmp_path):
    """(abilities, lengths, what the search believes, the race's settings) -> (Asking, believed, engine)"""
    opened = []

    def build(abilities, lengths, believed, error=0.05, **race):
        data = yaml.safe_load((own_world / "evolve.yaml").read_text()) | SEVERAL | {"objectives": ["a", "length"]}
        data["race"] = {"candidates": 8, "share": 1.0} | race
        (own_world / "front.yaml").write_text(yaml.safe_dump(data))
        config, engine = load_config(own_world / "front.yaml"), Scripted(abilities, lengths)
        items = [Item(str(i), "a", "generate", "p", ("x",)) for i in range(400)]
        questions = Questions(items, items[:10], [], {"a": 1.0}, {}, None)
        space = SimpleNamespace(definition=None, recipe=lambda genome: genome)
        journal = Journal(tmp_path / f"run-{len(opened)}")
        opened.append(journal)
        search = Search(config, questions, engine, space, journal)
        names, known = config.names, []
        for c, values in enumerate(believed):
            pair = np.array(values), np.full(2, error)
            found = Candidate(0, c, np.array([float(c)]), f"{c}", None, names, *pair, 0.0, 0.0, "local")
            known.append(Believed(found, search.signs * pair[0], pair[1]))
        return Asking(search, items[:10]), known, engine

    yield build
    for journal in opened:
        journal.close()


def left(members):
    return sorted(one.candidate.position for one in members)


def test_members_leave_when_their_dominance_is_settled(scripted):
    """0 and 1 are a front. 2 is worse and longer than 0, 3 is as long as 1 and worse: both looked lucky."""
    asking, known, engine = scripted(
        [2.0, 0.0, 0.5, -1.5], [20, 5, 25, 5], [(0.8, 20), (0.5, 6), (0.8, 20), (0.6, 5)], error=0.3
    )
    members, race = settle_front(asking, known, 10**6)
    assert left(members) == [0, 1] and race.rounds[0] == 4 and race.rounds[-1] == 2
    assert race.answers == engine.asked and race.items == 390
    truth = [(engine.luck < sigmoid(a - engine.difficulty)).mean() for a in (2.0, 0.0)]
    for member, accuracy, length in zip(members, truth, (20, 5)):
        assert abs(member.values[0] - accuracy) < 4 * member.stderrs[0] and member.stderrs[0] < 0.05
        assert abs(-member.values[1] - length) < 0.2


def test_members_stay_while_it_is_not_settled(scripted):
    """Twins: neither is settled to be worse, however many items they answer."""
    asking, known, _ = scripted([1.0, 1.02, 1.0], [10, 10, 10], [(0.7, 10), (0.7, 10), (0.7, 10)])
    members, race = settle_front(asking, known, 10**6)
    assert left(members) == [0, 1, 2] and set(race.rounds) == {3}


def test_a_race_keeps_its_budget_and_none_may_be_had(scripted):
    asking, known, engine = scripted([1.0, 0.0], [10, 5], [(0.7, 10), (0.5, 5)], share=0.5)
    members, race = settle_front(asking, known, 60)
    assert race.answers == engine.asked == 30 and left(members) == [0, 1]
    asking, known, engine = scripted([1.0, 0.0], [10, 5], [(0.7, 10), (0.5, 12)], candidates=0)
    members, race = settle_front(asking, known, 60)
    assert race is None and engine.asked == 0 and left(members) == [0]  # believed: 1 is worse and longer


def test_a_race_is_journalled_with_what_was_written(scripted):
    asking, known, engine = scripted([1.0, 0.0], [10, 5], [(0.7, 10), (0.5, 5)])
    first = settle_front(asking, known, 400)
    asked = engine.asked
    second = settle_front(asking, known, 400)
    assert engine.asked == asked == asking.search.journal.answers("race") and first[1] == second[1]
    for one, other in zip(first[0], second[0]):
        assert np.array_equal(one.values, other.values) and np.array_equal(one.stderrs, other.stderrs)


def test_who_may_race():
    front = np.array([[x, 1 - x] for x in np.linspace(0, 1, 20)])
    behind = front - 0.1
    values = np.concatenate([behind, front])
    assert set(contenders(values, 99, only_front=True)) == set(range(20, 40))
    few = contenders(values, 6, only_front=False)
    assert len(few) == 6 and {20, 39} <= set(few) <= set(range(20, 40))
    assert set(range(20, 40)) < set(contenders(values, 25, only_front=False)) and len(values) == 40


def test_settled_says_what_it_says():
    two = lambda *numbers: np.array(numbers, float)
    assert settled(two(0.3, 0.0), two(0.1, 0.0)) and settled(two(0.3, 5.0), two(0.1, 1.0))
    assert not settled(two(0.3, 0.1), two(0.1, 0.1)) and not settled(two(0.1, 5.0), two(0.1, 0.1))
    assert not settled(two(0.0, 0.0), two(0.0, 0.0)) and not settled(two(0.3, -0.1), two(0.1, 0.0))
    value, error = together((two(0.5, 10), two(0.1, 1.0)), (two(0.7, 20), two(0.1, 0.5)))
    assert value == pytest.approx([0.6, 18]) and error == pytest.approx([0.1 / 2**0.5, 0.2**0.5])
    unknown = together((two(np.nan, 1), two(np.nan, 1)), (two(0.7, 3), two(0.1, 1)))
    assert unknown[0] == pytest.approx([0.7, 2])


def test_heldout_answers_say_who_is_dominated(scripted):
    asking, *_ = scripted([0.0], [1], [(0.5, 1)])
    g = np.random.default_rng(1)
    items = asking.search.questions.search[:200]
    good, bad = (g.random(200) < 0.9).astype(float), (g.random(200) < 0.4).astype(float)
    answers = [
        np.stack([good, np.full(200, 5.0)]),
        np.stack([bad, np.full(200, 5.0)]),
        np.stack([bad, np.full(200, 4.0)]),
    ]
    assert dominated(asking.search, [None] * 3, answers, items) == [False, True, False]
    few = items[:8]  # alike in all of them, and one writes more
    alike = [np.stack([np.ones(8), np.full(8, length)]) for length in (5.0, 4.0)]
    assert dominated(asking.search, [None] * 2, alike, few) == [False, False]
    alike = [np.stack([np.ones(200), np.full(200, length)]) for length in (5.0, 4.0)]
    assert dominated(asking.search, [None] * 2, alike, items) == [True, False]


def test_a_merge_that_takes_less_is_not_dominated_by_one_that_knows_more(scripted):
    asking, *_ = scripted([0.0], [1], [(0.5, 1)])
    recipes = [Recipe.parse({"merge_method": "passthrough", "models": [{"model": name}]}) for name in "abc"]
    costs = dict(zip("abc", (1.0, 0.5, 1.25)))
    config = asking.search.config.model_copy(update={"objectives": ["accuracy", "cost"]})
    space = SimpleNamespace(definition=None, cost=lambda recipe: costs[recipe.models()[0].path])
    search = replace(asking.search, config=config, space=space)
    items, g = search.questions.search[:200], np.random.default_rng(1)
    good, bad = (g.random(200) < 0.9).astype(float), (g.random(200) < 0.4).astype(float)
    assert dominated(search, recipes, [good, bad, bad], items) == [False, False, True]
    assert dominated(search, recipes, [good, bad, good], items) == [False, False, True]
    few = good[:8], np.zeros(8), np.zeros(8)  # alike for all, which settles nothing
    assert dominated(search, recipes, [np.ones(8), *few[1:]], items[:8]) == [False, False, False]


def test_whom_heldout_items_settle_to_be_dominated_leaves(scripted):
    """The search believed all four; on held-out items the third is worse and no shorter than the first."""
    believed = [(0.8, 5), (0.6, 3), (0.7, 4.9), (0.7, 4)]
    asking, known, engine = scripted([3.0, 0.5, -2.0, 1.5], [5, 3, 5, 4], believed)
    engine.info = lambda: SimpleNamespace(experts="full")
    items = asking.search.questions.search[100:]
    search = replace(asking.search, questions=replace(asking.search.questions, heldout=items))
    baseline = {"objectives": {"a": (0.1, 0.0), "length": (12.0, 0.0)}}
    front = measure_front(search, known, None, {"model": baseline}, items)
    assert [one.candidate.position for one in front.members] == [0, 3, 1]
    assert [one.candidate.position for one in front.left] == [2]
    assert front.pick() == 0 and front.pick("length") == 2 and front.pick("3") == 2
    with pytest.raises(BadInput, match="1 to 3"):
        front.pick("4")
    whole = measure_front(search, [known[at] for at in (0, 1, 3)], None, {"model": baseline}, items)
    assert whole.hypervolume["value"] == front.hypervolume["value"]


def test_what_may_be_picked():
    check_pick(None, ("accuracy",), False)
    for said in ("3", "knee", "length"):
        check_pick(said, ("a", "length"), True)
    with pytest.raises(BadInput, match="--pick: found 'b'; expected a member's number, knee, a, length"):
        check_pick("b", ("a", "length"), True)
    with pytest.raises(BadInput, match="a search for one objective"):
        check_pick("knee", ("accuracy",), False)


# -- whole runs


def configured(folder, name="several.yaml", **changes):
    data = yaml.safe_load((folder / "evolve.yaml").read_text()) | SEVERAL | changes
    (folder / name).write_text(yaml.safe_dump(data))
    return folder / name


@pytest.fixture(scope="module")
def several(solving_world, tmp_path_factory):
    """(configuration, run directory, result) of a run that estimates and races."""
    folder = shutil.copytree(solving_world, tmp_path_factory.mktemp("several") / "world")
    config = configured(folder)
    return config, folder / "run", run.evolve(load_config(config), folder / "run", quiet=True)


def rows(directory):
    with closing(sqlite3.connect(directory / "run.db")) as db:
        tables = ("candidates", "estimates", "answers")
        columns = {"candidates": "generation, position, genome, recipe_hash, responses, error"}
        return [db.execute(f"SELECT {columns.get(t, '*')} FROM {t} ORDER BY 1, 2, 3").fetchall() for t in tables]


def test_a_run_leaves_its_front(several):
    config, directory, result = several
    front, count = result["front"], len(result["front"]["members"])
    assert json.loads((directory / "result.json").read_text()) == json.loads(json.dumps(result))
    assert front["objectives"] == {"english": "higher", "translation": "higher", "length": "lower"} and count > 1
    with open(directory / "front.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["recipe"] for row in table] == [f"front/{n:02}.yaml" for n in range(1, count + 1)]
    assert {p.name for p in (directory / "front").iterdir()} == {f"{n:02}.yaml" for n in range(1, count + 1)}
    for row, member in zip(table, front["members"]):
        for name in front["objectives"]:
            assert float(row[name]) == pytest.approx(member["values"][name][0], rel=1e-5)
            assert float(row[f"{name}_heldout"]) == pytest.approx(member["heldout"][name][0], rel=1e-5)
            assert float(row[f"{name}_heldout_se"]) >= 0 and float(row[f"{name}_se"]) > 0
        assert Recipe.from_yaml(directory / row["recipe"]).hash() == member["recipe_hash"]
    first = [member["values"]["english"][0] for member in front["members"]]
    assert first == sorted(first, reverse=True) and front["picked"] == 1 and "first objective" in front["picked_by"]
    assert (directory / "best.yaml").read_bytes() == (directory / "front" / "01.yaml").read_bytes()
    volume = front["hypervolume"]
    assert 0 <= volume["low"] <= volume["high"] and set(volume["reference"]) == set(front["objectives"])
    assert volume["reference"]["length"] == max(
        b["objectives"]["length"][0] for b in result["baselines_detail"].values()
    )
    assert result["ledger"]["race"] == front["race"]["answers"] and result["ledger"]["search"] == 24 * 16
    page = (directory / "report.html").read_text()
    assert "The front" in page and page.count('<circle class="estimated"') == 3 * count
    assert all(f"front/{n:02}.yaml" in page for n in range(1, count + 1))


def test_candidates_are_journalled_with_every_objective(several):
    config, directory, result = several
    with closing(Journal(directory)) as journal:
        found = journal.candidates()
    assert all(c.objectives == ("english", "translation", "length") and c.values.shape == (3,) for c in found)
    assert all(0 <= c.values[0] <= 1 < c.values[2] for c in found)


def test_one_more_call_picks_another_member(several, tmp_path):
    config, directory, result = several
    copy = shutil.copytree(directory, tmp_path / "run")
    number = len(result["front"]["members"])
    again = run.evolve(load_config(config), copy, resume=True, quiet=True, pick=str(number))
    assert again["front"]["picked"] == number and again["front"]["picked_by"] == str(number)
    assert again["front"]["members"] == result["front"]["members"] and rows(copy) == rows(directory)
    assert again["front"]["hypervolume"] == result["front"]["hypervolume"]
    merge_to_disk(Recipe.from_yaml(copy / "front" / f"{number:02}.yaml"), tmp_path / "merged", seed=3)
    weights = lambda folder: (folder / "model.safetensors").read_bytes()
    assert weights(copy / "model") == weights(tmp_path / "merged") != weights(directory / "model")
    shortest = run.evolve(load_config(config), copy, resume=True, quiet=True, pick="length")["front"]
    lengths = [member["values"]["length"][0] for member in shortest["members"]]
    assert lengths[shortest["picked"] - 1] == min(lengths)
    with pytest.raises(BadInput, match=f"--pick: found {number + 1}; expected 1 to {number}, the front's members"):
        run.evolve(load_config(config), copy, resume=True, quiet=True, pick=str(number + 1))


def test_a_number_of_an_earlier_versions_front_is_refused(several, tmp_path):
    config, directory, result = several
    copy = shutil.copytree(directory, tmp_path / "run")
    told = json.loads((copy / "result.json").read_text())
    del told["front"]["left"]
    (copy / "result.json").write_text(json.dumps(told))
    with pytest.raises(BadInput, match=r"--pick: found 1, and .* tells a front of an earlier version; expected knee"):
        run.evolve(load_config(config), copy, resume=True, quiet=True, pick="1")
    again = run.evolve(load_config(config), copy, resume=True, quiet=True, pick="knee")
    assert again["front"]["members"] == result["front"]["members"]


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["nsga2", "como"])
def test_killed_runs_resume_to_the_same_bits(solving_world, tmp_path, name):
    """kill -9 in the search, then again; then the run to its end. Fewer candidates than the run above."""
    folder = shutil.copytree(solving_world, tmp_path / "world")
    objectives = SEVERAL["objectives"][-2:] if name == "como" else SEVERAL["objectives"]  # como takes two
    optimizer = {"name": name, "budget": 400, "population": 4, "seed": 1}
    config = configured(folder, objectives=objectives, optimizer=optimizer)
    killed(config, tmp_path / "twice", (5, 14), 400, "--no-export")
    killed(config, tmp_path / "once", (20,), 400, "--no-export")
    first, second = rows(tmp_path / "twice")[:2], rows(tmp_path / "once")[:2]
    for a, b in zip(first, second):
        shared = min(len(a), len(b))
        assert shared >= 14 and a[:shared] == b[:shared]


def test_a_whole_run_stopped_in_its_race_resumes_to_the_same_bits(several, solving_world, tmp_path, monkeypatch):
    from merge3.engine import LocalEngine

    config, directory, expected = several
    evaluate, race = LocalEngine.evaluate, []

    class Killed(BaseException):
        pass

    def stopping(self, registration, subjects):
        for evaluation in evaluate(self, registration, subjects):
            race.append(1)
            if len(race) == 24 + 3:  # every candidate, and the third contender of the race
                raise Killed
            yield evaluation

    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "evaluate", stopping)
        with pytest.raises(Killed):
            run.evolve(load_config(config), tmp_path / "run", quiet=True, export=False)
    result = run.evolve(load_config(config), tmp_path / "run", resume=True, quiet=True, export=False)
    assert rows(tmp_path / "run") == rows(directory)
    assert result["front"] == expected["front"] and result["ledger"] == expected["ledger"]
    assert (tmp_path / "run" / "front.csv").read_bytes() == (directory / "front.csv").read_bytes()


def test_every_objective_is_checked_in_the_search(solving_world, tmp_path):
    folder = shutil.copytree(solving_world, tmp_path / "world")
    config = configured(
        folder,
        extract={"method": "irt", "size": 8},
        estimate={"method": "gmp-irt", "models": 4, "check_every": 1},
        optimizer={"name": "nsga3", "budget": 18, "population": 6, "seed": 3},
    )
    result = run.evolve(load_config(config), folder / "run", quiet=True, export=False)
    made = result["checks"]["made"]
    assert [check[-1] for check in made] == ["english", "translation", "length"] * 2
    assert all(check[1] > 1 and check[3] > 1 for check in made[2::3])
    assert result["ledger"]["checks"] == 2 * 16  # a check answers once, whatever is made of it
    page = (folder / "run" / "report.html").read_text()
    assert "<h4>english</h4>" in page and "<h4>length</h4>" in page


def test_the_whole_search_may_answer_everything(solving_world, tmp_path):
    """No item is left for a race: the front is that of the candidates, all three objectives counted."""
    folder = shutil.copytree(solving_world, tmp_path / "world")
    optimizer = {"name": "random", "budget": 10, "population": 5, "seed": 3}
    objectives = ["english", "translation", "length"]
    config = configured(folder, objectives=objectives, extract={"method": "all"}, optimizer=optimizer)
    result = run.evolve(load_config(config), folder / "run", quiet=True, export=False)
    assert result["front"]["race"] is None and result["ledger"]["race"] == 0
    questions = load_questions(load_config(config))
    with closing(Journal(folder / "run")) as journal:
        found = {c.recipe_hash: c.values * [1, 1, -1] for c in journal.candidates()}
    beats = lambda a, b: (a >= b).all() and (a > b).any()
    expected = {h for h, values in found.items() if not any(beats(other, values) for other in found.values())}
    front = result["front"]
    assert {member["recipe_hash"] for member in (*front["members"], *front["left"])} == expected
    assert len(questions.heldout) == result["heldout_items"]
