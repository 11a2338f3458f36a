"""report.html while a run goes on: what it says, that it is whole whenever one looks, and when it asks for the next."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from functools import partial

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from merge3.client import run
from merge3.client.channel import Target
from merge3.client.charts import STYLES, head, library
from merge3.client.fit_page import FitPage, fit_charts
from merge3.client.rewriting import PATIENCE, SHARE, Pace, Rewriting
from merge3.client.search_charts import front, generation_means, running_best, search_charts
from merge3.client.search_page import SearchPage, workers_of
from merge3.client.serve_report import Handler, make_server
from merge3.errors import ResourceError, ResumeMismatch
from merge3.search.config_files import load_config
from merge3.search.context import Progress
from merge3.search.journal import Journal
from merge3.search.watching import JournalReader
from tests.commands import client
from tests.watching import Page, candidate, journaled

HOSTILE = "</script><img src=http://x>&amp;"
drawn = pytest.mark.skipif(library() is None, reason="dygraphs is not installed")
in_a_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")


def seen(directory, *candidates):
    with closing(JournalReader(journaled(directory, *candidates))) as reader:
        return reader.new()


def check_charts(charts):
    """They are what charts.py says charts are."""
    for chart in charts:
        assert chart.keys() == {"id", "title", "y", "xs", "series"} and chart["xs"] and chart["series"]
        count = len(chart["xs"][0]["values"])
        for one in (*chart["xs"], *chart["series"]):
            assert one.keys() - {"style"} == {"name", "values", "errors"} and len(one["values"]) == count
            assert len(one["errors"]) in (0, count)
            assert all(v is None or isinstance(v, (int, float)) for v in one["values"] + one["errors"])
        assert all(one["style"] in STYLES for one in chart["series"])
        assert len({one["name"] for one in chart["series"]} | {chart["xs"][0]["name"]}) == len(chart["series"]) + 1
    assert len({chart["id"] for chart in charts}) == len(charts)
    json.dumps(charts, allow_nan=False)


# -- the journal, looked at while it is written


def test_a_reader_is_told_each_candidate_once_as_it_comes(tmp_path):
    with closing(Journal(tmp_path)) as journal, closing(JournalReader(tmp_path)) as reader:
        assert reader.new() == [] and reader.answers() == {}
        journal.append(candidate(1, [0.25, 7.0], [0.01, 0.5], objectives=("accuracy", "length")))
        (first,) = reader.new()
        assert first[:3] == (0, 1, 3) and first.objectives == ("accuracy", "length")
        assert first.values == (0.25, 7.0) and first.stderrs == (0.01, 0.5)
        journal.append(candidate(0, None, error="it failed"))
        journal.append(candidate(2, [0.5]))
        assert [(c.generation, c.position, c.values, c.error, c.answers) for c in reader.new()] == [
            (0, 0, (None,), "it failed", 0),
            (1, 0, (0.5,), None, 3),
        ]
        journal.remember("race", "a", range(5), lambda: np.zeros(5))
        journal.remember("race", "b", range(2), lambda: np.zeros(2))
        assert reader.new() == [] and reader.answers() == {"race": 7}


def test_a_reader_writes_nothing_and_leaves_one_file(tmp_path):
    journal = Journal(tmp_path)
    journal.append(candidate(0, [0.5]))
    with closing(JournalReader(tmp_path)) as reader:
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader._db.execute("DELETE FROM candidates")
        journal.close()  # before the reader: then the reader is the one that tidies up
        assert len(reader.new()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run.db"]


# -- what is drawn


@given(st.lists(st.one_of(st.none(), st.floats(-1, 1)), max_size=30))
def test_the_best_so_far_is_the_highest_and_earliest(values):
    for i, at in enumerate(running_best(values)):
        known = [(v, -j) for j, v in enumerate(values[: i + 1]) if v is not None]
        assert at == (-max(known)[1] if known else None)


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=25))
def test_the_front_is_what_nothing_dominates(rows):
    values = np.array(rows, float)
    dominated = [any((b >= a).all() and (b > a).any() for b in values) for a in values]
    assert front(values).tolist() == [not d for d in dominated]


def test_a_generations_mean_stands_at_its_last_candidate_and_counts_no_failure(tmp_path):
    came = seen(tmp_path, candidate(0, [0.2]), candidate(1, [0.4]), candidate(2, None), candidate(3, [0.5]))
    assert generation_means(came) == [None, pytest.approx(0.3), None, 0.5]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.one_of(st.none(), st.tuples(*[st.floats(-1e6, 1e6, allow_nan=False)] * 4)), min_size=1, max_size=12),
)
def test_charts_of_any_search_are_charts(tmp_path_factory, objectives, rows):
    names = tuple(f"task {i}" for i in range(objectives))
    came = [candidate(i, row and row[:objectives], objectives=names) for i, row in enumerate(rows)]
    charts = search_charts(seen(tmp_path_factory.mktemp("any"), *came))
    check_charts(charts)
    pairs = objectives * (objectives - 1) // 2 if any(rows) else 0
    assert [chart["id"] for chart in charts] == ["curve", *(f"front-{i}" for i in range(pairs))]


def test_charts_say_what_the_journal_says(tmp_path):
    two = {"objectives": ("accuracy", "italian")}
    came = [
        candidate(0, [0.5, 0.1], [0.01, 0.02], **two),
        candidate(1, None, **two),
        candidate(2, [0.75, 0.05], [0.03, 0.04], **two),
        candidate(3, [0.25, 0.01], **two),
    ]
    curve, pair = search_charts(seen(tmp_path, *came))
    assert [(one["name"], one["values"]) for one in curve["xs"]] == [
        ("candidates", [1, 2, 3, 4]),
        ("item answers", [3, 3, 6, 9]),
    ]
    estimates, means, best = curve["series"]
    assert estimates["values"] == [0.5, None, 0.75, 0.25] and estimates["errors"] == [0.01, None, 0.03, 0.01]
    assert means["values"] == [None, 0.5, None, 0.5]
    assert best["values"] == [0.5, 0.5, 0.75, 0.75] and best["errors"] == [0.01, 0.01, 0.03, 0.03]
    assert pair["xs"][0]["values"] == [0.5, 0.75, 0.25] and pair["xs"][0]["errors"] == [0.01, 0.03, 0.01]
    every, on = pair["series"]
    assert every["values"] == [0.1, 0.05, 0.01] and on["values"] == [0.1, 0.05, None]
    assert (pair["y"], pair["xs"][0]["name"], every["errors"]) == ("italian", "accuracy", [0.02, 0.04, 0.01])


# -- the page


@pytest.fixture(scope="module")
def config(tiny_world):
    return load_config(tiny_world / "evolve.yaml")


def page_of(directory, config, pace=Pace(), progress=None):
    look = SearchPage(directory, config, 1000, lambda: [{"name": "w", "device": "cpu", "pid": 7, "busy": "x"}])
    look.tell(progress or Progress(done=2, budget=24, seconds=30.0, best=0.5, best_stderr=0.1))
    return look(pace)


def test_a_page_is_one_file_whatever_is_named_in_it(tmp_path, config):
    name = (HOSTILE, "b")
    came = [candidate(i, v, objectives=name) for i, v in enumerate(([0.5, 0.1], None, [0.2, 0.3]))]
    page = Page(page_of(journaled(tmp_path, *came), config))
    assert page.asked == [] and "img" not in page.tags and page.tags.count("script") == 3
    check_charts(page.data["charts"])
    assert page.data["charts"][0]["y"] == HOSTILE
    assert {chart["id"] for chart in page.data["charts"]} <= page.ids and "news" in page.ids


def test_a_page_says_how_the_run_is_doing(tmp_path, config):
    directory = journaled(tmp_path, candidate(0, [0.5]), candidate(1, None, error="no"))
    with closing(Journal(directory)) as journal:
        journal.remember("calibration", "a", range(20), lambda: np.zeros(20))
        journal.remember("check", "0", range(4), lambda: np.zeros(4))
    page = Page(page_of(directory, config))
    data = page.data
    spent = {"calibration": 20, "search": 3, "checks": 4, "elites": 0, "race": 0}
    assert data["ledger"] == spent | {"total": 27, "full": 1000}
    assert data["alive"] and data["state"] == "running" and data["candidates"] == 2 and data["progress"]["failed"] == 1
    assert data["per_minute"] == 4 and data["left"] == "5:30" and data["progress"]["mean"] is None
    for said in ("search: 2 of 24", "1 failed", "4, ", "5:30", "0.5000", "0.1000", "2.70 %", "cpu", "merge_method"):
        assert said in page.text, said
    ended = page_of(directory, config, Pace(alive=False, state="failed", said=HOSTILE))
    assert HOSTILE not in ended and "news" not in Page(ended).ids and not Page(ended).data["alive"]
    assert HOSTILE in Page(ended).text and "--resume" in Page(ended).text


def test_nothing_new_is_not_written_again(tmp_path, config):
    look = SearchPage(journaled(tmp_path, candidate(0, [0.5])), config, 10, list)
    quiet = Pace(due=False)
    assert look(quiet) and look(quiet) is None
    assert look(Pace(due=True)), "a reader waits for a sign of life"
    journaled(tmp_path, candidate(1, [0.5]))
    assert look(quiet) and look(quiet) is None
    assert len(look.taken()) == 2 and look.taken() == []
    look.tell(Progress(stage="race"))
    assert "the best candidates race" in look(quiet)
    assert look(Pace(due=True, alive=False, state="done"))


def test_without_the_library_a_page_says_so(tmp_path, config, monkeypatch):
    monkeypatch.setattr("merge3.client.charts.library", lambda: None)
    monkeypatch.setattr("merge3.client.search_page.library", lambda: None)
    page = Page(page_of(journaled(tmp_path, candidate(0, [0.5])), config))
    assert "dygraphs is not installed" in page.text and page.scripts[0] == ""


@drawn
def test_the_library_is_embedded_with_its_licence_and_asks_for_nothing():
    text = head()
    assert "MIT-licensed" in text and "sourceMappingURL" not in text and text.count("</script>") == 1
    assert 50_000 < len(text) < 300_000


def test_a_fits_page_has_its_losses(tmp_path):
    history = [{"step": i, "loss": 2.0 / i, "losses": {HOSTILE: 2.0 / i, "b": 1.0}} for i in (1, 2, 3)]
    history[1]["heldout"] = {"accuracy": 0.5, "stderr": 0.1}
    check_charts(fit_charts(history))
    look = FitPage("adamerging", 10, history)
    page = Page(look(Pace(elapsed=1.0)))
    assert [chart["id"] for chart in page.data["charts"]] == ["loss", "heldout"] and page.data["done"] == 3
    assert page.data["charts"][1]["xs"][0]["values"] == [2] and "img" not in page.tags and page.asked == []
    assert look(Pace(due=False)) is None
    history.append({"step": 4, "loss": 0.5, "losses": {HOSTILE: 0.5, "b": 1.0}})
    assert "4 of 10 steps" in look(Pace(due=False))
    assert Page(FitPage("adamerging", 10, [])(Pace())).data["charts"] == []


# -- rewriting


def busy(seconds):
    """For so long of a core."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_a_page_that_costs_more_is_written_less_often(tmp_path):
    paces, afters = [], []

    def look(pace):
        paces.append(pace)
        busy(0.02)
        return f"{len(paces)}"

    after = lambda: busy(0.5) or afters.append(len(paces))
    with Rewriting(tmp_path / "report.html", look, every=0.001, after=after) as page:
        page.begin()
        page.begin()
    first, *_, last = paces
    assert first.alive and first.due and not last.alive and last.state == "done"
    assert 0.02 / SHARE <= last.every < 0.5 / SHARE and 0.02 <= last.cost < 0.5
    assert afters[-1] == len(paces), "what came last is told too"
    assert (tmp_path / "report.html").read_text() == str(len(paces))
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    "raised, state, said",
    [(ResourceError("disk", "full"), "failed", "disk: full"), (KeyboardInterrupt(), "stopped", "")],
)
def test_the_last_page_says_why(tmp_path, raised, state, said):
    last = []
    with pytest.raises(type(raised)):
        with Rewriting(tmp_path / "report.html", lambda pace: last.append(pace) or "page") as page:
            page.begin()
            raise raised
    assert (last[-1].alive, last[-1].state, last[-1].said) == (False, state, said)
    page.end("done")  # it has ended
    assert last[-1].state == state


