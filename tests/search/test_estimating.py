"""Searches on a few items: calibration, estimates as fitness, renewal, checks, race, ledger, resume."""

import json
import shutil
import sqlite3
import sys
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from merge3.client import run
from merge3.client.calibrate import calibrate
from merge3.engine import Evaluation, LocalEngine
from merge3.errors import BadInput, ConfigError, Merge3Warning
from merge3.irt import Responses, read_responses
from merge3.irt.bank import sigmoid
from merge3.pool import Pool
from merge3.search import asking, calibration, policy
from merge3.search.calibration_files import save
from merge3.search.config_files import load_config
from merge3.search.context import Search
from merge3.search.gathering import calibrated, digests, gather
from merge3.search.journal import Candidate, Journal
from merge3.search.questions import load_questions
from merge3.search.race import Contender, race
from merge3.space import Space
from merge3.tasks import Item, item_key, keys_by_task

FEW = {
    "extract": {"method": "irt", "size": 4},
    "estimate": {"method": "gmp-irt", "models": 5, "check_every": 2},
    "race": {"candidates": 4, "share": 1.0},
}


@pytest.fixture(scope="module")
def few(solving_world, tmp_path_factory):
    """A configuration that calibrates, estimates, checks and races."""
    folder = shutil.copytree(solving_world, tmp_path_factory.mktemp("few") / "world")
    (folder / "few.yaml").write_text(yaml.safe_dump(yaml.safe_load((folder / "evolve.yaml").read_text()) | FEW))
    return folder / "few.yaml"


@pytest.fixture(scope="module")
def undisturbed(few, tmp_path_factory):
    directory = tmp_path_factory.mktemp("few") / "run"
    return directory, run.evolve(load_config(few), directory, quiet=True, export=False)


def journal(directory):
    with sqlite3.connect(directory / "run.db") as db:
        columns = "generation, position, genome, recipe_hash, responses, value, stderr"
        candidates = f"SELECT {columns} FROM candidates JOIN estimates USING (generation, position) ORDER BY 1, 2"
        return db.execute(candidates).fetchall(), db.execute("SELECT * FROM answers ORDER BY 1, 2").fetchall()


def test_every_answer_is_in_the_ledger(undisturbed):
    directory, result = undisturbed
    ledger = result["ledger"]
    candidates, answers = journal(directory)
    counted = {
        stage: sum(len(row[3]) // 8 for row in answers if row[0] == stage) for stage in ("calibration", "check", "race")
    }
    assert ledger["calibration"] == counted["calibration"] == (4 + 5) * 56  # endpoints and merges, all items
    assert ledger["search"] == sum(len(row[4]) // 8 for row in candidates) == 24 * 8
    assert ledger["checks"] == counted["check"] > 0 and ledger["race"] == counted["race"] > 0
    assert (
        ledger["total"] == sum(ledger[k] for k in ("calibration", "search", "checks", "race")) == result["item_answers"]
    )
    assert (
        ledger["full"] == 24 * 56
        and result["asked"]["estimate"] == "gmp-irt"
        and "chosen by `irt`" in result["asked"]["why"]
    )
    assert all(0 <= row[5] <= 1 and 0 < row[6] < 1 for row in candidates)


def test_the_report_shows_ledger_checks_and_race(undisturbed):
    directory, result = undisturbed
    page = (directory / "report.html").read_text()
    for stage in ("calibration", "search", "checks", "race", "total"):
        assert f"<td>{stage}</td><td>{result['ledger'][stage]:,}</td>" in page
    assert (
        page.count('<circle class="estimated"')
        == page.count('<circle class="answered"')
        == len(result["checks"]["made"])
        > 0
    )
    assert " → ".join(map(str, result["race"]["rounds"])) + " of the best" in page and result["asked"]["why"] in page


@pytest.mark.parametrize("stop_after", [3, *(pytest.param(n, marks=pytest.mark.heavy) for n in (12, 40))])
def test_a_run_stopped_anywhere_resumes_to_the_same_bits(undisturbed, few, tmp_path, monkeypatch, stop_after):
    """Stopped by an exception inside the n-th question to the engine: in calibration, search or race."""
    asked = 0
    evaluate = LocalEngine.evaluate

    class Killed(BaseException):
        pass

    def stopping_evaluate(self, registration, subjects):
        nonlocal asked
        for evaluation in evaluate(self, registration, subjects):
            asked += 1
            if asked == stop_after:
                raise Killed
            yield evaluation

    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "evaluate", stopping_evaluate)
        with pytest.raises(Killed):
            run.evolve(load_config(few), tmp_path / "run", quiet=True, export=False)
    result = run.evolve(load_config(few), tmp_path / "run", resume=True, quiet=True, export=False)
    directory, expected = undisturbed
    assert journal(tmp_path / "run") == journal(directory)
    assert (tmp_path / "run" / "best.yaml").read_text() == (directory / "best.yaml").read_text()
    assert {k: result[k] for k in ("heldout", "ledger", "race", "checks")} == {
        k: expected[k] for k in ("heldout", "ledger", "race", "checks")
    }


def test_generations_are_asked_different_items(few, tmp_path):
    config = load_config(few)
    questions = load_questions(config)
    pool = Pool.open(config.models[0], config.models[1:])
    engine, space = LocalEngine(pool), Space(config.genome.definition(), pool.layouts[pool.base])
    with closing(Journal(tmp_path)) as journal:
        found = asking.prepare(Search(config, questions, engine, space, journal))
    first = [item.id for item in found.subset]
    assert len(first) == 8 and [item.id for item in found.registration().items] == first
    asking.renew(found)
    assert [item.id for item in found.subset] != first and len(found.subset) == 8
    assert len(found.unseen()) == 56 - 8


def test_a_check_notices_estimates_that_are_off(few, tmp_path):
    """Three checks with answers far from the estimates: the subset must go."""
    config = load_config(few)
    questions = load_questions(config)

    class Engine:
        def evaluate(self, registration, subjects):
            count, one = len(registration.items), np.zeros(1)
            return [
                Evaluation(i, "", np.zeros(count), registration.objectives, one, one, 0.0)
                for i, _ in enumerate(subjects)
            ]

    class Anything:
        definition = config.genome.definition()

        def recipe(self, genome):
            return genome

    genome = np.zeros(1)
    candidate = Candidate(0, 0, genome, "", None, ("accuracy",), np.array([0.9]), np.array([0.05]), 0.0, 0.0, "local")
    with closing(Journal(tmp_path)) as journal:
        found = asking.Asking(Search(config, questions, Engine(), Anything(), journal), questions.search[:4])
        outcomes = [asking.check(found, g, [genome], {0: candidate}) for g in range(4)]
    assert outcomes == [False, False, True, False] and found.drifted == [2] and len(found.checks) == 4


@pytest.mark.heavy
def test_a_response_file_replaces_the_questions(undisturbed, few, tmp_path):
    directory, _ = undisturbed
    config = load_config(few)
    questions = load_questions(config)
    pool = Pool.open(config.models[0], config.models[1:])
    engine, space = LocalEngine(pool), Space(config.genome.definition(), pool.layouts[pool.base])
    with closing(Journal(tmp_path / "answers")) as journal:
        responses = gather(Search(config, questions, engine, space, journal), lambda done, total: None)
    groups = keys_by_task(questions.search)
    save(calibration.calibrate(responses, groups, config.models, seed=config.optimizer.seed), tmp_path / "bank")
    assert {p.name for p in (tmp_path / "bank").iterdir()} == {
        "responses.csv",
        "calibration.json",
        "diagnostics-0.png",
        "diagnostics-1.png",
        *(f"bank-{n}.{e}" for n in (0, 1) for e in ("json", "safetensors")),
    }
    results = []
    for given in (tmp_path / "bank" / "responses.csv", tmp_path / "bank"):
        free = replace_estimate(config, calibration=str(given))
        results.append(run.evolve(free, tmp_path / f"run-{given.suffix}", quiet=True, export=False))
        assert results[-1]["ledger"]["calibration"] == 0 and results[-1]["ledger"]["search"] == 24 * 8
    assert results[0]["heldout"] == results[1]["heldout"]
    other = tmp_path / "bank" / "responses.csv"
    other.write_text(other.read_text().replace("translation/", "spelling/"))
    with pytest.raises(BadInput, match="task 'translation': none of its"):
        run.evolve(replace_estimate(config, calibration=str(other)), tmp_path / "bad", quiet=True, export=False)


def test_a_calibration_is_of_the_items_and_checkpoints_that_it_was_made_with(few, tmp_path):
    config, out = load_config(few), tmp_path / "bank"
    questions, g = load_questions(config), np.random.default_rng(0)
    keys = tuple(map(item_key, questions.search))
    rows = Responses(tuple("abcdef"), keys, g.integers(0, 2, (6, len(keys))).astype(float))
    found = calibration.calibrate(rows, keys_by_task(questions.search), ("a", "b"))
    save(replace(found, asked=digests(questions), checkpoints=["x", "y"]), out)
    config = replace_estimate(config, calibration=str(out))

    def given(hashes=("y", "x"), **changes):
        engine = SimpleNamespace(info=lambda: SimpleNamespace(content_hashes=dict(enumerate(hashes))))
        return calibrated(Search(config, replace(questions, **changes), engine, None, None))

    assert given().banks.keys() == found.banks.keys() and given().asked == digests(questions)
    other = [replace(questions.search[0], prompt="one"), *questions.search[1:]]  # of the same name
    with pytest.raises(BadInput, match="bank: made when the items of task 'english', or how they are put, were others"):
        given(search=other)
    with pytest.raises(BadInput, match="task 'english'"):
        given(chat={"english": "Be short."})
    with pytest.raises(BadInput, match="bank: made with other models than the run's; expected one made with these"):
        given(hashes=("x", "z"))
    assert given(hashes=("x",)).banks.keys() == given(hashes=("x", "y", "z")).banks.keys() == found.banks.keys()
    told = json.loads((out / "calibration.json").read_text())
    (out / "calibration.json").write_text(json.dumps({k: told[k] for k in ("tasks", "endpoints", "answers")}))
    with pytest.warns(Merge3Warning, match="bank: made by an earlier version"):
        given(search=other, hashes=("x", "z"))


def test_calibrate_says_of_what_it_is(few, tmp_path, monkeypatch):
    monkeypatch.setattr("merge3.search.calibration_files.plot", lambda *drawn: None)
    data = yaml.safe_load(few.read_text()) | {"limit": 6}
    data["estimate"]["models"] = 1
    (few.parent / "fewer.yaml").write_text(yaml.safe_dump(data))
    calibrate(tmp_path / "bank", few.parent / "fewer.yaml", None, (), 1, 0, "cpu", True)
    told = json.loads((tmp_path / "bank" / "calibration.json").read_text())
    config = load_config(few.parent / "fewer.yaml")
    hashes = Pool.open(config.models[0], config.models[1:]).content_hashes()
    assert told["checkpoints"] == list(hashes.values()) and told["asked"] == digests(load_questions(config))


def replace_estimate(config, **changes):
    return config.model_copy(update={"estimate": config.estimate.model_copy(update=changes)})


def test_without_matplotlib_a_calibration_has_no_pictures(tmp_path, monkeypatch):
    g = np.random.default_rng(0)
    names = tuple(map(str, range(8))), tuple(f"a/{i}" for i in range(20))
    responses = Responses(*names, g.integers(0, 2, (8, 20)).astype(float))
    found = calibration.calibrate(responses, {"a": list(responses.items)}, ("0", "1"))
    save(found, tmp_path / "with")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(Merge3Warning, match=r"no pictures of how well the items fit: .*merge3-gpu\[plots\]"):
        save(found, tmp_path / "without")
    files = lambda name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
    pictures = {"diagnostics-0.png": files("with")["diagnostics-0.png"]}
    assert files("without") | pictures == files("with") and len(files("without")) == len(files("with")) - 1


def test_auto_calibrates_only_where_it_pays(few):
    config = load_config(few)
    questions = load_questions(config)
    auto = config.model_copy(update={"extract": type(config.extract)(), "estimate": type(config.estimate)()})
    assert policy.decide(auto, questions.search)[:2] == ("all", "mean")
    many = [replace(item, id=f"{item.id}-{n}") for n in range(40) for item in questions.search]
    long = auto.model_copy(update={"optimizer": auto.optimizer.model_copy(update={"budget": 1000})})
    assert policy.decide(long, many)[:2] == ("irt", "gmp-irt")
    plain = long.model_copy(update={"estimate": type(config.estimate)(method="mean")})
    assert policy.decide(plain, many)[:2] == ("random", "mean")
    wrong = plain.model_copy(update={"extract": type(config.extract)(method="irt")})
    with pytest.raises(ConfigError, match="mean with extract.method irt"):
        policy.decide(wrong, many)


def test_a_race_finds_the_best_among_lucky_ones():
    g = np.random.default_rng(0)
    items = [Item(f"{t}{i}", t, "generate", "p", "a") for t in "ab" for i in range(400)]
    difficulty = g.normal(0, 1, len(items))
    chances = [sigmoid(ability - difficulty) for ability in (0.0, 0.1, 0.9, 0.2)]
    answers = [(g.random(len(items)) < p).astype(float) for p in chances]
    lucky = [
        Contender("x", 0.70, 0.05),
        Contender("y", 0.69, 0.05),
        Contender("z", 0.62, 0.05),
        Contender("w", 0.60, 0.05),
    ]
    asked = {c: [] for c in range(4)}

    def ask(c, positions):
        asked[c] += positions
        return answers[c][positions]

    found = race(lucky, items, ask, 20, 10**6, seed=1)
    assert found.winner == 2 and found.settled and found.rounds[-1] == 1
    assert found.answers == sum(map(len, asked.values()))
    assert all(len(set(a)) == len(a) for a in asked.values()) and set(asked[0]) <= set(asked[2])
    assert abs(found.value - chances[2].mean()) < 4 * found.stderr


def test_a_race_keeps_its_budget_and_says_when_it_is_not_settled():
    items = [Item(str(i), "a", "generate", "p", "a") for i in range(100)]
    twins = [Contender("x", 0.5, 0.05), Contender("y", 0.5, 0.05)]
    found = race(twins, items, lambda c, at: np.array([i % 2 for i in at], float), 10, 10**6)
    assert not found.settled and found.winner == 0 and found.answers == 2 * 100 and found.rounds == (2, 2, 2, 2)
    poor = race(twins, items, lambda c, at: np.zeros(len(at)), 10, 25)
    assert poor.answers == 24 and poor.rounds == (2, 2)  # the last round takes what is left


def test_a_race_counts_what_the_search_knew():
    items = [Item(str(i), "a", "generate", "p", "a") for i in range(12)]
    sure = [Contender("x", 0.80, 0.01), Contender("y", 0.60, 0.01)]
    found = race(sure, items, lambda c, at: np.array([(i + c) % 2 for i in at], float), 12, 10**6)
    assert found.winner == 0 and found.settled


def test_calibrate_extract_estimate_on_the_command_line(tmp_path, capsys):
    from merge3.client import cli

    g = np.random.default_rng(2)
    theta, b = g.normal(size=24), g.normal(size=60)
    y = (g.random((24, 60)) < sigmoid(theta[:, None] - b)).astype(int)
    lines = ["model,task,item,score", *(f"m{m},{'st'[i % 2]},q{i},{y[m, i]}" for m in range(20) for i in range(60))]
    (tmp_path / "board.csv").write_text("\n".join(lines) + "\n")
    bank = tmp_path / "bank"

    def call(*arguments):
        cli.app([str(a) for a in arguments], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    described = call(
        "calibrate",
        "--out",
        bank,
        "--responses",
        tmp_path / "board.csv",
        "--endpoint",
        "m0",
        "--endpoint",
        "m1",
        "--json",
    )
    assert (
        described["answers"] == 1200
        and set(described["tasks"]) == {"s", "t"}
        and described["tasks"]["s"]["items"] == 30
    )
    subset = call("extract", bank, "--size", "10", "--out", tmp_path / "subset.json", "--json")
    assert [len(t["items"]) for t in subset["tasks"].values()] == [10, 10]
    keys = {key for t in subset["tasks"].values() for key in t["items"]}
    new = ["model,item,score"]
    new += [f"m{m},{key},{y[m, int(key.split('q')[1])]}" for m in (20, 21, 22, 23) for key in sorted(keys)]
    (tmp_path / "new.csv").write_text("\n".join(new) + "\n")
    rows = call("estimate", bank, tmp_path / "subset.json", tmp_path / "new.csv", "--json")
    assert len(rows) == 4 and all(r["complete"] and 0 < r["stderr"] < 0.3 for r in rows)
    truth = {f"m{m}": y[m].mean() for m in range(20, 24)}
    assert all(abs(r["accuracy"] - truth[r["model"]]) < 4 * r["stderr"] for r in rows)
    assert read_responses(bank / "responses.csv").values.shape == (20, 60)
    for arguments, message in [
        (("calibrate", "--out", bank, "--responses", tmp_path / "board.csv"), "a calibration is there already"),
        (("calibrate", "--out", tmp_path / "x"), "neither a configuration nor --responses"),
        (("extract", bank, "--size", "10", "--method", "best"), "method 'best'"),
        (("extract", tmp_path), "calibration.json"),
        (("estimate", bank, tmp_path / "new.csv", tmp_path / "new.csv"), "extract --out"),
        (
            ("calibrate", "--out", tmp_path / "x", "--responses", tmp_path / "board.csv", "--endpoint", "zz"),
            "no rows of endpoint 'zz'",
        ),
    ]:
        with pytest.raises(BadInput, match=message):
            cli.app([str(a) for a in arguments], standalone_mode=False)