def test_what_never_began_writes_nothing(tmp_path):
    with Rewriting(tmp_path / "report.html", lambda pace: "page"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    (tmp_path / "report.html").mkdir()
    looks = []
    with Rewriting(tmp_path / "report.html", lambda pace: looks.append(pace) or "page", every=0.001) as page:
        page.begin()
    error = capsys.readouterr().err
    assert not looks[-1].alive, "loggers are told all the same"
    assert error.count("\n") == 1 and error.endswith("report.html is no longer written\n")


def test_a_busy_journal_is_read_at_the_next_look(tmp_path):
    tries = []

    def look(pace):
        tries.append(pace)
        if len(tries) == 1:
            raise sqlite3.OperationalError("database is locked")
        return "page"

    with Rewriting(tmp_path / "report.html", look, every=0.001) as page:
        page.begin()
    assert (tmp_path / "report.html").read_text() == "page" and not tries[-1].alive


# -- real runs


def test_killed_in_the_middle_the_page_is_whole_and_the_run_goes_on(tiny_world, tmp_path):
    directory, config = tmp_path / "run", tiny_world / "evolve.yaml"
    command = [sys.executable, "-m", "merge3.client", "evolve", config, "--run-dir", directory, "-q"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not (directory / "report.html").exists():
            assert time.monotonic() < deadline and process.poll() is None, process.stderr.read().decode()
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    page = Page((directory / "report.html").read_text())
    assert page.data["alive"] and page.data["workers"][0]["pid"] == process.pid and page.asked == []
    assert page.data["ledger"]["full"] == 24 * 56 and page.data["progress"]["budget"] == 24
    result = run.evolve(load_config(config), directory, resume=True, quiet=True)
    final = (directory / "report.html").read_text()
    page = Page(final)
    assert result["candidates"] == 24 and not page.data["alive"] and page.asked == []
    assert len(page.data["charts"][0]["xs"][0]["values"]) == 24 and "news" not in page.ids
    assert final.count("<svg") >= 3 and "Against the baselines" in final and "The recipe" in final
    assert not [p.name for p in directory.iterdir() if p.name.startswith((".", "run.db-"))]
    before = (directory / "report.html").stat()
    with pytest.raises(ResumeMismatch):  # another run's directory is left as it is
        run.evolve(load_config(config), directory, quiet=True)
    assert (directory / "report.html").stat() == before


def interrupted(page):
    """A thread that sends Ctrl-C as soon as there is a page."""

    def interrupt():
        while not page.exists():
            time.sleep(0.005)
        signal.raise_signal(signal.SIGINT)

    waiting = threading.Thread(target=interrupt, daemon=True)
    waiting.start()
    return waiting


def test_a_run_that_is_stopped_says_so(tiny_world, tmp_path):
    config = load_config(tiny_world / "evolve.yaml", budget=60)
    waiting = interrupted(tmp_path / "report.html")
    assert run.evolve(config, tmp_path, quiet=True) is None
    waiting.join()
    page = Page((tmp_path / "report.html").read_text())
    assert page.data["state"] == "stopped" and not page.data["alive"] and "was stopped" in page.text
    assert 0 < page.data["candidates"] < 60 and len(page.data["charts"][0]["xs"][0]["values"]) < 60


def test_a_fit_has_a_page_too_until_its_report(tiny_world, tmp_path):
    data = {"merge_method": "supermerge", "base_model": str(tiny_world / "base"), "dtype": "float32"}
    data["models"] = [{"model": str(tiny_world / name)} for name in ("english", "italian")]
    items = [str(tiny_world / f"{name}.jsonl") for name in ("english", "italian")]
    data["fit"] = {"items": items, "steps": 40, "per_task": 4, "heldout": 0.02, "check_every": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    waiting = interrupted(tmp_path / "run" / "report.html")
    command = ("fit", tmp_path / "recipe.yaml", "--run-dir", tmp_path / "run", "--quiet", "--no-export")
    assert client(*command).returncode == 130
    waiting.join()
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert page.data["state"] == "stopped" and 0 < page.data["done"] < 40 and "fit was stopped" in page.text
    assert [chart["id"] for chart in page.data["charts"]] == ["loss", "heldout"]
    done = client(*command, "--resume")
    assert done.returncode == 0, done.stderr
    final = (tmp_path / "run" / "report.html").read_text()
    assert "merge3-data" not in final and final.count("<svg") >= 3 and "Against the baselines" in final


def test_a_daemon_that_is_away_has_no_workers():
    assert workers_of(Target("127.0.0.1:1")) == []


# -- in a browser


def in_browser(address, milliseconds=2000):
    """The page as it stands after its scripts ran so long, as HTML."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--virtual-time-budget={milliseconds}", "--dump-dom"]
    return subprocess.run(["chromium", *options, address], capture_output=True, text=True, timeout=120).stdout


@drawn
@in_a_browser
def test_a_browser_draws_it_from_the_file_alone(tmp_path, config):
    came = [candidate(i, [i / 9, 1 - i / 9], objectives=("a", "b")) for i in range(9)]
    directory = journaled(tmp_path, *came)
    (tmp_path / "alone.html").write_text(page_of(directory, config))
    found = in_browser((tmp_path / "alone.html").as_uri(), 1000)
    assert found.count("<canvas") >= 4 and "estimate ± se" in found and "over item answers" in found
    assert "asks for the next one every 3 s" in found


@drawn
@in_a_browser
def test_a_browser_asks_again_only_while_the_run_lives(tmp_path, config):
    directory, asked = journaled(tmp_path, candidate(0, [0.5])), []
    alive, done = (page_of(directory, config, Pace(alive=on, state="done", every=2)) for on in (True, False))

    class Rewritten(Handler):
        def do_GET(self):
            if self.path == "/report.html":  # browsers ask for an icon too
                asked.append(self.path)
                (directory / "report.html").write_text(alive if len(asked) < 3 else done)
            super().do_GET()

    with make_server(directory) as server:
        server.RequestHandlerClass = partial(Rewritten, directory, "127.0.0.1")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = in_browser(f"http://127.0.0.1:{server.server_port}/report.html", 20_000)
        server.shutdown()
    assert len(asked) == 3 and "its report comes next" in found


@drawn
@in_a_browser
def test_a_browser_stops_asking_for_a_run_that_was_killed(tmp_path, config):
    text = page_of(journaled(tmp_path, candidate(0, [0.5])), config)
    assert text.count(f'"patience":{PATIENCE}') == 1
    (tmp_path / "killed.html").write_text(text.replace(f'"patience":{PATIENCE}', '"patience":-1'))
    found = in_browser((tmp_path / "killed.html").as_uri(), 20_000)
    assert "No news for 0 min: the run was killed" in found and 'class="old"' in found
